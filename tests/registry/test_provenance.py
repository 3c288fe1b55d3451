"""Where kinds come from: known of each, saved with a document, compared and kept when it is loaded elsewhere."""

from __future__ import annotations

import inspect
import json
import pickle
from typing import Literal

import pytest
from torch import nn

import regkit
from regkit import Registry, SpecError
from regkit.document.context import MissingKind
from tests.support.plugins.installing import PLUGIN

NUCLEAR = PLUGIN.format(name="nuclear", title="Nuclear")
RULES = {"rules": [{"penalty": "nuclear(1)"}, {"penalty": "l2(1)"}]}


def saved(**provenance: tuple[str, str | None]) -> dict[str, object]:
    """The rules as they would have been saved elsewhere."""
    return {**RULES, "provenance": {name: {"distribution": d, "version": v} for name, (d, v) in provenance.items()}}


def test_a_kind_knows_its_distribution_version_module_file_and_line(install, tmp_path):
    install("regkit-low-rank", "1.2", "low_rank", NUCLEAR)
    entry = Registry().find("nuclear")
    assert str(entry.origin) == "regkit-low-rank 1.2"
    assert entry.origin.point == "low_rank"
    assert (entry.kind.__module__, entry.file) == ("low_rank", str(tmp_path / "low_rank.py"))
    assert (tmp_path / "low_rank.py").read_text().splitlines()[entry.line - 1] == "class Nuclear(regkit.Penalty):"
    for one in Registry().entries():
        assert inspect.getsource(one.kind).startswith(("class ", "@final"))
        assert one.file.endswith(".py")


def test_a_kind_that_was_typed_in_has_no_file_and_no_line():
    namespace = {"__name__": "__main__"}
    code = compile(NUCLEAR, "<stdin>", "exec", dont_inherit=True)
    exec(code, namespace)
    registry = Registry([namespace["Nuclear"]])
    assert (registry.find("nuclear").file, registry.find("nuclear").line) == (None, None)


def test_a_missing_plugin_is_named_with_the_version_that_the_document_was_saved_with():
    with pytest.raises(
        SpecError, match=r"saved with it from regkit-low-rank 1\.2; try: pip install regkit-low-rank==1"
    ):
        regkit.load(saved(nuclear=("regkit-low-rank", "1.2")))


def test_a_module_that_had_the_kind_is_named_but_no_distribution_of_its_name_is_recommended():
    with pytest.raises(SpecError, match=r"saved with it from train") as caught:
        regkit.load(saved(nuclear=("train", None)))
    assert "pip install" not in str(caught.value)


def test_a_newer_version_without_the_kind_is_named_too(install):
    install("regkit-low-rank", "2.0", "low_rank", PLUGIN.format(name="other", title="Other"))
    message = r"from regkit-low-rank 1\.2; regkit-low-rank 2\.0 is installed, which has it not; try: pip install"
    with pytest.raises(SpecError, match=message):
        regkit.load(saved(nuclear=("regkit-low-rank", "1.2")), registry=Registry())


def test_strict_compares_versions(install):
    install("regkit-low-rank", "1.2", "low_rank", NUCLEAR)
    registry = Registry()
    spec = regkit.load(RULES, registry=registry)
    assert regkit.load(spec.to_json(registry), registry=registry, strict=True) == spec
    older = saved(nuclear=("regkit-low-rank", "1.1"), l2=("torch-regkit", regkit.__version__))
    assert regkit.load(older, registry=registry) == spec
    with pytest.raises(SpecError) as caught:
        regkit.load(older, registry=registry, strict=True)
    (problem,) = caught.value.problems
    assert problem.where == "/provenance/nuclear"
    assert "saved from regkit-low-rank 1.1; installed is regkit-low-rank 1.2" in problem.message


def test_strict_wants_every_kind_to_have_a_provenance(install):
    install("regkit-low-rank", "1.2", "low_rank", NUCLEAR)
    with pytest.raises(SpecError) as caught:
        regkit.load(saved(nuclear=("regkit-low-rank", "1.2")), registry=Registry(), strict=True)
    (problem,) = caught.value.problems
    assert "does not say where 'l2' comes from" in problem.message


