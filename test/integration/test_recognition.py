"""Can a miner tell a benchmark from a user's job? By all that it logs: grants, keys, addresses,
headers, frames, sizes and times.

Users are as many ranks as there are bots, whose tensors are as large as theirs and who compute for
about as long between two steps: what is left to tell them apart is what the programs do.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from mapreduce.core.dtypes import DType
from mapreduce.core.reduce import ReduceOp
from mapreduce.core.seeded import PIECE_BYTES, SeededTensor
from mapreduce.services import benchmarks, miner
from mapreduce.services.miner_job import MinerJob
from mapreduce.services.slots import slot_size
from mapreduce.wire.bodies import TensorSpec
from mapreduce.wire.frames import Kind
from mapreduce.wire.messages import Grant
from mapreduce.wire.peer_step import Target
from test.integration.fleet import Fleet, new_hotkey

if TYPE_CHECKING:
    from aiohttp import web

    from mapreduce.services.peer_job import PeerJob
    from mapreduce.wire.frames import Header

RANKS, MINERS = 3, 3
SLOT_S = 0.6  # its pauses are longer than recomputing a step takes here
ESTIMATE = 60e6
MOST_AUC = 0.60


@dataclass(slots=True)
class Logged:
    """One job as one miner (`hotkey`) sees it; times are seconds of its own clock."""

    hotkey: str
    grant: Grant
    offered_at: float
    streams: list[tuple[float, tuple[str, ...], str]] = field(default_factory=list)
    frames: list[tuple[float, int, Kind, int]] = field(default_factory=list)


class Watching(MinerJob):
    """The shipped job, and a log of it."""

    log: ClassVar[list[Logged]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        hotkey = self.grant.miners[self.session.segment].hotkey
        self.logged = Logged(hotkey, self.grant, time.perf_counter())
        self.log.append(self.logged)
        received = self.session.frame_received

        def watch(rank: int, header: Header, body: memoryview) -> None:
            now = time.perf_counter()
            self.logged.frames.append((now, rank, header.kind, header.length))
            received(rank, header, body)

        self.session.frame_received = watch  # type: ignore[method-assign]

    async def serve(self, request: web.Request, rank: int) -> None:
        names = tuple(sorted(request.headers))
        address = str(request.remote)
        self.logged.streams.append((time.perf_counter(), names, address))
        await super().serve(request, rank)


def features(logged: Logged) -> list[float]:
    """Numbers that a miner could go by."""
    grant = logged.grant
    data = [length for _, _, kind, length in logged.frames if kind is Kind.DATA]
    opens = [at for at, rank, kind, _ in logged.frames if kind is Kind.OPEN and rank == 0]
    closes = [at for at, rank, kind, _ in logged.frames if kind is Kind.CLOSE and rank == 0]
    acks = [at for at, rank, kind, _ in logged.frames if kind is Kind.ACK and rank == 0]
    gaps = [begin - end for begin, end in zip(opens[1:], acks, strict=False)] or [0.0]
    lasting = [end - begin for begin, end in zip(opens, acks, strict=False)] or [0.0]
    joined = [at for at, _, _ in logged.streams]
    others = sum(
        kind not in (Kind.DATA, Kind.OPEN, Kind.CLOSE, Kind.ACK) for _, _, kind, _ in logged.frames
    )
    return [
        math.log(grant.bandwidth),
        math.log(1 + sum(data)),
        grant.bandwidth / (1 + sum(data) / max(1, len(acks)) / RANKS),
        len(grant.miners),
        math.log(np.mean(data) if data else 1.0),
        float(len(acks)),
        float(len(opens) - len(closes)),
        float(others),
        math.log(1e-4 + float(np.mean(gaps))),
        math.log(1e-4 + float(np.std(gaps))),
        math.log(1e-4 + float(np.mean(lasting))),
        math.log(1e-4 + joined[0] - logged.offered_at),
        math.log(1e-4 + max(joined) - min(joined)),
        math.log(1e-4 + opens[0] - max(joined)) if opens else 0.0,
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a user trains: bytes of its gradients, steps, seconds in all and of a pause, and whether
    the first rank sends its weights before."""

    nbytes: int
    steps: int
    seconds: float
    pause_s: float
    first: bool


