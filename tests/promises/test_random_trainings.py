"""Random trainings give the weights that a plain interpreter of the same rules gives; or an error that is deserved."""

from __future__ import annotations

import re
from functools import cache

import pytest

import regkit
from tests.support.random.trainings import Training

FEW, MANY = range(60), range(60, 660)
DESERVED = [
    "what makes up one weight has different learning rates",
    "cannot be set to a point",
    r"cannot hold of .* together with",  # constraints that were drawn for one weight
    r"attachment.step\(\) found no gradient",
]


@cache
def refusal(seed: int) -> str | None:
    """Why regkit did not go on with a random training; None where it came to its end."""
    training = Training(seed)
    try:
        training.run()
    except regkit.RegkitError as error:
        return f"{error}"
    except AssertionError as error:
        story = "\n".join(map(str, training.story))
        raise AssertionError(f"seed {seed}: {error}\n{story}") from error
    return None


def assert_as_interpreted(seed: int) -> None:
    reason = refusal(seed)
    assert reason is None or any(re.search(pattern, reason) for pattern in DESERVED)


@pytest.mark.parametrize("seed", FEW)
def test_a_random_training_goes_as_its_rules_say(seed):
    assert_as_interpreted(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", MANY)
def test_another_random_training_goes_as_its_rules_say(seed):
    assert_as_interpreted(seed)


@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_most_random_trainings_come_to_their_end(seeds):
    refused = [reason for seed in seeds if (reason := refusal(seed)) is not None]
    assert len(refused) <= len(seeds) / 10, refused