def test_another_distributions_kind_of_the_same_name_is_another_kind(install):
    install("somebody-elses", "1.2", "somebody_elses", NUCLEAR)
    registry = Registry()
    with pytest.raises(SpecError, match=r"saved from regkit-low-rank 1\.2; here it is another kind, of somebody-elses"):
        regkit.load(saved(nuclear=("regkit-low-rank", "1.2")), registry=registry)
    # A class that is tried out in a notebook, and published later, is not: it had no version to compare.
    assert regkit.load(saved(nuclear=("__main__", None)), registry=registry).rules
    with pytest.raises(SpecError, match="strict"):
        regkit.load(saved(nuclear=("__main__", None), l2=("torch-regkit", "0.1.0")), registry=registry, strict=True)


FOREIGN = {
    "version": 1,
    "provenance": {
        "l2": {"distribution": "torch-regkit", "version": regkit.__version__},
        "nuclear": {"distribution": "regkit-low-rank", "version": "1.2"},
    },
    "rules": [
        {
            "name": "theirs",
            "target": {"role": "memory", "gate": "erase"},
            "penalty": {"kind": "nuclear", "rank": [3, 4]},
        },
        {"penalty": "nuclear(1, deep=yes)", "via": "proximal"},
        {"penalty": {"nuclear": {"a": {"b": None}}}},
        {"constraint": {"kind": "box"}, "schedule": "saw(3)", "every": 3},
        {"penalty": {"kind": "l2", "strength": 0.5}, "schedule": {"kind": "saw", "teeth": 3}},
    ],
}


def test_a_tool_may_keep_foreign_rules_and_save_them_untouched():
    spec = regkit.load(FOREIGN, unknown="keep")
    assert json.loads(spec.to_json()) == FOREIGN
    again = regkit.load(spec.to_json(), unknown="keep")
    assert again.to_json() == spec.to_json()
    assert again == spec
    assert pickle.loads(pickle.dumps(spec)).to_json() == spec.to_json()
    assert [isinstance(rule.kind, MissingKind) for rule in spec.rules] == [True, True, True, True, False]


def test_a_tool_may_edit_the_rules_around_a_foreign_one(install):
    spec = regkit.load(FOREIGN, unknown="keep")
    fewer = spec.model_copy(update={"rules": (spec.rules[0], regkit.Rule(penalty="l1(2)"))})
    written = json.loads(fewer.to_json())
    assert written["rules"] == [FOREIGN["rules"][0], {"penalty": {"kind": "l1", "strength": 2.0}}]
    assert set(written["provenance"]) == {"l1", "nuclear"}


def test_layers_may_have_foreign_kinds_too():
    spec = regkit.load({"layers": [{"module": "rnn", "kernel_regularizer": "nuclear(1)"}]}, unknown="keep")
    (rule,) = json.loads(spec.to_json())["rules"]
    assert rule["penalty"] == "nuclear(1)"
    assert rule["target"] == {"module": "rnn", "role": "kernel"}


def test_what_is_kept_cannot_be_used():
    with pytest.raises(regkit.ResolveError) as caught:
        regkit.resolve(nn.LSTM(2, 3), regkit.load(FOREIGN, unknown="keep"))
    problems = {problem.where: problem.message for problem in caught.value.problems}
    assert set(problems) == {"theirs", "rules/1", "rules/2", "rules/3", "rules/4"}
    assert "pip install regkit-low-rank==1.2" in problems["theirs"]
    assert "unknown schedule 'saw'" in problems["rules/4"]
    with pytest.raises(regkit.ResolveError):
        regkit.attach(nn.LSTM(2, 3), regkit.load(FOREIGN, unknown="keep"))


def test_keeping_forgives_nothing_but_foreign_names():
    for wrong in (
        {"penalty": {"kind": "l2", "strengt": 1}},
        {"penalty": 3},
        {"penalty": "l2("},
        {"penalti": "nuclear(1)"},
    ):
        with pytest.raises(SpecError):
            regkit.load({"rules": [wrong]}, unknown="keep")
    with pytest.raises(ValueError, match="'error' or 'keep', not 'ignore'"):
        regkit.load(RULES, unknown="ignore")


