"""The terminal: streams of text, prompts."""
