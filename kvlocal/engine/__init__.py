"""A model, its cache and its policy together: when to read, evict and decode."""
