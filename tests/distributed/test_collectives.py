"""What processes that share a model say to one another for its rules: nothing where each can go by what it holds."""

from __future__ import annotations

import pytest

from tests.support.distributed.cases import world
from tests.support.distributed.collectives import SHARDS_ALONE, SUMS, WHOLE

GATHERS = ("all_gather_into_tensor", "all_gather", "_allgather_base_", "allgather_", "reduce_scatter_tensor")


def seen(document: str, how: str = "rows") -> list[dict[str, dict[str, int]]]:
    found: list[dict[str, dict[str, int]]] = world(2).found(f"collectives of {document}, {how}")
    return found


@pytest.mark.works_with("FSDP2")
@pytest.mark.parametrize("document", SHARDS_ALONE)
def test_what_reaches_no_further_than_a_row_is_done_without_a_word(document: str):
    assert [one["step"] for one in seen(document)] == [{}, {}]


@pytest.mark.works_with("FSDP2")
@pytest.mark.parametrize("document", [*SHARDS_ALONE, *SUMS])
def test_reports_of_such_rules_gather_no_weight(document: str):
    for one in seen(document):
        assert not set(GATHERS) & {*one["values"], *one["violations"]}


FSDP2, TENSOR_PARALLEL = pytest.mark.works_with("FSDP2"), pytest.mark.works_with("Tensor parallel")


@pytest.mark.parametrize(
    ("how", "documents", "sums"),
    [
        pytest.param("rows", ["per input", "per matrix", "of gates"], 1, marks=FSDP2),
        pytest.param("columns", ["max-norm", "unit-norm", "max-norm on gates"], 1, marks=FSDP2),
        pytest.param("columns", ["per matrix"], 2, marks=FSDP2, id="one for each way in which weights are placed"),
        pytest.param("tensor parallel columns", ["max-norm", "per matrix"], 1, marks=TENSOR_PARALLEL),
    ],
)
def test_norms_over_shards_are_one_sum_for_all_weights(how: str, documents: list[str], sums: int):
    for document in documents:
        for one in seen(document, how):
            assert one["step"] == {"all_reduce": sums}, document


@pytest.mark.works_with("FSDP2")
def test_columns_that_a_process_has_whole_need_no_sum():
    """Nor does what acts on single numbers, wherever they are."""
    for document in ("of gates", "l2 on gates", "l1, proximal", "non-negative"):
        assert [one["step"] for one in seen(document, "columns")] == [{}, {}], document


@pytest.mark.works_with("FSDP2")
@pytest.mark.parametrize("document", WHOLE)
def test_any_other_rule_gathers_a_weight_once_for_all_of_them(document: str):
    gathers, _ = WHOLE[document]
    for one in seen(document):
        assert one["step"] == {"all_gather_into_tensor": gathers}


@pytest.mark.works_with("FSDP2")
@pytest.mark.parametrize(("at", "says"), [("attach", "initialize or load"), ("a step", "before step 0")])
def test_a_nan_in_the_shard_of_one_process_is_told_in_all(at: str, says: str):
    found = world(2).found(f"nan at {at}")
    assert found[0] == found[1]
    assert "NaN or infinite numbers in rnn.weight_hh_l0" in found[0]
    assert says in found[0]


@pytest.mark.works_with("Tensor parallel")
def test_a_weight_that_is_placed_otherwise_between_two_steps_is_seen_as_it_is_placed_now():
    for found in world(2).found("placed_otherwise"):
        assert found["value"] == pytest.approx(16 * 9)
        assert found["norm"] == pytest.approx(0.4)
        assert found["violation"] == pytest.approx(0, abs=1e-6)
