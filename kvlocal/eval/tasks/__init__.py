"""Where questions come from: needles, RULER, key-value retrieval, articles."""
