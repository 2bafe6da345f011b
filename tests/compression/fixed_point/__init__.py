"""Fixed point."""
