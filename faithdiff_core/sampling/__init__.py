"""The published schedule and starting point."""
