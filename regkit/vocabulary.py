"""Words of other libraries and of papers, with the words that a document has for the same."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

_DECAY: Final = "an optimizer's weight_decay of c is l2(c/2): torch adds c·w to the gradient, and l2(s) adds 2s·w"
_NOISE: Final = "noise is no penalty and no constraint; give dropout to the module, as in nn.LSTM(dropout=0.5)"
_KERAS_ORTHOGONAL: Final = "Keras' OrthogonalRegularizer is cosine_orthogonal (orthogonal is another formula)"

_KINDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("weightdecay", "wd", "decay", "adamw"), _DECAY),
    **dict.fromkeys(("ridge", "tikhonov", "frobenius", "squared"), "the sum of squares is l2"),
    **dict.fromkeys(("lasso", "sparsity", "sparse"), "the sum of absolute values is l1"),
    **dict.fromkeys(("elasticnet",), "l1_l2 has both, as l1_l2(1, 1e-5, 1e-4)"),
    **dict.fromkeys(
        ("ar", "activationregularization"), "activation regularization (AR, Merity et al. 2017) is activity_l2"
    ),
    **dict.fromkeys(
        ("tar", "temporalactivationregularization", "slowness"),
        "temporal activation regularization (TAR, Merity et al. 2017) is temporal",
    ),
    **dict.fromkeys(("orthogonalregularizer", "orthogonalregularization"), _KERAS_ORTHOGONAL),
    **dict.fromkeys(("softorthogonal", "softorthogonality", "orthogonality"), "soft orthogonality is orthogonal"),
    **dict.fromkeys(("normclipping", "normconstraint", "weightclipping"), "a bound on norms is max_norm"),
    **dict.fromkeys(("normalize", "normalized", "weightnorm"), "norms of 1 are unit_norm"),
    **dict.fromkeys(("nonneg", "positive"), "weights from 0 up are non_negative"),
    **dict.fromkeys(
        ("dropout", "recurrentdropout", "variationaldropout", "lockeddropout", "weightdrop", "dropconnect", "zoneout"),
        _NOISE,
    ),
    **dict.fromkeys(
        ("clip", "clipnorm", "clipvalue", "gradientclipping", "clipgradnorm"),
        "gradients are clipped by torch.nn.utils.clip_grad_norm_; a bound on the norms of weights is max_norm",
    ),
}

_IN_LAYERS: Final = "Keras' names stand in `layers`: "

_KEYS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("wregularizer", "weightregularizer", "inputregularizer"), f"{_IN_LAYERS}kernel_regularizer"),
    **dict.fromkeys(("uregularizer", "hiddenregularizer"), f"{_IN_LAYERS}recurrent_regularizer"),
    "bregularizer": f"{_IN_LAYERS}bias_regularizer",
    "wconstraint": f"{_IN_LAYERS}kernel_constraint",
    "uconstraint": f"{_IN_LAYERS}recurrent_constraint",
    "bconstraint": f"{_IN_LAYERS}bias_constraint",
    **dict.fromkeys(("weightdecay", "wd"), _DECAY),
    **dict.fromkeys(("dropout", "recurrentdropout"), _NOISE),
    "regularizer": "a rule has a `penalty` or a `constraint`",
    "regularizers": "regularizers stand in `rules`, or under Keras' names in `layers`",
    "penalties": "each rule of `rules` has one `penalty`",
    "constraints": "each rule of `rules` has one `constraint`",
}
"""The words for keys that are foreign wherever they stand."""

_KEYS_BESIDE: Final[Mapping[tuple[str, ...], tuple[str, Collection[str]]]] = {
    ("per",): (
        'over which weights a norm is taken is `per`: Keras\' axis=0 is per="unit" here, and axis=1 per="input"',
        ("axis",),
    ),
    ("strength", "penalty"): (
        "the factor of a penalty is its `strength`",
        ("lambda", "lambd", "alpha", "beta", "coef", "coefficient", "factor", "weight", "penaltyweight", "lam"),
    ),
    ("max_value",): ("the upper bound of norms is `max_value`", ("max", "maxnorm", "c", "bound", "clip")),
    ("schedule",): ("a factor over steps is a `schedule`", ("scheduler", "warmup", "annealing")),
    ("module", "target"): (
        "modules are named by `module` of `target`",
        ("modules", "modulename", "path", "parameter", "parameters", "param"),
    ),
    ("role", "target"): ("weights are named by `role` of `target`", ("roles", "weights", "weight", "type")),
}
"""The words for keys of one place: each sentence is told where one of its keys may stand."""

_ROLES: Final[Mapping[str, str]] = {
    "recurrentkernel": "Keras' recurrent_kernel is the role recurrent",
    **dict.fromkeys(
        ("weightih", "ih", "w", "input", "inputweights", "wih", "inputtohidden"), "input weights are the role kernel"
    ),
    **dict.fromkeys(
        ("weighthh", "hh", "u", "hidden", "whh", "hiddentohidden", "transition"),
        "hidden-to-hidden weights are the role recurrent",
    ),
    **dict.fromkeys(("biasih", "biashh", "b", "biases"), "both of torch's biases are the role bias"),
    **dict.fromkeys(("weighthr", "proj", "hr"), "the weight of a projection is the role projection"),
    **dict.fromkeys(
        ("all", "weights", "weight", "every", "any", "*"), "without `role` a penalty is about every weight"
    ),
    **dict.fromkeys(
        ("h", "hn", "hiddenstate", "hiddenstates"), "the hidden state that a module hands on is the role state"
    ),
    **dict.fromkeys(("cn", "cellstate", "memory"), "the cell state of an LSTM is the role cell"),
    **dict.fromkeys(("activity", "activation", "activations", "y"), "the sequence of outputs is the role output"),
}

_GATES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("candidate", "htilde"), "the candidate is the gate cell of an LSTM, and new of a GRU"),
    **dict.fromkeys(("modulation", "memory", "ctilde"), "the candidate of an LSTM is its gate cell"),
}

_DIRECTIONS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("both", "bidirectional", "any", "all"), "without `direction` both are meant"),
    **dict.fromkeys(("fw", "ltr", "left"), "left to right is forward"),
    **dict.fromkeys(("bw", "rtl", "right"), "right to left is backward"),
}

_TABLES: Final[Mapping[str, Mapping[str, str]]] = {
    **dict.fromkeys(("penalty", "activity penalty", "constraint", "kind"), _KINDS),
    "key": _KEYS,
    "role": _ROLES,
    "gate": _GATES,
    "direction": _DIRECTIONS,
}

_GATES_OF_OTHERS: Final[Mapping[tuple[str, str], str]] = {
    ("GRU", "forget"): "a GRU has no forget gate: its update gate z keeps the state, h = (1 − z)·n + z·h",
    ("GRU", "input"): "a GRU has no input gate: what is new comes with 1 − z, of its update gate",
    ("GRU", "output"): "a GRU has no output gate: its state is its output",
    ("GRU", "cell"): "a GRU has no cell: its candidate is the gate new",
    ("LSTM", "update"): "an LSTM has no update gate: its input and forget gates do that work",
    ("LSTM", "reset"): "an LSTM has no reset gate: its forget gate clears the cell",
    ("LSTM", "new"): "the candidate of an LSTM is its gate cell",
}

_PARAMETER: Final = re.compile(
    r"(?:(?P<module>[\w.]+)\.)?(?P<of>weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)(?:_l(?P<layer>\d+))?(?P<back>_reverse)?"
)
_ROLE_OF: Final = {"weight_ih": "kernel", "weight_hh": "recurrent", "weight_hr": "projection"}


def in_these_words(place: str, word: str, known: Collection[str] | None = None) -> str | None:
    """The sentence that says a foreign word in the words of a document; None for a word that is not known.

    place: `penalty`, `constraint`, `schedule`, `key`, `role`, `gate`, `direction` or `module`.
    known: the names that may stand there, if that is known: no sentence on a key leads to one that may not.

    >>> in_these_words("role", "weight_hh_l0")
    "torch's weight_hh_l0 is role recurrent, layer 0"
    """
    if place in ("role", "module", "key") and (match := _PARAMETER.fullmatch(word)):
        return _of_parameter(word.rpartition(".")[2], match)
    plain = _plain(word)
    for keys, (sentence, words) in _KEYS_BESIDE.items() if place == "key" else ():
        if plain in words and (known is None or any(key in known for key in keys)):
            return sentence
    return _TABLES.get(place, {}).get(plain)


def _plain(word: str) -> str:
    return re.sub(r"[_\s\-]", "", word.casefold())


def _of_parameter(name: str, match: re.Match[str]) -> str:
    parts = [f"role {_ROLE_OF.get(match['of'], 'bias')}"]
    if match["module"]:
        parts.insert(0, f"module {match['module']}")
    if match["layer"]:
        parts.append(f"layer {match['layer']}")
    if match["back"]:
        parts.append("direction backward")
    return f"torch's {name} is {', '.join(parts)}"


def missing_gate(module_class: str, gate: str) -> str | None:
    """The sentence on a gate that another class of modules has; None where nothing is known."""
    family = next((one for one in ("GRU", "LSTM") if one in module_class), "")
    return _GATES_OF_OTHERS.get((family, gate))


_AXIS: Final[Mapping[str, tuple[str, Any]]] = {"axis": ("per", 0)}
_KERAS: Final[Mapping[str, tuple[str, Mapping[str, tuple[str, Any]]]]] = {
    "l1": ("l1", {"l1": ("strength", 0.01)}),
    "l2": ("l2", {"l2": ("strength", 0.01)}),
    "l1l2": ("l1_l2", {"l1": ("l1", 0.0), "l2": ("l2", 0.0)}),
    "orthogonalregularizer": ("cosine_orthogonal", {"factor": ("strength", 0.01), "mode": ("mode", "rows")}),
    "maxnorm": ("max_norm", {"max_value": ("max_value", 2), **_AXIS}),
    "minmaxnorm": (
        "min_max_norm",
        {"min_value": ("min_value", 0.0), "max_value": ("max_value", 1.0), "rate": ("rate", 1.0), **_AXIS},
    ),
    "unitnorm": ("unit_norm", _AXIS),
    "nonneg": ("non_negative", {}),
}
"""The kind of each class of Keras, and for each key of its config the option here and Keras' own default."""

