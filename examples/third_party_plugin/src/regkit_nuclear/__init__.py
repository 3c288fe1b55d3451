"""A plugin for regkit: the nuclear norm, and the minimal gated unit with its adapter."""

from regkit_nuclear.minimal_gated import MinimalGatedAdapter, MinimalGatedCell
from regkit_nuclear.nuclear import NuclearNorm

__all__ = ["MinimalGatedAdapter", "MinimalGatedCell", "NuclearNorm"]
