"""What a kind is: the contracts of penalties, activity penalties, constraints and schedules.

A kind is mathematics. It is a final, frozen pydantic class: its fields are its options in the document, its methods are
functions of tensors. It holds no step counter, registers no hook and writes nothing in place; when and where it acts is
decided elsewhere. It names itself with a `Literal` field `kind`, and the docstrings under its fields are its manual.

`values`, `add_gradients` and `project_` are list forms: the same mathematics of many weights at once, which a kind may
have for speed, in operations over lists (`torch._foreach_add_`). Unless a kind has its own they are loops, as written
here. Its own agree with the loops up to rounding, which is tried when a rule is attached; they write only into what
they are given to write into, and never wait for a GPU: no `if` and no `float()` of what a tensor holds, unless that is
on a CPU, and neither fake nor traced. `regkit.buckets` says how much to hold at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from regkit import _pickled
from regkit.activity import Activity, Reduction, at_least_float32
from regkit.errors import PluginError, StepError
from regkit.fields import NonNegative

Layout = Literal["matrix", "gate", "cell"]
"""How a stacked weight is shown to a kind: whole, one gate at a time, or as (gates, hidden, columns)."""


Separable = Literal["elements", "rows"] | None
"""The parts of a weight on which a kind can act one by one, and so in any order and in several processes."""

Via = Literal["gradient", "loss", "proximal", "decoupled", "inject"]
"""How a weight penalty reaches the weight: added to its gradient at the step; added to the loss; by its proximal
operator after the step; or as a decoupled decay, as AdamW's. An activity penalty is added to the loss, or injected into
the gradient of the outputs.
"""


class Kind(BaseModel):
    """What all kinds share: frozen options, a name, a manual."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    kind: str
    __reduce_ex__ = _pickled.reduce_kind

    shorthand: ClassVar[tuple[str, ...]] = ()
    """The options that `"name(1, 2)"` fills, in order."""

    @classmethod
    def kind_name(cls) -> str:
        """The name that the class' `kind: Literal[...]` gives it. Raises PluginError where there is none."""
        names = get_args(cls.model_fields["kind"].annotation)
        if len(names) != 1 or not isinstance(names[0], str):
            raise PluginError(f"{cls.__module__}.{cls.__qualname__} needs a field `kind: Literal['its_name']`")
        return names[0]

    @model_validator(mode="before")
    @classmethod
    def _name_itself(cls, options: Any) -> Any:
        """Let Python code leave out the name that the class already says: `L2(strength=1e-4)`."""
        return {"kind": cls.kind_name(), **options} if isinstance(options, dict) else options

    def inert(self) -> str | None:
        """Why these options have no effect at all, or None where they have one. A rule with none is refused."""
        return None

    @classmethod
    def examples(cls) -> Sequence[Kind]:
        """Kinds of this class with options that make sense: `regkit kinds NAME` shows the first, the laws of
        `regkit.testing` try each.

        Unless a class says otherwise: one, whose options without a default are all 1. Raises PluginError where that
        is no valid kind.
        """
        needed = [name for name, option in cls.model_fields.items() if name != "kind" and option.is_required()]
        try:
            return (cls.model_validate(dict.fromkeys(needed, 1)),)
        except ValidationError as error:
            raise PluginError(
                f"{cls.__module__}.{cls.__qualname__} needs a classmethod `examples`, which returns kinds with options "
                f"that make sense: {', '.join(needed)} cannot be 1"
            ) from error

    def describe(self) -> str:
        """The kind and its options on one line: `l2(strength=0.0001)`."""
        options = self.model_dump(exclude={"kind"}, exclude_none=True)
        return f"{self.kind}({', '.join(f'{key}={value}' for key, value in options.items())})"


