"""Compiling a function as one graph, apart from whatever else is compiled."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from itertools import count
from typing import Final

import torch
from torch import Tensor

from regkit.testing.laws import hold
from regkit.testing.samples.tensors import difference

_NUMBERS: Final = count()


def can_compile(_: object) -> bool:
    """Whether torch.compile works with this version of Python."""
    from torch._dynamo.eval_frame import is_dynamo_supported  # here: it takes a second to import

    return is_dynamo_supported()


def compiles(function: Callable[..., Tensor], arguments: Sequence[Tensor], name: str) -> None:
    """Raise Broken unless torch.compile makes one graph of a function, that computes the same."""

    def apart(*tensors: Tensor) -> Tensor:
        return function(*tensors)

    # What torch.compile has made is kept with the code; its own keeps this apart, and has no limit of recompilations.
    code = apart.__code__.replace(co_name=f"apart_{next(_NUMBERS)}")
    alone = types.FunctionType(code, apart.__globals__, code.co_name, None, apart.__closure__)
    try:
        result = torch.compile(alone, backend="eager", fullgraph=True)(*arguments)
    except Exception as error:  # whatever the compiler meets
        reason, _, place = " ".join(str(error).split()).partition("from user code: ")
        hold(False, f"{name} does not compile as one graph: {reason[:200]} … at {place[-400:] or 'no known line'}")
    off = difference(result, function(*arguments))
    hold(off < 1e-9, f"compiled, {name} is off by {off:.3g} times its size")
