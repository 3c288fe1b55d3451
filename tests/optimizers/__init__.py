"""Optimizers in combination: nested, split, scheduled, sharpness-aware, sharded."""