class _Strong(Kind):
    """A kind with a strength."""

    shorthand: ClassVar[tuple[str, ...]] = ("strength",)

    signed: ClassVar[bool] = False
    """Whether its value may be negative, as an entropy is. The laws of `regkit.testing` hold any other to ≥ 0."""

    strength: NonNegative
    """What the unit value is multiplied by, times the schedule's factor. Range: ≥ 0; a rule with 0 is refused."""

    def inert(self) -> str | None:
        """A strength of zero optimizes nothing."""
        return "its strength is 0" if self.strength == 0 else None


class _OnWeights(Kind):
    """A kind that acts on weights."""

    @property
    def separable(self) -> Separable:
        """The parts of a weight to which the kind can be applied one by one: its `elements`, its `rows`, or None where
        the kind has to see the whole (separable functions: Parikh & Boyd 2014, §2.1).

        A penalty is then the sum of its values of the parts, its gradient and proximal operator are those of the parts
        side by side; a constraint projects each part, and is violated as much as the worst of them. Where several
        processes hold a weight in shards, no process needs those of another. No kind of `layout` "cell" has "rows".
        """
        return None

    ranks: ClassVar[tuple[int, ...]] = (1, 2)
    """The numbers of dimensions it is defined for: 1 for biases, 2 for matrices."""

    @property
    def layout(self) -> Layout:
        """How it wants a stacked weight: `matrix` (rows, columns), `gate` (hidden, columns) for each gate, or `cell`
        (gates, hidden, columns). A bias comes without the columns.
        """
        return "matrix"


class Penalty(_Strong, _OnWeights):
    """A scalar function Ω of a weight; strength × factor × Ω(w) is what is optimized."""

    @abstractmethod
    def value(self, w: Tensor) -> Tensor:
        """Ω(w) at unit strength, in float32 or better.  w: (rows, columns) or (rows,) -> ()."""

    def gradient(self, w: Tensor) -> Tensor:
        """∇Ω(w) at unit strength, of w's shape, in float32 or better; by autograd unless a kind knows a closed form.

        It is multiplied by the strength before it meets a half-precision gradient: what overflows there at unit
        strength may fit once it is scaled.
        """
        with torch.enable_grad():
            leaf = at_least_float32(w.detach()).requires_grad_()
            (gradient,) = torch.autograd.grad(self.value(leaf), leaf)
        return gradient

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """argmin_x ½‖x − w‖² + step·Ω(x), where the kind knows it; `"via": "proximal"` needs it.

        step: the learning rate times strength times the schedule's factor, ≥ 0.
        """
        raise PluginError(f"{self.kind} offers no prox")

    @property
    def offers_prox(self) -> bool:
        """Whether the kind knows its proximal operator."""
        return type(self).prox is not Penalty.prox

    def plus(self, other: Penalty) -> Penalty | None:
        """A penalty that is the sum of both, where the kind knows one: of l1 and l2 it is l1_l2.

        Its strength times its value is strength · value of this one and of the other added up, for every weight that
        this one is for, in the same `layout`. Rules on the same weights then act in one pass.
        """
        return None

    def values(self, weights: list[Tensor]) -> Tensor:
        """List form of `value`: Σ_i Ω(weights[i]) at unit strength, in float32 or better. Autograd may follow.  -> ().

        There is at least one weight. All are on one device and of one dtype; their shapes may differ.
        """
        first, *others = weights
        return sum((self.value(w) for w in others), start=self.value(first))

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        """List form of `gradient`: gradients[i] += amount · ∇Ω(weights[i]), in place; weights[i] is left as it is.

        There is at least one weight. All are on one device and of one dtype; their shapes may differ, and they need not
        be contiguous. gradients[i] has the shape and dtype of weights[i]; no two overlap. It is called without
        autograd. What meets a half-precision gradient is computed in float32 and rounded once, when it is added.
        """
        for w, gradient in zip(weights, gradients, strict=True):
            gradient.add_(self.gradient(w), alpha=amount)


