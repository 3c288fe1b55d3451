"""The laws of kinds and adapters, as the author of a plugin meets them."""
