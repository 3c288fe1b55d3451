"""Laws of activity penalties."""
