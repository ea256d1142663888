"""What real jobs say of their miners: losses, and who answers for a peer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mapreduce.core.scoring import ScoringConfig
from mapreduce.services.organic import STRANGERS, Organic


class Kept:
    def __init__(self) -> None:
        self.outcomes: list[Any] = []

    def add_outcomes(self, outcomes: list[Any]) -> None:
        self.outcomes += outcomes


def job(peers: int = 3) -> tuple[Any, Any]:
    granted = SimpleNamespace(members=[SimpleNamespace(hotkey=f"p{i}") for i in range(peers)])
    miners = [SimpleNamespace(hotkey=f"m{i}", uid=10 + i) for i in range(3)]
    return granted, SimpleNamespace(job="j", miners=miners, session_keys=["k"] * peers)


def organic(*bots: str) -> Organic:
    kept: Any = Kept()
    return Organic(kept, bots, ScoringConfig())


def lose(told: Organic, ranks: int, peers: int = 3) -> list[str]:
    for rank in range(ranks):
        told.lost(*job(peers), rank, [11])
    return [outcome.hotkey for outcome in told.settle(1.0, {}) if outcome.failed]


def test_a_loss_that_most_ranks_tell_of_counts_once() -> None:
    told = organic()
    assert lose(told, 1) == []
    assert lose(told, 2) == ["m1"]
    assert lose(told, 3) == []


def test_a_job_of_few_ranks_says_nothing() -> None:
    assert lose(organic(), 2, peers=2) == []


def test_a_job_of_bots_is_none() -> None:
    assert lose(organic("p1"), 3) == []


def test_strangers_are_one_owner() -> None:
    told = organic()
    told.coldkeys = {"p0": "cold"}
    assert [told.owner(hotkey) for hotkey in ("p0", "x", "y")] == ["cold", STRANGERS, STRANGERS]
