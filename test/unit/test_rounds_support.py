"""The subnet of the tests of rounds: clock, chain, recruiter and bots in one, and a real history.

Knows what a round asks of each. Knows nothing of what it makes of the answers.
"""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from mapreduce.chain.metagraph import Metagraph, Neuron
from mapreduce.core.scoring_config import ScoringConfig
from mapreduce.errors import Unavailable
from mapreduce.services import rounds as module
from mapreduce.services.benchmarks import BenchmarkLimits, SlotResult
from mapreduce.services.rounds import Rounds
from mapreduce.services.slots import FIRST_ESTIMATE_BYTES_PER_S, Verdict
from mapreduce.store.database import Database
from mapreduce.store.history import History
from mapreduce.wire.messages import MinerAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mapreduce.store.history import Measurement

NOW = 1_700_000_000.0
RATE = FIRST_ESTIMATE_BYTES_PER_S
SLOT_S = 10.0
SLOT_BYTES = int(SLOT_S * RATE)  # what a miner takes that is as fast as its estimate
MEASURED = Verdict(
    outcome="measured",
    goodput_bytes_per_s=RATE,
    latency_s=0.02,
    seconds=SLOT_S,
    bytes=SLOT_BYTES,
)
FAILED = Verdict(outcome="failed", reason="stalled")
VOID = Verdict(outcome="void", bytes=7, reason="a bot stopped")


class Subnet:
    """Clock, chain, recruiter and bots in one. A slot takes `slot_s`; a miner shows what `says`
    has for it, of a list one by one and then the last."""

    def __init__(self) -> None:
        self.now = NOW
        self.neurons: dict[str, Neuron] = {}
        self.silent: set[str] = set()
        self.banned_ones: dict[str, str] = {}
        self.bots = ["bot-0"]
        self.slot_s = 1.0  # so that all tries fit, however late in the window the first one is
        self.says: dict[str, list[Verdict]] = {}
        self.busy: set[str] = set()
        self.slots: list[list[str]] = []
        self.begun: list[float] = []
        self.addresses: list[list[MinerAddress]] = []
        self.told: list[list[float]] = []
        self.limits = BenchmarkLimits(
            bots=frozenset(self.bots), max_bytes_per_s=1e9, bytes_per_day=10**15, seconds=SLOT_S
        )
        self.during: Callable[[], None] = lambda: None

    def add(self, *names: str, coldkey: str | None = None) -> None:
        for name in names:
            uid = len(self.neurons)
            self.neurons[name] = Neuron(
                uid, name, coldkey or f"cold-{name}", f"10.0.{uid}.1", 8091, 0.0, False
            )

    # The clock, as the modules `time` and `asyncio` have it.

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds

    # The chain and the recruiter.

    async def metagraph(self, max_age_s: float) -> Metagraph:
        return Metagraph(1, 1, tuple(self.neurons.values()))

    async def served(self) -> list[MinerAddress]:
        return [
            MinerAddress(uid=n.uid, hotkey=n.hotkey, ip=n.ip, port=n.port)
            for n in self.neurons.values()
            if n.ip is not None and n.port
        ]

    async def status(self, miner: MinerAddress) -> object:
        return Unavailable("silent") if miner.hotkey in self.silent else "a status"

    def banned(self) -> dict[str, str]:
        return self.banned_ones

    # The bots.

    async def gather(self) -> list[str]:
        if not self.bots:
            await asyncio.Event().wait()
        await asyncio.sleep(0)  # a window that is over ends it here
        return self.bots

    async def run_slot(
        self, bots: list[str], miners: list[MinerAddress], estimates: list[float]
    ) -> SlotResult:
        names = [miner.hotkey for miner in miners]
        self.slots.append(names)
        self.begun.append(self.now)
        self.addresses.append(miners)
        self.told.append(estimates)
        self.now += self.slot_s
        self.during()
        verdicts = {}
        for name in names:
            told = self.says.get(name, [MEASURED])
            verdicts[name] = told.pop(0) if len(told) > 1 else told[0]
        busy = self.busy & set(names)
        return SlotResult(verdicts=verdicts, busy=busy, job=f"job-{len(self.slots)}")


@pytest.fixture(name="subnet")
def made_subnet(monkeypatch: pytest.MonkeyPatch) -> Subnet:
    made = Subnet()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(
        module,
        "asyncio",
        SimpleNamespace(sleep=made.sleep, timeout=asyncio.timeout, gather=asyncio.gather),
    )
    monkeypatch.setattr(module, "RANDOM", random.Random(7))
    return made


@pytest.fixture(name="history")
def opened_history(tmp_path: Path) -> Iterator[History]:
    with Database.open(tmp_path / "validator.sqlite") as opened:
        yield History(opened)


def rounds_of(subnet: Subnet, history: History, **config: Any) -> Rounds:
    fake = cast("Any", subnet)
    return Rounds(fake, fake, fake, history, ScoringConfig(**config))


def run(
    rounds: Rounds,
    subnet: Subnet,
    *,
    window: int = 0,
    seconds: float = 4320.0,
    done: frozenset[str] = frozenset(),
) -> bool:
    return asyncio.run(rounds.run(window, subnet.now + seconds, done))


def rows_of(history: History, hotkey: str) -> list[Measurement]:
    return history.measurements(0.0, hotkey=hotkey)


def outcomes_of(history: History, hotkey: str) -> list[str]:
    return [row.outcome for row in rows_of(history, hotkey)]
