"""Weights wherever they live: blocks, parametrizations, masks, ties, snapshots."""
