"""What the tests share: isolation from one another's hooks, and small models and data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from regkit.attachment import attachment as attachment_room
from regkit.runtime import optimizer_hooks
from tests.support.models import MakeModel, Tagger
from tests.support.plugins.installing import Install, installer

torch.set_num_threads(1)  # the models are small: threads would only wait for one another


@pytest.fixture(autouse=True)
def isolation() -> Iterator[None]:
    """The same random numbers for each test, and no attachment left over from the one before."""
    torch.manual_seed(0)
    yield
    for attachment in list(attachment_room._attached):
        attachment.detach()
    # For modules of models that are gone, and that no collection has reached yet:
    for listener in optimizer_hooks._listeners:
        optimizer_hooks.remove_listener(listener)
    optimizer_hooks.remove_hooks()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make a distribution with one module and an entry point for it, as an installer would leave it behind."""
    yield from installer(tmp_path, monkeypatch)


@pytest.fixture
def make_model() -> MakeModel:
    """A maker of equal models in float64: the same weights at every call."""

    def make(layer: type[nn.RNNBase] = nn.LSTM, **options: object) -> Tagger:
        torch.manual_seed(1)
        return Tagger(layer, **options).double()

    return make


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    """A few batches of sequences, (time, batch, features), with targets."""
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(5, 6, 3, generator=generator, dtype=torch.float64),
            torch.randn(5, 6, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(4)
    ]
