"""The contracts of kinds: penalties, activity penalties, constraints and schedules.

A kind is mathematics: a final, frozen pydantic class whose fields are its options in the document, and whose methods
are functions of tensors. A kind holds no step counter, registers no hook and writes nothing in place; rules decide when
and where it acts. The `Literal` field `kind` names it, and the docstrings under its fields are its manual.

`values`, `add_gradients` and `project_` are list forms: the mathematics of many weights at once, which a kind may have
for speed, in operations over lists (`torch._foreach_add_`). The defaults here are loops. A kind's own list forms agree
with the loops up to rounding, which is tried when a rule is attached; they write only into the tensors that are given
for that, and never wait for a GPU: no `if` and no `float()` of a tensor's numbers, unless the tensor is on a CPU, and
neither fake nor traced. There is at least one weight; all are on one device and of one dtype; shapes may differ, and
tensors need not be contiguous. `regkit.buckets` says how much to hold at a time.
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
"""The form in which a kind sees a stacked weight: (rows, columns), each gate's (hidden, columns), or (gates, hidden,
columns). A bias comes without the columns.
"""

Separable = Literal["elements", "rows"] | None
"""The parts of a weight on which a kind can act one by one, in any order and in several processes."""

Via = Literal["gradient", "loss", "proximal", "decoupled", "inject"]
"""The way of a penalty: added to the gradient at the step, or to the loss; by the proximal operator after the step; as
a decoupled decay, as in AdamW. An activity penalty is added to the loss, or to the gradient of the outputs (inject).
"""


class Kind(BaseModel):
    """The base of all kinds: frozen options, a name, a manual.

    >>> regkit.load({"rules": [{"penalty": "l2(0.1)"}]}).rules[0].penalty.describe()
    'l2(strength=0.1)'
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    kind: str
    __reduce_ex__ = _pickled.reduce_kind

    shorthand: ClassVar[tuple[str, ...]] = ()
    """The options that `"name(1, 2)"` fills, in order."""

    @classmethod
    def kind_name(cls) -> str:
        """The name in the class' field `kind: Literal[...]`. Raises PluginError where there is no name."""
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
        """The reason why these options have no effect, or None. A rule without effect is refused."""
        return None

    @classmethod
    def examples(cls) -> Sequence[Kind]:
        """Kinds of this class with sensible options: `regkit kinds NAME` shows the first, the laws try each.

        The default is one kind, in which all options without a default are 1. Raises PluginError where that is invalid.
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
    """Whether values may be negative, as of an entropy. The laws of `regkit.testing` hold all other kinds to ≥ 0."""

    strength: NonNegative
    """What the unit value is multiplied by, times the schedule's factor. Range: ≥ 0; a rule with 0 is refused."""

    def inert(self) -> str | None:
        return "its strength is 0" if self.strength == 0 else None


class _OnWeights(Kind):
    """A kind that acts on weights."""

    @property
    def separable(self) -> Separable:
        """The parts of a weight that can be treated one by one: `elements`, `rows`, or None (Parikh & Boyd 2014, §2.1).

        A penalty is then the sum of the parts' values, with the parts' gradients and proximal points side by side; a
        constraint projects each part, and the worst part is its violation. Where several processes hold a weight in
        shards, no process needs the shards of another. No kind of `layout` "cell" has "rows".
        """
        return None

    ranks: ClassVar[tuple[int, ...]] = (1, 2)
    """The numbers of dimensions that a weight may have: 1 for biases, 2 for matrices."""

    @property
    def layout(self) -> Layout:
        """The layout in which the kind sees a stacked weight."""
        return "matrix"


class Penalty(_Strong, _OnWeights):
    """A scalar function Ω of a weight; strength × factor × Ω(w) is added to the objective.

    >>> from typing import Literal
    >>> class Cube(regkit.Penalty):
    ...     kind: Literal["cube"] = "cube"
    ...     def value(self, w):
    ...         return w.abs().pow(3).sum()
    >>> Cube(strength=0.1).gradient(torch.tensor([1.0, 2.0]))
    tensor([ 3., 12.])
    """

    @abstractmethod
    def value(self, w: Tensor) -> Tensor:
        """Ω(w) at unit strength, in float32 or better.  w: (rows, columns) or (rows,) -> ()."""

    def gradient(self, w: Tensor) -> Tensor:
        """∇Ω(w) at unit strength, of w's shape, in float32 or better; by autograd unless a kind knows a closed form.

        The strength is multiplied in before the gradient is rounded to half precision, where it might overflow.
        """
        with torch.enable_grad():
            leaf = at_least_float32(w.detach()).requires_grad_()
            (gradient,) = torch.autograd.grad(self.value(leaf), leaf)
        return gradient

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """argmin_x ½‖x − w‖² + step·Ω(x), for `"via": "proximal"`.  step: lr · strength · schedule's factor, ≥ 0."""
        raise PluginError(f"{self.kind} offers no prox")

    @property
    def offers_prox(self) -> bool:
        """Whether the kind knows its proximal operator."""
        return type(self).prox is not Penalty.prox

    def plus(self, other: Penalty) -> Penalty | None:
        """A penalty that is the sum of both, if the kind knows one, as l1_l2 for l1 and l2; else None.

        Its strength · value is the sum of the two penalties' strength · value, for every weight that this penalty is
        for, in the same `layout`. Rules on the same weights then act in one pass.
        """
        return None

    def values(self, weights: list[Tensor]) -> Tensor:
        """List form of `value`: Σ_i Ω(weights[i]) in float32 or better.  -> ().  Autograd may follow."""
        first, *others = weights
        return sum((self.value(w) for w in others), start=self.value(first))

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        """List form of `gradient`: gradients[i] += amount · ∇Ω(weights[i]), in place; weights[i] is unchanged.

        gradients[i] has the shape and dtype of weights[i]; no two overlap. Called without autograd. For half-precision
        gradients the sum is computed in float32 and rounded once, when it is added.
        """
        for w, gradient in zip(weights, gradients, strict=True):
            gradient.add_(self.gradient(w), alpha=amount)


