"""Laws of adapters."""
