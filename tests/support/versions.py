"""Tests that a version of torch cannot pass, for something of torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion


def needs_torch(version: str, reason: str) -> pytest.MarkDecorator:
    """A mark that skips a test under a torch older than a version: one in which the test was seen to pass."""
    return pytest.mark.skipif(TorchVersion(torch.__version__) < version, reason=f"torch {version}: {reason}")
