"""Bots measure miners: real peers, real servers, one loop."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from mapreduce.errors import Refused
from mapreduce.net.client import call
from mapreduce.services import benchmarks, miner_job, rounds
from mapreduce.services.bot import Bot
from mapreduce.wire.benchmarks import BenchmarkAnswer, NextBenchmark
from mapreduce.wire.bodies import Abort
from mapreduce.wire.frames import Kind
from mapreduce.wire.miner_session import MinerSession
from test.integration.fleet import Fleet, in_loop, new_hotkey, until
from test.liars.miners import miner_session

if TYPE_CHECKING:
    from mapreduce.store.history import Measurement
    from mapreduce.wire.miner_step import MinerStep


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bots that do not come are not waited for, and what stalls is given up soon."""
    monkeypatch.setattr(benchmarks.RANDOM, "expovariate", lambda rate: 0.0)
    monkeypatch.setattr(benchmarks.RANDOM, "random", lambda: 0.7)  # without a broadcast
    monkeypatch.setattr(benchmarks, "GATHER_S", 1.0)
    monkeypatch.setattr(benchmarks, "STEP_TIMEOUT_S", 2.0)
    monkeypatch.setattr(benchmarks, "JOIN_TIMEOUT_S", 2.0)
    monkeypatch.setattr(benchmarks, "REPORT_S", 5.0)


async def run_round(fleet: Fleet, *, known: bool = True) -> dict[int, list[Measurement]]:
    """What one round showed of each miner, by uid, in order. `known`: they were measured before."""
    for node in fleet.miners if known else ():
        fleet.rounds.estimates.setdefault(node.key.ss58_address, 60e6)
    assert await fleet.rounds.run(1, time.time() + 15.0, set())
    rows: dict[int, list[Measurement]] = {node.uid: [] for node in fleet.miners}
    uids = {node.key.ss58_address: node.uid for node in fleet.miners}
    for row in fleet.history.measurements(0.0):
        rows[uids[row.hotkey]].append(row)
    return rows


def slow(*faults: str) -> list[Any]:
    return [pytest.param(fault, marks=pytest.mark.slow) for fault in faults]


def last(rows: dict[int, list[Measurement]]) -> dict[int, str]:
    return {uid: measured[-1].outcome if measured else "" for uid, measured in rows.items()}


def only(monkeypatch: pytest.MonkeyPatch, fleet: Fleet, index: int, session: Any) -> None:
    """This miner of the fleet runs another session than the others."""
    hotkey = fleet.miners[index].key.ss58_address

    def make(terms: Any, segment: int, keys: Any, sign: Any) -> MinerSession:
        kind = session if keys.miners[segment].hotkey == hotkey else MinerSession
        made: MinerSession = kind(terms, segment, keys, sign)
        return made

    monkeypatch.setattr(miner_job, "MinerSession", make)


@in_loop
async def test_a_round_measures_every_miner() -> None:
    async with Fleet(3) as fleet:
        await fleet.add_bots(3)
        rows = await run_round(fleet, known=False)
        assert last(rows) == {1: "measured", 2: "measured", 3: "measured"}
        for measured in rows.values():
            assert measured[-1].goodput_bytes_per_s > 0
            assert measured[-1].latency_s is not None
            assert measured[-1].bytes > 0
            # An unknown miner is measured small first, and again while it proves to be faster.
            assert [row.outcome for row in measured[:-1]] == ["void"] * (len(measured) - 1)
        assert fleet.history.traffic_since(0.0) > 0


@pytest.mark.parametrize("broadcast", [False, True])
@in_loop
async def test_one_bot_is_enough(broadcast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.RANDOM, "random", lambda: 0.2 if broadcast else 0.7)
    async with Fleet(2) as fleet:
        await fleet.add_bots(1)
        assert last(await run_round(fleet)) == {1: "measured", 2: "measured"}


