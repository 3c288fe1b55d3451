"""Copies of callbacks: each has the document and nothing of a fit, and the original finds the rules of its copies.

Libraries that keep a model with its options copy or pickle the callbacks among these, before a fit or after one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

import regkit


class Lineage:
    """The attachment that a callback, or a copy of the callback in this process, made last.

    >>> import copy
    >>> from regkit.integrations.copies import Lineage
    >>> lineage = Lineage()
    >>> copy.deepcopy(lineage) is lineage
    True
    """

    def __init__(self) -> None:
        self.attachment: regkit.Attachment | None = None

    def __copy__(self) -> Lineage:
        return self

    def __deepcopy__(self, memo: object) -> Lineage:
        return self

    def __reduce__(self) -> tuple[type[Lineage], tuple[()]]:
        return Lineage, ()


def take_over(module: nn.Module, plan: regkit.Plan) -> dict[str, Any] | None:
    """Take the rules of an equal plan off a module, as a copied module brings along. Returns their state, if any."""
    present = next((one for one in regkit.attachments(module) if one.plan == plan), None)
    if present is None:
        return None
    present.detach()
    return present.state_dict()
