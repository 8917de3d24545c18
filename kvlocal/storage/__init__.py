"""How kept tokens are stored, and how much they may take."""
