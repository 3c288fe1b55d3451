"""Worlds of several processes, and their tasks."""
