"""The valid positions of a padded batch, which hold data: from lengths, or from a mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regkit.errors import StepError


class Validity(ABC):
    """The valid positions of a padded batch: the base of lengths and masks.

    >>> valid = regkit.activity.padding.Lengths.of([2, 1])
    >>> valid.of_sequence(torch.zeros(2, 2, 3), batch_first=False).squeeze(-1)
    tensor([[ True,  True],
            [ True, False]])
    """

    @abstractmethod
    def of_sequence(self, h: Tensor, batch_first: bool) -> Tensor:
        """The valid positions (time, batch, 1) of an output h: (time, batch, features)."""

    @abstractmethod
    def of_step(self, h: Tensor, step: int) -> Tensor:
        """The valid positions (batch, 1) of the step-th call of a cell, h: (batch, features)."""

    def of_pair(self, h: Tensor, step: int) -> Tensor:
        """The valid pairs (batch, 1) of the step-th call of a cell and the call before."""
        return self.of_step(h, step)  # lengths: what is data now was data before

    def following(self, before: Validity | None) -> Validity:
        """This validity for a call that follows a call under `before`."""
        return self

    def check_calls(self, calls: int, name: str) -> None:
        """Raise StepError where a cell was called too few times for the given lengths."""
        return


@dataclass(frozen=True)
class Lengths(Validity):
    """The valid length of each sequence.  lengths: (batch,)."""

    lengths: Tensor

    @classmethod
    def of(cls, lengths: Tensor | Sequence[int]) -> Lengths:
        """The `Lengths` of a user's argument. Raises ValueError unless each sequence has a whole number ≥ 0."""
        values = torch.as_tensor(lengths)
        if values.dim() > 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"lengths are whole numbers (batch,), got {values.dtype} {tuple(values.shape)}")
        if values.numel() == 0 or (values.device.type == "cpu" and int(values.min()) < 0):
            raise ValueError(f"lengths are whole numbers ≥ 0, one for each sequence, got {values.tolist()}")
        return cls(values.reshape(-1).clone())

    def _check(self, batch: int, time: int | None) -> None:
        if self.lengths.numel() != batch:
            raise StepError(f"lengths() was given {self.lengths.numel()} lengths for a batch of {batch} sequences")
        # A length on the GPU is not read back: that would make the step wait.
        if time is not None and self.lengths.device.type == "cpu" and int(self.lengths.max()) > time:
            raise StepError(f"lengths() was given a length of {int(self.lengths.max())} for {time} time steps")

    def of_sequence(self, h: Tensor, batch_first: bool) -> Tensor:
        self._check(h.size(1), h.size(0))
        lengths = self.lengths.to(h.device, non_blocking=True)
        return (torch.arange(h.size(0), device=h.device)[:, None] < lengths).unsqueeze(-1)

    def check_calls(self, calls: int, name: str) -> None:
        if self.lengths.device.type == "cpu" and int(self.lengths.max()) > calls:
            raise StepError(
                f"lengths() was given a length of {int(self.lengths.max())}, but {name} was called {calls} times; put "
                "the context around the whole loop over a cell"
            )

    def of_step(self, h: Tensor, step: int) -> Tensor:
        self._check(h.size(0), None)
        return (self.lengths.to(h.device, non_blocking=True) > step).unsqueeze(-1)


@dataclass(frozen=True)
class Mask(Validity):
    """A mask that is true where there is data.

    mask: (time, batch), or batch first if the module is; (batch,) around one call of a cell.
    before: the mask of the cell's call before.
    """

    mask: Tensor
    before: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor) -> Mask:
        """The `Mask` of a user's argument. Raises ValueError unless the tensor is boolean."""
        if mask.dtype != torch.bool:
            raise ValueError(f"a mask is a bool tensor, got {mask.dtype}")
        return cls(mask.clone())

    def following(self, before: Validity | None) -> Validity:
        return replace(self, before=before.mask) if isinstance(before, Mask) else self

    def of_pair(self, h: Tensor, step: int) -> Tensor:
        valid = self.of_step(h, step)
        return valid if self.before is None else valid & replace(self, mask=self.before).of_step(h, step)

    def of_sequence(self, h: Tensor, batch_first: bool) -> Tensor:
        time, batch = h.shape[:2]
        expected = (batch, time) if batch_first else (time, batch)
        if self.mask.shape not in {expected, (time,) if batch == 1 else expected}:
            raise StepError(f"mask() was given {tuple(self.mask.shape)} for an output of {expected}")
        mask = self.mask.to(h.device, non_blocking=True)
        if mask.dim() == 1:
            mask = mask[:, None]
        elif batch_first:
            mask = mask.T
        return mask.unsqueeze(-1)

    def of_step(self, h: Tensor, step: int) -> Tensor:
        if self.mask.shape != (h.size(0),):
            raise StepError(
                f"mask() was given {tuple(self.mask.shape)} around a cell's call of batch {h.size(0)}; "
                "give (batch,) around each call, or lengths() around the loop"
            )
        return self.mask.to(h.device, non_blocking=True).unsqueeze(-1)
