"""Model files: found, fetched, listed, made."""
