"""What is installed, and whether it computes what it should."""