@in_loop
async def test_a_round_leaves_out_who_was_measured_already_or_is_banned() -> None:
    async with Fleet(2) as fleet:
        await fleet.add_bots(1)
        done = {fleet.miners[0].key.ss58_address}
        assert await fleet.rounds.run(1, time.time() + 15.0, done)
        measured = {row.hotkey for row in fleet.history.measurements(0.0)}
        assert measured == {fleet.miners[1].key.ss58_address}


@in_loop
async def test_without_a_bot_nothing_is_measured_and_nobody_is_blamed() -> None:
    async with Fleet(1) as fleet:
        assert not await fleet.rounds.run(1, time.time() + 0.2, set())
        assert fleet.history.measurements(0.0) == []


@in_loop
async def test_a_stranger_is_no_bot() -> None:
    async with Fleet(0) as fleet:
        with pytest.raises(Refused, match="add it to benchmark_hotkeys") as refused:
            await call(
                fleet.http,
                new_hotkey(),
                fleet.validator,
                "POST",
                "/v1/benchmarks/next",
                NextBenchmark(wait_s=1.0),
                BenchmarkAnswer,
            )
        assert refused.value.code == "not_a_bot"


@in_loop
async def test_the_byte_budget_ends_a_round() -> None:
    async with Fleet(1) as fleet:
        await fleet.add_bots(1)
        object.__setattr__(fleet.rounds._limits, "bytes_per_day", 1000)
        assert not await fleet.rounds.run(1, time.time() + 15.0, set())
        assert fleet.history.measurements(0.0) == []


@in_loop
async def test_a_miner_that_is_gone_has_failed_and_the_others_are_measured() -> None:
    async with Fleet(3) as fleet:
        await fleet.add_bots(3)
        await run_round(fleet)
        await fleet.miners[1].runner.cleanup()
        rows = await run_round(fleet)
        assert last(rows) == {1: "measured", 2: "failed", 3: "measured"}
        assert "cannot be reached" in rows[2][-1].reason
        assert rows[2][-1].goodput_bytes_per_s == 0


@in_loop
async def test_a_neuron_that_never_was_a_miner_is_not_measured() -> None:
    async with Fleet(1) as fleet:
        fleet.directory.add(new_hotkey().ss58_address, 1)
        await fleet.add_bots(1)
        await run_round(fleet, known=False)
        hotkeys = {row.hotkey for row in fleet.history.measurements(0.0)}
        assert hotkeys == {fleet.miners[0].key.ss58_address}


@pytest.mark.parametrize("fault", ["one_ulp", "two_faced", *slow("stale_result", "peer_left_out")])
@in_loop
async def test_a_liar_is_caught_by_its_first_benchmark(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Fleet(3) as fleet:
        only(monkeypatch, fleet, 1, miner_session(fault))
        await fleet.add_bots(3)
        rows = await run_round(fleet)
        assert last(rows) == {1: "measured", 2: "failed", 3: "measured"}, rows
        liar = fleet.miners[1].key.ss58_address
        await until(lambda: fleet.auditor.banned(), "the proof")
        assert list(fleet.auditor.banned()) == [liar]
        before = len(rows[2])
        assert len((await run_round(fleet))[2]) == before  # no benchmarks for the banned


@in_loop
async def test_a_liar_is_caught_in_a_broadcast_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.RANDOM, "random", lambda: 0.2)
    async with Fleet(3) as fleet:
        only(monkeypatch, fleet, 1, miner_session("one_ulp"))
        await fleet.add_bots(3)
        rows = await run_round(fleet)
        assert last(rows) == {1: "measured", 2: "failed", 3: "measured"}, rows
        assert rows[2][-1].reason.startswith("disputed")  # what it certified is right


