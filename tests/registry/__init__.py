"""The registry: plugins found, allowed, loaded and kept apart."""