_MODE: Final = {"rows": "columns", "columns": "rows"}


def from_keras(class_name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The kind, as an object, of a class name and a config of Keras, for a matrix; None where no kind is the like.

    Keras' kernel is the transpose of a torch weight: its axis 0 runs over inputs, and its rows are columns here.
    What the config leaves out is as Keras has it, for defaults here may be others.

    >>> from_keras("MaxNorm", {"max_value": 3})
    {'kind': 'max_norm', 'max_value': 3, 'per': 'unit'}
    """
    kind, keys = _KERAS.get(_plain(class_name), ("", {}))
    made: dict[str, Any] = {"kind": kind}
    for key, (option, default) in keys.items():
        value = config.get(key, default)
        if key == "axis":
            value = _per(value)
        elif key == "mode":
            value = _MODE.get(value) if isinstance(value, str) else None
        if value is None:
            return None
        made[option] = value
    return made if kind and config.keys() <= keys.keys() else None


def _per(axis: Any) -> str | None:
    """The groups of weights that a norm along an axis, or axes, of Keras' kernel is taken over; None for no axis."""
    axes = axis if isinstance(axis, list) else [axis]
    if axis is None:
        return "matrix"
    if not axes or any(type(one) is not int or not -2 <= one < 2 for one in axes):
        return None
    return {(0,): "unit", (1,): "input"}.get(tuple({one % 2 for one in axes}), "matrix")