def test_a_kept_document_is_usable_once_its_plugin_is_there(install):
    text = regkit.load(RULES, unknown="keep").to_json()
    install("regkit-low-rank", "1.2", "low_rank", NUCLEAR)
    registry = Registry()
    assert regkit.load(text, registry=registry) == regkit.load(RULES, registry=registry)


def test_strict_needs_the_document_and_not_a_spec_that_has_forgotten_where_it_is_from():
    with pytest.raises(ValueError, match="a Spec does not say"):
        regkit.load(regkit.load({"rules": [{"penalty": "l2(1)"}]}), strict=True)


def test_what_could_not_be_saved_untouched_is_not_kept():
    for rank in ("NaN", "1e999", r'"\ud800"'):
        text = f'{{"rules": [{{"penalty": {{"kind": "nuclear", "rank": [{rank}]}}}}]}}'
        with pytest.raises(SpecError, match="could not be saved as it is"):
            regkit.load(text, unknown="keep")


def test_what_is_kept_is_a_copy_and_can_be_hashed():
    document = {"rules": [{"penalty": {"kind": "nuclear", "rank": [3]}}]}
    spec, again = (regkit.load(document, unknown="keep") for _ in range(2))
    assert len({spec, again, regkit.load(RULES, unknown="keep")}) == 2
    document["rules"][0]["penalty"]["rank"].append(4)
    assert json.loads(spec.to_json())["rules"][0]["penalty"]["rank"] == [3]


def test_a_file_is_left_as_it_was_where_a_spec_cannot_be_written(tmp_path):
    there = tmp_path / "spec.json"
    there.write_text("mine")
    lost = {"nuclear": {"distribution": "\ud800", "version": None}}
    spec = regkit.load({"rules": [{"penalty": "nuclear(1)"}], "provenance": lost}, unknown="keep")
    with pytest.raises(UnicodeEncodeError):
        spec.save(there)
    assert there.read_text() == "mine"


class Namesake(regkit.Penalty):
    """Another L2, which is not registered."""

    kind: Literal["l2"] = "l2"

    def value(self, w):
        return w.sum()


def test_a_namesake_of_a_kind_is_not_saved_as_that_kind():
    spec = regkit.Spec(rules=[regkit.Rule(penalty=Namesake(strength=1))])
    with pytest.raises(regkit.PluginError, match=r"Namesake has the name 'l2' of another kind, regkit_standard\..*L2"):
        spec.to_json()


@pytest.mark.parametrize(
    ("distribution", "version"),
    [
        ("evil-package --index-url https://example.org", "1.0"),
        ("evil-package @ https://example.org/x.whl", "1.0"),
        ("-r requirements.txt", "1"),
        ("evil\npip install other", "1.0"),
        ("evil", "1.0 --index-url https://example.org"),
        ("evil", "1.0; rm -rf x"),
        ("evil\u202epackage", "1.0"),
        ("evil", "1.0\u200b"),
        ("e" * 10_000, "1"),
        ("", "1"),
    ],
    ids=range(10),
)
def test_no_command_is_made_of_what_no_installer_takes_for_a_name_and_a_version(distribution, version):
    with pytest.raises(SpecError) as caught:
        regkit.load(saved(nuclear=(distribution, version)))
    message = str(caught.value)
    assert "pip install e" not in message
    assert "; try:" not in message
    assert len(message) < 2000
    assert all(one.isprintable() for line in message.splitlines() for one in line)
    assert sum("evil" in line for line in message.splitlines()) <= 1


@pytest.mark.parametrize("version", ["1", "1.2.3", "2!1.0rc1.post2.dev3+local.7"])
def test_a_command_is_made_of_what_installers_take_and_is_said_to_be_the_documents_claim(version):
    with pytest.raises(SpecError) as caught:
        regkit.load(saved(nuclear=("Regkit_Low.Rank", version)))
    assert f"The document says that it was saved with it from Regkit_Low.Rank {version}; try: pip install" in str(
        caught.value
    )