async def train(job: PeerJob, rank: int, model: Model) -> None:
    """A user's rank: makes gradients, all-reduces them, looks at the result."""
    spec = TensorSpec(dtype=DType.FLOAT32, shape=(model.nbytes // 4,))
    memory, undo = np.zeros(model.nbytes // 4, np.float32), np.zeros(model.nbytes, np.uint8).data
    view = memory.view(np.uint8).data
    key = os.urandom(32)

    async def collective(op: ReduceOp, source: memoryview | None, target: Target | None) -> Any:
        return await job.collective(
            op,
            tensor=spec if source is not None else None,
            source=source,
            allocate=None if target is None else lambda _: target,
            enter_timeout_s=10.0,
        )

    def compute() -> None:
        SeededTensor(key, rank, 1).fill(view)

    def look() -> None:  # at the result, for as long as a bot recomputes it
        for rank in range(RANKS):
            other = SeededTensor(bytes(32), rank, 0)
            for begin in range(0, model.nbytes, PIECE_BYTES):
                other.read(begin, min(PIECE_BYTES, model.nbytes - begin))
            assert np.isfinite(memory).all()

    if model.first:
        await asyncio.to_thread(compute)
        if rank == 0:
            await collective(ReduceOp.BROADCAST, view, None)
        else:
            await collective(ReduceOp.BROADCAST, None, Target(view))
            await asyncio.to_thread(look)
    busy_us = 0.0
    for _ in range(model.steps):
        await asyncio.to_thread(compute)
        step = await collective(ReduceOp.AVG, view, Target(view, undo))
        await asyncio.to_thread(look)
        await asyncio.sleep(model.pause_s - (time.perf_counter() - step.ended_at))
        busy_us += max(max(said) for said in step.acks.values())
        if busy_us >= model.seconds * 1e6:
            return


async def user_job(fleet: Fleet, seconds: float) -> None:
    size = slot_size(
        [ESTIMATE] * MINERS,
        RANKS,
        seconds=seconds,
        max_bytes_per_s=1e10,
        chance=random.random(),
        leisure=random.random(),
    )
    model = Model(
        nbytes=size.tensor_bytes,
        steps=size.steps,
        seconds=seconds,
        pause_s=size.pause_s,
        first=random.random() < 0.5,
    )
    hotkey = new_hotkey()
    jobs = await asyncio.gather(
        *(
            fleet.open_job(rank, RANKS, hotkey=hotkey, bandwidth=model.nbytes)
            for rank in range(RANKS)
        )
    )
    await asyncio.gather(*(train(job, rank, model) for rank, job in enumerate(jobs)))
    await asyncio.gather(*(job.close() for job in jobs))


async def both(monkeypatch: pytest.MonkeyPatch, count: int) -> tuple[list[Logged], list[Logged]]:
    """What a miner logs of `count` benchmarks and of as many users' jobs, which take turns."""
    monkeypatch.setattr(miner, "MinerJob", Watching)
    monkeypatch.setattr(benchmarks, "GATHER_S", 1.0)
    monkeypatch.setattr(Watching, "log", [])
    bots: list[Logged] = []
    users: list[Logged] = []
    async with Fleet(MINERS) as fleet:
        await fleet.add_bots(RANKS)
        limits = replace(fleet.benchmarks.limits, max_bytes_per_s=1e10, seconds=SLOT_S)
        fleet.benchmarks.limits = limits  # of loopback: pacing is for links that carry less
        seconds = limits.seconds
        mine = fleet.miners[0].key.ss58_address
        miners = [node.address for node in fleet.miners]
        for _ in range(count):
            for logs in random.sample([bots, users], 2):
                Watching.log.clear()
                if logs is users:
                    await user_job(fleet, seconds)
                else:
                    waiting = await fleet.benchmarks.gather()
                    random.shuffle(miners)
                    result = await fleet.benchmarks.run_slot(waiting, miners, [ESTIMATE] * MINERS)
                    assert {v.outcome for v in result.verdicts.values()} == {"measured"}
                logs += [watched for watched in Watching.log if watched.hotkey == mine]
    return bots, users


def auc(scores: np.ndarray[Any, Any], positive: np.ndarray[Any, Any]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative."""
    above = scores[positive][:, None] - scores[~positive][None, :]
    return float(np.mean((above > 0) + 0.5 * (above == 0)))


def logistic_auc(
    rows: np.ndarray[Any, Any], positive: np.ndarray[Any, Any], folds: int = 5
) -> float:
    """AUC of a logistic regression on rows that it was not fitted to."""
    rows = (rows - rows.mean(0)) / (rows.std(0) + 1e-9)
    rows = np.hstack([rows, np.ones((len(rows), 1))])
    order = np.random.default_rng(1).permutation(len(rows))
    scores = np.zeros(len(rows))
    for fold in range(folds):
        held = order[fold::folds]
        kept = np.setdiff1d(order, held)
        weights = np.zeros(rows.shape[1])
        for _ in range(500):
            told = 1 / (1 + np.exp(-rows[kept] @ weights))
            weights -= 0.3 * (rows[kept].T @ (told - positive[kept]) / len(kept) + 0.01 * weights)
        scores[held] = rows[held] @ weights
    return auc(scores, positive)


def test_the_classifier_tells_apart_what_differs() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(200, 8))
    positive = np.arange(200) % 2 == 0
    assert abs(logistic_auc(rows, positive) - 0.5) < 0.15
    rows[positive, 3] += 2.0
    assert logistic_auc(rows, positive) > 0.85


def test_grants_keys_headers_and_addresses_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bots, users = asyncio.run(both(monkeypatch, 2))
    assert len(bots) == len(users) == 2
    for name in (f.name for f in fields(Grant)):
        kinds = [{type(getattr(logged.grant, name)) for logged in logs} for logs in (bots, users)]
        assert kinds[0] == kinds[1], name
    for name in ("version", "netuid", "validator", "window_bytes", "frame_bytes", "audit_budget"):
        values = {getattr(logged.grant, name) for logged in (*bots, *users)}
        assert len(values) == 1, name
    lifetimes = {round(x.grant.expires_at - x.grant.created_at) for x in (*bots, *users)}
    assert len(lifetimes) == 1
    assert len({names for logged in (*bots, *users) for _, names, _ in logged.streams}) == 1
    assert len({address for logged in (*bots, *users) for _, _, address in logged.streams}) == 1
    keys = [key for logged in (*bots, *users) for key in logged.grant.session_keys]
    assert len(set(keys)) == len(keys)  # each used once


@pytest.mark.slow
def test_a_miner_cannot_tell_benchmarks_from_users(monkeypatch: pytest.MonkeyPatch) -> None:
    bots, users = asyncio.run(both(monkeypatch, 100))
    rows = np.array([features(logged) for logged in (*bots, *users)])
    positive = np.arange(len(rows)) < len(bots)
    found = logistic_auc(rows, positive)
    alone = [round(max(a := auc(rows[:, i], positive), 1 - a), 2) for i in range(rows.shape[1])]
    print(f"AUC {found:.3f}; each feature alone {alone}")
    assert found <= MOST_AUC
