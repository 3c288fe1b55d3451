"""Tests that an older torch cannot pass, for something of its own, with the version in which each was seen to pass."""

from __future__ import annotations

from typing import Final

import torch
from torch.torch_version import TorchVersion

_LATER_HOOKS: Final = "compiled code takes no notice of later hooks; a step then says that nothing was recorded"
_OTHER_GRAPHS: Final = "the compiler leaves another gap, or says another thing of one"

NEEDS: Final[dict[str, tuple[str, str]]] = {
    "SequentialLR": ("2.13", "its own scheduler warns of its own call"),
    "test_muon_for_matrices": ("2.9", "there is no Muon"),
    "test_operations_are_counted_with_their_memory": ("2.13", "a module takes one operation more"),
    "first_backward_pass[ReentrantAround]": ("2.13", "the checkpoint fails in an assertion of its own before"),
    "test_a_compiled_and_checkpointed_model": ("2.13", _LATER_HOOKS),
    "test_a_compiled_model_carries_it_through_a_gap": ("2.13", _LATER_HOOKS),
    "test_a_compiled_module_is_trained_as_the_loop": ("2.13", _LATER_HOOKS),
    "test_a_compiled_net_is_no_different": ("2.13", _LATER_HOOKS),
    "[Logs-compiles_whole]": ("2.13", _OTHER_GRAPHS),
    "[CountsOnTheClass]": ("2.13", _OTHER_GRAPHS),
    "rest_was_not_tried[ReadBack": ("2.13", _OTHER_GRAPHS),
}
"""A part of a test's name; the torch that the test needs; and why."""


IGNORED: Final = "ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"
"""The warning that LBFGS gives of its own code, before 2.13, to the first test in a process."""


def older_than(version: str) -> bool:
    """Whether the torch at hand comes before a version."""
    return bool(TorchVersion(torch.__version__) < version)


def too_old_for(name: str) -> str | None:
    """The reason why a test of a name cannot pass with the torch at hand; None where it can."""
    for part, (version, reason) in NEEDS.items():
        if part in name and older_than(version):
            return f"torch {torch.__version__} before {version}: {reason}"
    return None
