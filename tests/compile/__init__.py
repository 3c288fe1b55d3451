"""Compiled models and steps against uncompiled ones."""
