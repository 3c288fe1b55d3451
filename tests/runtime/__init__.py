"""Modes of torch: tracing, exporting, graph capture, mixed precision."""
