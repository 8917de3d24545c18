"""The terminal: streams of text, prompts, keys and signals."""
