"""Option types take plain, finite numbers within their ranges, and nothing that only looks like one."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from regkit import fields

TAKEN = {
    "Real": [-1.5, 0, 2],
    "NonNegative": [0, 0.5, 3],
    "Positive": [1e-300, 3],
    "Fraction": [0, 0.5, 1],
    "Count": [1, 2**53],
    "Index": [0, 7],
}
REFUSED = {
    "Real": [],
    "NonNegative": [-1e-9],
    "Positive": [0, -1],
    "Fraction": [-0.1, 1.1],
    "Count": [0, -1, 2.0, 2**53 + 1],
    "Index": [-1, 0.0],
}
NEVER = [True, "1", None, [1], np.float64(1), np.int64(1), Decimal(1), torch.tensor(1.0), float("nan"), float("inf")]


@pytest.mark.parametrize("name", TAKEN)
def test_a_field_takes_its_range_and_nothing_else(name):
    adapter = TypeAdapter(getattr(fields, name))
    for value in TAKEN[name]:
        assert adapter.validate_python(value) == value
    for value in (*REFUSED[name], *NEVER):
        with pytest.raises(ValidationError):
            adapter.validate_python(value)
