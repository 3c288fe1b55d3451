"""Plugins of strangers: written, built, installed, failing on demand."""
