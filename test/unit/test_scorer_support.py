"""What a scorer has around it, in one: clock, chain, auditor, real jobs, rounds, setter.

Knows what a scorer asks of each. The history is a real one.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from mapreduce.chain.metagraph import Metagraph, Neuron
from mapreduce.core.scoring import ScoringConfig, Standing, from_json
from mapreduce.errors import ChainUnavailable
from mapreduce.services import scorer as module
from mapreduce.services.scorer import Scorer
from mapreduce.store.database import Database
from mapreduce.store.history import History, Measurement, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

WINDOW_S = 100.0
WINDOW = 17_000_000
BEGIN = WINDOW * WINDOW_S
CONFIG = ScoringConfig(window_s=WINDOW_S)
MEASURED = Measurement(
    at=BEGIN + 10,
    window=WINDOW,
    job="j",
    hotkey="a",
    outcome="measured",
    goodput_bytes_per_s=100e6,
    latency_s=0.02,
    seconds=10.0,
    bytes=1000,
    reason="",
)
FAILED = replace(MEASURED, outcome="failed", goodput_bytes_per_s=0.0, latency_s=None)
VOID = replace(FAILED, outcome="void")


class World:
    """Everything around a scorer: clock, chain, auditor, real jobs, rounds, recruiter, setter."""

    def __init__(self) -> None:
        self.now = BEGIN
        self.neurons: dict[str, Neuron] = {}
        self.unreachable = 0  # times that the chain does not answer
        self.banned_ones: dict[str, str] = {}
        self.disputed: set[str] = set()
        self.pruned: list[float] = []
        self.coldkeys: Mapping[str, str] = {}
        self.outcomes: list[Outcome] = []
        self.settled_with: list[Mapping[str, float]] = []
        self.estimates: dict[str, float] = {}
        self.cap_bytes_per_s = 1e12
        self.wholes: list[bool] = []  # what each round says; the scorer is stopped after the last
        self.on_round: Callable[[int], None] = lambda window: None
        self.ran: list[tuple[int, float, set[str]]] = []
        self.weights: Mapping[str, float] = {}
        self.pause_s = WINDOW_S / 4
        self.set: list[tuple[float, Mapping[str, float]]] = []
        self.set_error: Exception | None = None
        self.slept: list[float] = []
        self._wakes: list[float] = []

    def add(self, *names: str) -> None:
        for name in names:
            uid = len(self.neurons)
            self.neurons[name] = Neuron(uid, name, f"cold-{name}", f"10.0.{uid}.1", 1, 0.0, False)

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        until = self.now + seconds
        self._wakes.append(until)
        try:
            while self.now < until:
                for _ in range(4):  # first whoever can go on now
                    await asyncio.sleep(0)
                if until == min(self._wakes):
                    self.now = max(self.now, until)
        finally:
            self._wakes.remove(until)

    async def metagraph(self, max_age_s: float) -> Metagraph:
        if self.unreachable:
            self.unreachable -= 1
            raise ChainUnavailable("no answer")
        return Metagraph(1, 1, tuple(self.neurons.values()))

    def banned(self) -> dict[str, str]:
        return self.banned_ones

    def flags(self) -> SimpleNamespace:
        return SimpleNamespace(miners=frozenset(self.disputed))

    def prune(self, now: float) -> None:
        self.pruned.append(now)

    def settle(self, now: float, goodputs: Mapping[str, float]) -> list[Outcome]:
        self.settled_with.append(dict(goodputs))
        outcomes, self.outcomes = self.outcomes, []
        return outcomes

    async def cluster_of(self, miners: Collection[str]) -> dict[str, str]:
        return {name: name for name in miners}

    async def run(self, window: int, until: float, done: Collection[str]) -> bool:
        if not self.wholes:
            raise asyncio.CancelledError
        self.ran.append((window, until, set(done)))
        await asyncio.sleep(0)  # the weights have their turn first
        self.on_round(window)
        return self.wholes.pop(0)

    async def set_if_due(self, weights: Mapping[str, float]) -> None:
        self.set.append((self.now, dict(weights)))
        if self.set_error is not None:
            raise self.set_error


@pytest.fixture(name="world")
def made_world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(
        module,
        "asyncio",
        SimpleNamespace(sleep=made.sleep, create_task=asyncio.create_task, wait=asyncio.wait),
    )
    return made


@pytest.fixture(name="history")
def opened_history(tmp_path: Path) -> Iterator[History]:
    with Database.open(tmp_path / "validator.sqlite") as opened:
        yield History(opened)


def scorer_of(world: World, history: History) -> Scorer:
    fake = cast("Any", world)
    return Scorer(fake, history, fake, fake, fake, fake, fake, CONFIG)


def close(scorer: Scorer, window: int = WINDOW) -> None:
    asyncio.run(scorer.close_window(window, window * WINDOW_S))


def run(scorer: Scorer, world: World, *wholes: bool) -> None:
    """As many rounds as there are arguments; then it is stopped, as a validator stops it."""
    world.wholes = list(wholes)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(scorer.run())


def standing_of(history: History, hotkey: str) -> Standing:
    return from_json(history.standings()[hotkey])


def in_window(row: Measurement, window: int) -> Measurement:
    return replace(row, window=window, at=row.at + (window - row.window) * WINDOW_S)


def set_before(history: History, result: Any = "set") -> None:
    history.add_weights(at=BEGIN - 50, block=1, vector_json="{}", result=result, reason="")
