"""What the tests share: isolation from one another's hooks, and small models and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from installing import Install, installer
from torch import Tensor, nn

from regkit.attachment import attachment as attachment_room
from regkit.runtime import optimizer_hooks

torch.set_num_threads(1)  # the models are small: threads would only wait for one another

SLOW = {
    "test_compile",
    "test_compiled_steps",
    "test_distributed",
    "test_distributed_example",
    "test_distributed_silence",
    "test_distributed_trainers",
    "test_leaks",
    "test_lightning_resume",
    "test_shards",
    "test_transformers",
    "test_transformers_activity",
    "test_transformers_resume",
}
"""Files whose tests compile, start processes or train for long: in sum, some minutes."""


@pytest.hookimpl(tryfirst=True)  # before the marks are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def isolation() -> Iterator[None]:
    """The same random numbers for each test, and no attachment left over from the one before."""
    torch.manual_seed(0)
    yield
    for attachments in list(attachment_room._attached.values()):
        for attachment in list(attachments):
            attachment.detach()
    # For modules of models that are gone, and that no collection has reached yet:
    for listener in optimizer_hooks._listeners:
        optimizer_hooks.remove_listener(listener)
    optimizer_hooks.remove_hooks()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make a distribution with one module and an entry point for it, as an installer would leave it behind."""
    yield from installer(tmp_path, monkeypatch)


class Tagger(nn.Module):
    """A model written without regkit in mind."""

    def __init__(self, layer: type[nn.RNNBase] = nn.LSTM, **options: object) -> None:
        super().__init__()
        self.rnn = layer(3, 4, **options)
        self.head = nn.LazyLinear(2)
        self(torch.zeros(2, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


MakeModel = Callable[..., Tagger]


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
