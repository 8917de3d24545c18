"""Many documents on one model."""
