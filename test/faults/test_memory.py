"""Every lie, in memory, over many interleavings, ends in exactly its verdict; honest parties are
never blamed."""

from __future__ import annotations

import pytest

from test.faults.trial import Trial, judge
from test.liars import FAULTS

FAST, FULL = 10, 100


def check(fault: str | None, seed: int) -> None:
    """A job of 2 to 4 peers and 1 to 3 miners whose segments have up to 32 blocks."""
    peers, miners = 2 + seed % 3, 1 + seed % 3
    trial = Trial(fault, seed, peers, miners)
    trial.run(steps=24, count=miners * 70_000 + seed)
    judge(trial)


@pytest.mark.parametrize("seed", range(FAST))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lie_ends_in_its_verdict(fault: str, seed: int) -> None:
    check(fault, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FAST, FULL))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lie_ends_in_its_verdict_a_hundred_times(fault: str, seed: int) -> None:
    check(fault, seed)


@pytest.mark.parametrize("seed", range(FAST))
def test_an_honest_job_is_audited_and_blames_nobody(seed: int) -> None:
    peers, miners = 2 + seed % 3, 1 + seed % 3
    trial = Trial(None, seed, peers, miners)
    blame = trial.run(steps=4, count=miners * 70_000 + seed)
    judge(trial)
    assert blame.audited == blame.steps == 4
