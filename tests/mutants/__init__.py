"""Kinds and adapters that are wrong on purpose, with the laws that catch them; and right ones that pass."""