class ActivityPenalty(_Strong):
    """A scalar function of what a module put out; strength × factor × value is added to the loss."""

    sequence: ClassVar[bool] = False
    """Whether it compares neighbours in time, and so needs a role that has them."""

    separable: ClassVar[bool] = False
    """Whether the kind is a sum, or mean, over single outputs or pairs of neighbours.

    Of n outputs of one shape, side by side in the batch, it is then the sum of theirs, divided by n unless `reduction`
    is `sum`; and the steps of a loop may come as one sequence.
    """

    reduction: Reduction = "mean"
    """`mean` over valid elements; `batch`: the sum divided by the batch size, as Keras ≥ 3.14; `sum`."""

    @abstractmethod
    def value(self, activity: Activity) -> Tensor:
        """The penalty at unit strength, in float32 or better.  -> ()."""

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        """gradients += amount · d value / d activity, in place, where the kind knows a closed form; else autograd does
        it, and holds what `value` makes on the way until the backward pass.

        gradients: the segments of the activity, with live gradients in the place of the outputs; a view of one is a
        live view of the other. amount: () on their device. It is called without autograd, and never waits for a GPU.
        `activity.add_slopes` and `activity.add_pair_slopes` write most of them.
        """
        raise PluginError(f"{self.kind} offers no add_gradients")

    @property
    def offers_gradients(self) -> bool:
        """Whether the kind knows its gradient in closed form."""
        return type(self).add_gradients is not ActivityPenalty.add_gradients


class Constraint(_OnWeights):
    """A set of allowed weights, given by the nearest point in it."""

    bounds: ClassVar[tuple[str, ...]] = ()
    """The options that a schedule multiplies; none: the constraint takes no schedule."""

    @property
    def convex(self) -> bool:
        """Whether the set holds the straight line between any two of its points, as a ball does and a sphere does not:
        the laws of `regkit.testing` then ask more of the projection.
        """
        return True

    @abstractmethod
    def project(self, w: Tensor) -> Tensor:
        """The nearest allowed point, in w's shape and dtype; w itself is left as it is."""

    @abstractmethod
    def violation(self, w: Tensor) -> Tensor:
        """How far outside w is, in the unit of the bound: 0 exactly where it is allowed.  -> ()."""

    @property
    def pooled(self) -> tuple[int, ...] | None:
        """The axes over which `sums` sums: (1,) for the norms of rows, (0,) for those of columns, (0, 1) for that of a
        matrix. None where sums do not say all that the numbers of a weight have to know of one another.

        Where several processes hold a weight in shards, they add up their sums, and none needs the shards of another.
        A vector is a matrix of one column.
        """
        return None

    def sums(self, w: Tensor) -> Tensor:
        """The sums over the `pooled` axes, in float32 or better.  w: (rows, columns) -> (rows, columns), with 1 in the
        place of each axis that is summed over; it may be a part of a weight, and even have no row or no column.
        """
        raise PluginError(f"{self.kind} offers no sums")

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        """`project` for a part w of a weight.

        sums: as of `sums`, of the whole weight along the pooled axes, and of the part along others.
        """
        raise PluginError(f"{self.kind} offers no sums")

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        """`violation` for a part w of a weight, with a row and a column at least.  sums: as `project_given`'s -> ()."""
        raise PluginError(f"{self.kind} offers no sums")

    def project_(self, weights: list[Tensor]) -> None:
        """List form of `project`, in place: each weight becomes its nearest allowed point and stays the tensor it is.

        There is at least one weight. All are on one device and of one dtype; their shapes may differ, and they need not
        be contiguous. No two overlap. It is called without autograd.
        """
        for w in weights:
            w.copy_(self.project(w))

    def at(self, factor: float) -> Constraint:
        """The same constraint with its bounds multiplied by a schedule's factor, which must be > 0."""
        if factor <= 0:
            raise StepError(f"{self.kind}: a schedule took the bound to 0, which would make every weight 0")
        return self.model_copy(update={bound: getattr(self, bound) * factor for bound in self.bounds})


class Schedule(Kind):
    """A factor as a function of the optimizer-step count."""

    @abstractmethod
    def factor(self, step: int) -> float:
        """The factor, ≥ 0, at the step-th optimizer step, counted from 0."""
