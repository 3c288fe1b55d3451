"""Penalties on the outputs of recurrent modules."""
