"""Which modules a target's globs cover, whatever a model is wrapped in."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import regkit
from regkit.plan.patterns import glob


def covered(model, module, **target):
    """The names of the modules that a target binds."""
    rule = {"target": {"role": "kernel", "layer": 0, "module": module, **target}, "penalty": "l2(1)"}
    (binding,) = regkit.resolve(model, {"rules": [rule]}).bindings
    return [site.name for site in binding.weights]


def model():
    return nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"lstm": nn.LSTM(2, 2), "deep": nn.ModuleDict({"lstm": nn.LSTM(2, 2)})}),
            "decoder": nn.GRU(2, 2),
            "decoder2": nn.Sequential(nn.Linear(2, 2), nn.RNN(2, 2)),
        }
    )


ALL = ["encoder.lstm", "encoder.deep.lstm", "decoder", "decoder2.1"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**", ALL),
        ("decoder", ["decoder"]),
        ("decoder*", ["decoder"]),
        ("*", ["decoder"]),
        ("?ecoder", ["decoder"]),
        ("*.*", ["encoder.lstm", "decoder2.1"]),
        ("encoder.*", ["encoder.lstm"]),
        ("encoder.**", ["encoder.lstm", "encoder.deep.lstm"]),
        ("**.lstm", ["encoder.lstm", "encoder.deep.lstm"]),
        ("encoder.**.lstm", ["encoder.lstm", "encoder.deep.lstm"]),
        ("**.deep.**", ["encoder.deep.lstm"]),
        ("decoder2.?", ["decoder2.1"]),
        ("*.*.*", ["encoder.deep.lstm"]),
        ("**.**", ALL),
        (["decoder", "encoder.lstm"], ["encoder.lstm", "decoder"]),
        (["**", "decoder"], ALL),
    ],
)
def test_a_pattern_covers_a_star_within_a_part_and_two_across(pattern, names):
    assert covered(model(), pattern) == names


@pytest.mark.parametrize(
    "pattern", ["ecoder", "DECODER", "decoder?", "encoder", "lstm", "decoder.1", "de[c]oder", "d.coder"]
)
def test_a_pattern_is_no_regular_expression_and_covers_whole_names(pattern):
    with pytest.raises(regkit.ResolveError, match=r"no recurrent module (is named|that)"):
        covered(model(), pattern)


def reference(pattern, name):
    """Whether parts of a pattern cover parts of a name, by recursion."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return reference(pattern[1:], name) or (bool(name) and reference(pattern, name[1:]))
    return bool(name) and part(pattern[0], name[0]) and reference(pattern[1:], name[1:])


def part(pattern, name):
    if not pattern:
        return not name
    if pattern[0] == "*":
        return part(pattern[1:], name) or (bool(name) and part(pattern, name[1:]))
    return bool(name) and pattern[0] in ("?", name[0]) and part(pattern[1:], name[1:])


@given(
    pattern=st.lists(
        st.just("**") | st.text("ab+*?", min_size=1, max_size=3).filter(lambda p: "**" not in p), min_size=1, max_size=4
    ),
    name=st.lists(st.text("ab+", min_size=1, max_size=3), max_size=4),
)
def test_patterns_mean_what_their_definition_says(pattern, name):
    assert glob(".".join(pattern))(".".join(name)) == reference(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "name"), [("**." * 40 + "x", ".".join("a" * 24)), ("*a" * 60 + "b", "a" * 60)], ids=["parts", "letters"]
)
def test_no_pattern_takes_exponential_time(pattern, name):
    """Stars are doubled one at a time, so that a slow matcher fails this test instead of never ending it."""
    start = time.process_time()
    for stars in range(1, 40):
        unit = "**." if pattern.startswith("**.") else "*a"
        assert not glob(unit * stars + pattern[-1])(name)
        assert time.process_time() - start < 2, f"{stars} stars"


def test_the_model_itself_may_be_the_recurrent_module():
    assert covered(nn.LSTM(2, 2), "**") == [""]
    with pytest.raises(regkit.ResolveError, match=r"\(the model itself\) \(LSTM\)"):
        covered(nn.LSTM(2, 2), "lstm")


class Stub(nn.Module):
    """A wrapper that holds its model under a name of the wrapper's choice."""

    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)


def test_the_prefixes_of_wrappers_do_not_matter():
    compiled = Stub("_orig_mod", model())
    parallel = nn.DataParallel(model())
    both = Stub("_orig_mod", nn.DataParallel(Stub("_orig_mod", model())))
    inner = model()
    inner["encoder"]["lstm"] = Stub("_orig_mod", inner["encoder"]["lstm"])
    for wrapped in (compiled, parallel, both, inner):
        assert covered(wrapped, "**") == ALL
        assert covered(wrapped, "encoder.lstm") == ["encoder.lstm"]
    (binding,) = regkit.resolve(both, {"rules": [{"penalty": "l2(1)", "target": {"module": "decoder"}}]}).bindings
    assert {site.path for site in binding.weights} == {"_orig_mod.module._orig_mod.decoder"}
    assert isinstance(both.get_submodule(binding.weights[0].path), nn.GRU)


def test_a_real_compiled_model_is_seen_through():
    assert covered(torch.compile(model(), backend="eager"), "encoder.*") == ["encoder.lstm"]


def test_a_wrapped_module_itself_has_no_name():
    assert covered(nn.DataParallel(nn.LSTM(2, 2)), "**") == [""]


def test_a_users_own_child_named_module_keeps_its_name():
    own = Stub("module", model())
    assert covered(own, "module.decoder") == ["module.decoder"]
    with pytest.raises(regkit.ResolveError, match=r"did you mean 'module\.decoder'"):
        covered(own, "decoder")
    assert covered(nn.DataParallel(own), "module.decoder") == ["module.decoder"]


def test_a_module_that_contains_itself_does_not_keep_one_waiting():
    loop = model()
    object.__setattr__(loop["encoder"], "unused", None)
    loop["encoder"]._modules["back"] = loop
    assert covered(loop, "decoder") == ["decoder"]
