"""What is printed, as rich renderables and Markdown."""