@pytest.mark.parametrize(
    "fault", ["truncated", "wrong_root", *slow("withheld_commit", "false_reject")]
)
@in_loop
async def test_a_miner_that_does_not_do_its_work_has_failed(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Fleet(3) as fleet:
        only(monkeypatch, fleet, 1, miner_session(fault))
        await fleet.add_bots(3)
        rows = await run_round(fleet)
        assert last(rows) == {1: "measured", 2: "failed", 3: "measured"}, rows
        assert not fleet.auditor.banned()


class _Stalled(MinerSession):
    """Takes part in a step and never reduces anything."""

    def reduce(self) -> None:
        pass


@in_loop
async def test_a_miner_that_stalls_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Fleet(3) as fleet:
        only(monkeypatch, fleet, 2, _Stalled)
        await fleet.add_bots(3)
        rows = await run_round(fleet)
        assert last(rows) == {1: "measured", 2: "measured", 3: "failed"}, rows
        assert rows[3][-1].reason.startswith("stalled")


class _Aborting(MinerSession):
    """Tells every rank that another one has gone."""

    def _agree(self, step: MinerStep) -> None:
        super()._agree(step)
        body = Abort(code="peer_lost", message="gone", rank=0).encode()
        for rank in range(self.terms.peer_count):
            self._send_step(rank, Kind.ABORT, step.number, body)


@in_loop
async def test_a_miner_that_makes_up_the_loss_of_a_rank_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Fleet(3) as fleet:
        only(monkeypatch, fleet, 1, _Aborting)
        await fleet.add_bots(3)
        rows = await run_round(fleet)
        assert last(rows) == {1: "measured", 2: "failed", 3: "measured"}, rows


@in_loop
async def test_a_miner_that_takes_the_job_and_refuses_the_streams_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Fleet(3) as fleet:

        def no_such_job(request: Any) -> Any:
            raise Refused("this miner has no such job", code="no_such_job", status=404)

        monkeypatch.setattr(fleet.miners[1].miner, "_job", no_such_job)
        await fleet.add_bots(3)
        rows = await run_round(fleet)
        assert last(rows) == {1: "measured", 2: "failed", 3: "measured"}, rows


@in_loop
async def test_a_miner_that_serves_no_axon_any_more_has_failed() -> None:
    async with Fleet(2) as fleet:
        await fleet.add_bots(1)
        await run_round(fleet)
        gone = fleet.directory.neurons[1]
        fleet.directory.neurons[1] = replace(gone, ip=None, port=None)
        rows = await run_round(fleet)
        assert last(rows) == {1: "failed", 2: "measured"}
        assert rows[1][-1].reason == "serves no axon"


@in_loop
async def test_a_bot_that_dies_in_a_benchmark_blames_no_miner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Fleet(2) as fleet:
        await fleet.add_bots(3)
        measure = Bot.measure
        killed: list[str] = []

        async def measure_or_die(bot: Bot, told: Any) -> Any:
            if told.rank == 1 and not killed:
                hotkey = bot._key.ss58_address
                killed.append(hotkey)
                asyncio.get_running_loop().call_later(0.3, fleet.bots[hotkey].cancel)
            return await measure(bot, told)

        monkeypatch.setattr(Bot, "measure", measure_or_die)
        monkeypatch.setattr(benchmarks, "FORGET_BOT_S", 5.0)
        rows = await run_round(fleet)
        assert killed
        assert last(rows) == {1: "measured", 2: "measured"}, rows
        assert not any(row.outcome == "failed" for measured in rows.values() for row in measured)


@in_loop
async def test_a_miner_without_room_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Fleet(1, max_jobs=1) as fleet:
        (job,) = await fleet.open_jobs(1)
        await fleet.add_bots(1)
        asyncio.get_running_loop().call_later(1.0, lambda: asyncio.ensure_future(job.close()))
        monkeypatch.setattr(rounds, "MAX_TRIES", 1000)
        rows = await run_round(fleet)
        assert rows[1][0].outcome == "void"
        assert "jobs" in rows[1][0].reason
        assert last(rows) == {1: "measured"}


@in_loop
async def test_bots_survive_their_validator() -> None:
    async with Fleet(1) as fleet:
        await fleet.add_bots(2)
        assert last(await run_round(fleet)) == {1: "measured"}
        port = fleet.validator.port
        await fleet.stop_coordinator()
        await asyncio.sleep(0.5)
        await fleet.start_coordinator(port)
        assert last(await run_round(fleet)) == {1: "measured"}