class ActivityPenalty(_Strong):
    """A scalar function of a module's outputs; strength × factor × value is added to the loss.

    >>> penalty = regkit.load({"rules": [{"penalty": "activity_l2(0.1)"}]}).rules[0].penalty
    >>> penalty.value(regkit.Activity([regkit.activity.Sequenced(torch.full((4, 1, 2), 3.0))]))
    tensor(9.)
    """

    sequence: ClassVar[bool] = False
    """Whether the kind compares neighbours in time, and so needs a role with neighbours."""

    separable: ClassVar[bool] = False
    """Whether the kind is a sum, or mean, over single outputs or pairs of neighbours.

    The value of n outputs of one shape, side by side in the batch, is then the sum of the n values, divided by n unless
    `reduction` is `sum`; and the steps of a loop may come as one sequence.
    """

    reduction: Reduction = "mean"
    """`mean` over valid elements; `batch`: the sum divided by the batch size, as Keras ≥ 3.14; `sum`."""

    @abstractmethod
    def value(self, activity: Activity) -> Tensor:
        """The penalty at unit strength, in float32 or better.  -> ()."""

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        """gradients += amount · d value / d activity, in place, in closed form; without one, autograd follows `value`.

        gradients: the segments of the activity, with live gradients in the place of the outputs; a view of one is a
        live view of the other. amount: () on their device. Called without autograd, and never waits for a GPU.
        `activity.add_slopes` and `activity.add_pair_slopes` write most such methods.
        """
        raise PluginError(f"{self.kind} offers no add_gradients")

    @property
    def offers_gradients(self) -> bool:
        """Whether the kind knows its gradient in closed form."""
        return type(self).add_gradients is not ActivityPenalty.add_gradients


class Constraint(_OnWeights):
    """A set of allowed weights, given by the projection onto the set.

    >>> ball = regkit.load({"rules": [{"constraint": "max_norm(1)"}]}).rules[0].constraint
    >>> ball.project(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    bounds: ClassVar[tuple[str, ...]] = ()
    """The options that a schedule multiplies; none: the constraint takes no schedule."""

    @property
    def convex(self) -> bool:
        """Whether the set is convex, as a ball is and a sphere is not: the laws of `regkit.testing` then ask more."""
        return True

    @abstractmethod
    def project(self, w: Tensor) -> Tensor:
        """The nearest allowed point, in w's shape and dtype; w itself is unchanged."""

    @abstractmethod
    def violation(self, w: Tensor) -> Tensor:
        """The distance of w from the set, in the unit of the bound: 0 exactly where w is allowed.  -> ()."""

    @property
    def pooled(self) -> tuple[int, ...] | None:
        """The axes of `sums`: (1,) for norms of rows, (0,) for norms of columns, (0, 1) for the norm of a matrix.

        None where a part of a weight cannot be projected from such sums. Where several processes hold a weight in
        shards, they add up their sums, and no process needs the shards of another. A vector is a matrix of one column.
        """
        return None

    def sums(self, w: Tensor) -> Tensor:
        """The sums of w, (rows, columns), over the `pooled` axes, which stay, in float32 or better; w may be empty."""
        raise PluginError(f"{self.kind} offers no sums")

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        """`project` for a part w of a weight.  sums: of the whole weight along the pooled axes, of w along others."""
        raise PluginError(f"{self.kind} offers no sums")

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        """`violation` for a part w of at least a row and a column.  sums: as in `project_given`.  -> ()."""
        raise PluginError(f"{self.kind} offers no sums")

    def project_(self, weights: list[Tensor]) -> None:
        """List form of `project`, in place: weights become their nearest allowed points. No two weights overlap."""
        for w in weights:
            w.copy_(self.project(w))

    def at(self, factor: float) -> Constraint:
        """This constraint with its bounds multiplied by a schedule's factor, which must be > 0."""
        if factor <= 0:
            raise StepError(f"{self.kind}: a schedule took the bound to 0, which would make every weight 0")
        return self.model_copy(update={bound: getattr(self, bound) * factor for bound in self.bounds})


class Schedule(Kind):
    """A factor as a function of the number of optimizer steps.

    >>> regkit.load({"rules": [{"penalty": "l2(0.1)", "schedule": "linear(0, 1, 10)"}]}).rules[0].schedule.factor(5)
    0.5
    """

    @abstractmethod
    def factor(self, step: int) -> float:
        """The factor, ≥ 0, at an optimizer step, counted from 0."""
