"""What an older torch cannot do, or warns of in its own code, with the version in which each was seen to be right."""

from __future__ import annotations

from typing import Final

import pytest
import torch
from torch.torch_version import TorchVersion


def torch_before(version: str) -> bool:
    """Whether the torch at hand is older than a version."""
    return bool(TorchVersion(torch.__version__) < version)


def needs_torch(version: str, reason: str) -> pytest.MarkDecorator:
    """A mark that skips a test under a torch older than a version."""
    return pytest.mark.skipif(torch_before(version), reason=f"before torch {version}, {reason}")


WARNS_OF_ITSELF: Final = (
    (
        "ignore:The epoch parameter in `scheduler.step:UserWarning",  # SequentialLR gives it
        "ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning",  # LBFGS does, once in a process
        # A checkpoint that an error has left open, within another, fails as it is thrown away.
        "ignore:Exception ignored in.*_checkpoint_without_reentrant:pytest.PytestUnraisableExceptionWarning",
    )
    if torch_before("2.13")
    else ()
)
"""The filters of the warnings that an older torch gives of its own code."""
