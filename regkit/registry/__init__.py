"""Which kinds and adapters exist.

Each plugin is imported on its own, under a policy; one that fails is recorded, not raised.
"""
