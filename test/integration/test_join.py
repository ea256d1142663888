"""Ranks meet, miners are found, jobs outlive their validator: the coordinator with real peers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from mapreduce.errors import (
    BadMessage,
    JobRefused,
    MinerLost,
    Refused,
    StepInDoubt,
    Unavailable,
    ValidatorUnreachable,
)
from mapreduce.net.auth import new_session_key
from mapreduce.services import coordinator, grants, miner_job, peer_job
from mapreduce.wire.messages import Grant, Report, ReportAnswer, decode_message
from mapreduce.wire.peer_session import Phase
from test.integration.fleet import (
    Fleet,
    all_reduce,
    all_reduce_everywhere,
    in_loop,
    integers,
    new_hotkey,
    until,
)

if TYPE_CHECKING:
    from mapreduce.services.peer_job import PeerJob


async def refused_code(joining: Any) -> tuple[str, str]:
    with pytest.raises(JobRefused) as caught:
        await joining
    return caught.value.code, str(caught.value)


# Ranks --------------------------------------------------------------------------------------------


@in_loop
async def test_a_rank_that_joins_twice_is_refused_and_the_first_stays() -> None:
    async with Fleet(1) as fleet:
        first = asyncio.create_task(fleet.open_job(0, 2))
        await until(lambda: fleet.coordinator.waiting_ranks == 1, "rank 1 waits")
        code, text = await refused_code(fleet.open_job(0, 2))
        assert code == "rank_taken"
        assert "rank 1 has joined" in text
        assert "job=" in text
        fleet.jobs += await asyncio.gather(first, fleet.open_job(1, 2))
        await all_reduce_everywhere(fleet.jobs, [integers(rank, 1000) for rank in range(2)])


@in_loop
async def test_a_rank_out_of_range_is_refused() -> None:
    async with Fleet(1) as fleet:
        code, text = await refused_code(fleet.open_job(2, 2))
        assert code == "rank_out_of_range"
        assert "rank 3 is out of range: ranks of 2 peers are 1 to 2" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peer_count": 3}, "peer_count: rank 1 says 2, rank 2 says 3"),
        ({"bandwidth": 5000}, "bandwidth: rank 1 says 67108864, rank 2 says 5000"),
        ({"miner_count": 1}, "miner_count: rank 1 says None, rank 2 says 1"),
    ],
)
def test_ranks_that_want_different_jobs_are_told_who_wants_what(
    change: dict[str, int], says: str
) -> None:
    @in_loop
    async def run() -> None:
        async with Fleet(1) as fleet:
            first = asyncio.create_task(fleet.open_job(0, 2))
            await until(lambda: fleet.coordinator.waiting_ranks == 1, "rank 1 waits")
            options = {"peer_count": 2} | change
            code, text = await refused_code(fleet.open_job(1, options.pop("peer_count"), **options))
            assert code == "ranks_disagree"
            assert says in text
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first

    run()


@in_loop
async def test_every_waiting_rank_hears_which_ranks_are_missing() -> None:
    async with Fleet(1) as fleet:
        joins = [refused_code(fleet.open_job(rank, 4, join_timeout_s=0.3)) for rank in (0, 2)]
        for code, text in await asyncio.gather(*joins):
            assert code == "ranks_missing"
            assert "ranks 2, 4 of 4 did not join within 0.3 s" in text
        code, text = await refused_code(fleet.open_job(0, 2, join_timeout_s=0.1))
        assert "rank 2 of 2 did not join" in text
        assert fleet.coordinator.waiting_ranks == 0


@in_loop
async def test_the_validator_bounds_how_long_ranks_wait() -> None:
    async with Fleet(1, join_timeout_s=0.2) as fleet:
        code, text = await refused_code(fleet.open_job(0, 2, join_timeout_s=60.0))
        assert code == "ranks_missing"
        assert "within 0.2 s" in text


@in_loop
async def test_a_peer_that_hangs_up_while_it_waits_loses_its_place() -> None:
    async with Fleet(1) as fleet:
        for _ in range(3):
            gone = asyncio.create_task(fleet.open_job(0, 2))
            await until(lambda: fleet.coordinator.waiting_ranks == 1, "rank 1 waits")
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            await until(lambda: fleet.coordinator.waiting_ranks == 0, "its place is free")
        assert not fleet.coordinator._grants
        jobs = await fleet.open_jobs(2)
        await all_reduce_everywhere(jobs, [integers(rank, 1000) for rank in range(2)])


@in_loop
async def test_jobs_of_one_hotkey_are_told_apart_by_name_and_hotkeys_meet_by_name() -> None:
    async with Fleet(2) as fleet:
        groups = await asyncio.gather(
            fleet.open_jobs(2, job="a"), fleet.open_jobs(2, job="b"), fleet.open_jobs(2)
        )
        assert len({job.grant.job for group in groups for job in group}) == 3
        strangers = await asyncio.gather(
            *(fleet.open_job(rank, 2, job="c", hotkey=new_hotkey()) for rank in range(2))
        )
        fleet.jobs += strangers
        assert strangers[0].grant.job == strangers[1].grant.job
        for group in (*groups, strangers):
            await all_reduce_everywhere(list(group), [integers(rank, 999) for rank in range(2)])


@in_loop
async def test_ranks_wait_for_a_validator_that_is_started_again() -> None:
    async with Fleet(1) as fleet:
        waiting = asyncio.create_task(fleet.open_job(0, 2))
        await until(lambda: fleet.coordinator.waiting_ranks == 1, "rank 1 waits")
        port = fleet.validator.port
        await fleet.stop_coordinator()
        await asyncio.sleep(1.0)  # nobody listens for a while
        assert not waiting.done()
        await fleet.start_coordinator(port)
        jobs = [await fleet.open_job(1, 2), await waiting]
        await all_reduce_everywhere(jobs[::-1], [integers(rank, 1000) for rank in range(2)])


@in_loop
async def test_a_validator_that_stops_is_not_waited_for_beyond_the_time_to_join() -> None:
    async with Fleet(1) as fleet:
        waiting = asyncio.create_task(fleet.open_job(0, 2, join_timeout_s=2.0))
        await until(lambda: fleet.coordinator.waiting_ranks == 1, "rank 1 waits")
        await fleet.stop_coordinator()
        with pytest.raises(ValidatorUnreachable, match=r"validator uid 0 at 127\.0\.0\.1:\d+"):
            await waiting
        with pytest.raises(ValidatorUnreachable, match=r"validator uid 0 at 127\.0\.0\.1:\d+"):
            await fleet.open_job(0, 1)


# Miners -------------------------------------------------------------------------------------------


@in_loop
async def test_a_miner_that_refuses_is_replaced_and_the_others_are_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Fleet(3) as fleet:
        offers: list[int] = []

        def refuse_first(node: Any) -> None:
            admit = node.miner._admit

            def admit_later(grant: Grant) -> None:
                offers.append(node.uid)
                if len(offers) == 1:
                    raise Refused("not today", code="no_memory")
                admit(grant)

            monkeypatch.setattr(node.miner, "_admit", admit_later)

        for node in fleet.miners:
            refuse_first(node)
        (job,) = await fleet.open_jobs(1, miner_count=2)
        chosen = {miner.uid for miner in job.grant.miners}
        assert offers[0] not in chosen
        assert len(offers) == 4
        for node in fleet.miners:
            assert list(node.miner.jobs) == ([job.grant.job] if node.uid in chosen else [])


@in_loop
async def test_no_miner_left_is_refused_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Fleet(2) as fleet:
        for node, reason in zip(fleet.miners, ("too hot", "too cold"), strict=True):

            def refuse(grant: Grant, reason: str = reason) -> None:
                raise Refused(reason, code="no_memory")

            monkeypatch.setattr(node.miner, "_admit", refuse)
        code, text = await refused_code(fleet.open_job(0, 1, miner_count=1))
        assert code == "too_few_miners"
        assert "uid 1: " in text
        assert "too hot" in text
        assert "uid 2: " in text
        assert "too cold" in text
        assert not any(node.miner.jobs for node in fleet.miners)


@in_loop
async def test_too_few_miners_names_how_many_are_needed_and_found() -> None:
    async with Fleet(2) as fleet:
        fleet.directory.add(new_hotkey().ss58_address, 1)  # served once, dead now
        code, text = await refused_code(fleet.open_job(0, 1, miner_count=4))
        assert code == "too_few_miners"
        assert "4 miners are needed, 2 can take the job" in text
        assert "uid 3: miner uid 3 at 127.0.0.1:1 cannot be reached" in text
    async with Fleet(0) as fleet:
        code, text = await refused_code(fleet.open_job(0, 1))
        assert code == "too_few_miners"
        assert "1 miner is needed, 0 can take the job" in text


@in_loop
async def test_a_miner_that_dies_between_grant_and_stream_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Fleet(1) as fleet:
        connect = peer_job.PeerJob.connect

        async def connect_too_late(job: PeerJob) -> None:
            await fleet.miners[0].runner.cleanup()
            await connect(job)

        monkeypatch.setattr(peer_job.PeerJob, "connect", connect_too_late)
        with pytest.raises(Unavailable, match=r"miner uid 1 at 127\.0\.0\.1:\d+ cannot be reached"):
            await fleet.open_job(0, 1)


@in_loop
async def test_a_rank_that_never_opens_its_streams_is_lost_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(miner_job, "UNUSED_RESERVATION_S", 0.2)
    monkeypatch.setattr(miner_job, "CHECK_S", 0.02)
    async with Fleet(1) as fleet:
        connect = peer_job.PeerJob.connect

        async def connect_unless_rank_2(job: PeerJob) -> None:
            if job.rank != 1:
                await connect(job)

        monkeypatch.setattr(peer_job.PeerJob, "connect", connect_unless_rank_2)
        job, _ = await fleet.open_jobs(2)
        with pytest.raises(
            peer_job.MapReduceError, match="rank 2 was lost in step 1: it opened no"
        ):
            await all_reduce(job, integers(0, 100))


# Upkeep -------------------------------------------------------------------------------------------


@in_loop
async def test_a_grant_is_renewed_on_every_miner_even_by_a_restarted_validator() -> None:
    async with Fleet(2) as fleet:
        (job,) = await fleet.open_jobs(1, miner_count=2)
        await fleet.stop_coordinator()
        await fleet.start_coordinator(fleet.validator.port)
        before = job.grant.expires_at
        await job._renew()
        assert job.grant.expires_at > before
        for node in fleet.miners:
            assert node.miner.jobs[job.grant.job]._expires_at == job.grant.expires_at
        await all_reduce_everywhere([job], [integers(0, 100_000)])


@in_loop
async def test_renewals_are_for_running_jobs_of_the_caller_only() -> None:
    async with Fleet(1) as fleet:
        one, other = [(await fleet.open_jobs(1, job=name))[0] for name in "ab"]
        validator, miner = fleet.validator, fleet.miners[0].remote
        status, code, _ = await fleet.refusal(
            other._key, validator, "POST", "/v1/renew", one._signed
        )
        assert (status, code) == (403, "not_in_job")
        old = fleet.sign(replace(one.grant, expires_at=one.grant.created_at - 1.0))
        status, code, text = await fleet.refusal(one._key, validator, "POST", "/v1/renew", old)
        assert (status, code) == (410, "expired")
        assert "open a new job" in text
        forged = fleet.sign(one.grant, new_hotkey())
        status, code, _ = await fleet.refusal(one._key, validator, "POST", "/v1/renew", forged)
        assert (status, code) == (400, "bad_message")

        path = f"/v1/jobs/{one.grant.job}/grant"
        status, code, text = await fleet.refusal(one._key, miner, "POST", path, other._signed)
        assert (status, code) == (400, "bad_message")
        assert "another job's" in text
        status, code, _ = await fleet.refusal(other._key, miner, "POST", path, one._signed)
        assert (status, code) == (403, "not_in_job")


@in_loop
async def test_a_job_ends_with_its_grant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "GRANT_LIFETIME_S", 0.5)
    monkeypatch.setattr(miner_job, "CHECK_S", 0.02)
    async with Fleet(1) as fleet:
        (job,) = await fleet.open_jobs(1)
        await until(lambda: job.session.lost, "the miner ends the job")
        with pytest.raises(MinerLost, match="the grant has expired"):
            await all_reduce(job, integers(0, 100))
        await until(lambda: not fleet.miners[0].miner.jobs, "the memory is free")


# Reports ------------------------------------------------------------------------------------------


def report(job: PeerJob, **changes: Any) -> Report:
    fields: dict[str, Any] = {
        "grant": job._signed,
        "rank": job.rank,
        "step": 1,
        "committed_step": 0,
        "outcome": "in_doubt",
        "lost_miners": [],
        "message": "",
    }
    return Report(**(fields | changes))


@in_loop
async def test_a_report_is_the_callers_own_and_answers_what_others_saw() -> None:
    async with Fleet(1) as fleet:
        one, two = await fleet.open_jobs(2)

        async def tell(job: PeerJob, **changes: Any) -> ReportAnswer:
            status, answer = await fleet.request(
                job._key, fleet.validator, "POST", "/v1/report", report(job, **changes)
            )
            assert status == 200
            return decode_message(ReportAnswer, json.dumps(answer))

        assert await tell(one) == ReportAnswer(committed_step=0, failed_steps=[])
        await tell(two, step=3, committed_step=3, outcome="committed")
        await tell(two, step=5, committed_step=4, outcome="failed")
        assert await tell(one) == ReportAnswer(committed_step=4, failed_steps=[5])
        status, code, text = await fleet.refusal(
            one._key, fleet.validator, "POST", "/v1/report", report(one, rank=1)
        )
        assert (status, code) == (400, "bad_message")
        assert "of rank 2, the caller 1" in text
        stranger = new_session_key()
        status, code, _ = await fleet.refusal(
            stranger, fleet.validator, "POST", "/v1/report", report(one)
        )
        assert (status, code) == (403, "not_in_job")


async def bring_into_doubt(fleet: Fleet, jobs: list[PeerJob], keep: int | None) -> list[Any]:
    """A step that every rank acknowledges while only rank `keep` (index) hears the commit."""
    node = fleet.miners[0]
    session = node.miner.jobs[jobs[0].grant.job].session
    send, streams = session._send_step, node.miner.jobs[jobs[0].grant.job]._streams

    def send_step(rank: int, kind: Any, *args: Any, **kwargs: Any) -> None:
        if kind.name != "COMMIT" or rank == keep:
            send(rank, kind, *args, **kwargs)
        if kind.name == "COMMIT" and rank == len(jobs) - 1:
            for stream in tuple(streams.values()):
                if stream.index != keep:
                    asyncio.get_running_loop().call_soon(stream.fail, "lost on purpose")

    session._send_step = send_step  # type: ignore[method-assign]
    return await asyncio.gather(
        *(all_reduce(job, integers(job.rank, 1000)) for job in jobs), return_exceptions=True
    )


@pytest.mark.parametrize("restart", [False, True])
def test_a_step_in_doubt_ends_as_the_rank_that_knows_reports(restart: bool) -> None:
    @in_loop
    async def run() -> None:
        async with Fleet(1) as fleet:
            jobs = await fleet.open_jobs(2)
            if restart:
                await fleet.stop_coordinator()
                await fleet.start_coordinator(fleet.validator.port)
            doubting = asyncio.create_task(bring_into_doubt(fleet, jobs, keep=0))
            step_of = jobs[1].session
            await until(
                lambda: step_of.step and step_of.step.phase is Phase.IN_DOUBT, "rank 2 doubts"
            )
            # Rank 1 has the commit; it reports as soon as the same miner is gone for it too.
            await fleet.miners[0].runner.cleanup()
            one, two = await doubting
            assert (one == two).all()
            assert (one == integers(0, 1000) + integers(1, 1000)).all()

    run()


@in_loop
async def test_a_step_that_nobody_knows_about_stays_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_job, "DOUBT_TIMEOUT_S", 0.3)
    async with Fleet(1) as fleet:
        jobs = await fleet.open_jobs(2)
        for error in await bring_into_doubt(fleet, jobs, keep=None):
            assert isinstance(error, StepInDoubt)
            assert "step 1" in str(error)
            assert "miner uid 1" in str(error)
            assert "nobody reachable" in str(error)
        # A doubt is no failure: nobody may learn from it that the step failed.
        status, answer = await fleet.request(
            jobs[0]._key, fleet.validator, "POST", "/v1/report", report(jobs[0])
        )
        assert (status, answer["failed_steps"]) == (200, [])


@in_loop
async def test_a_dead_validator_ends_no_running_job() -> None:
    async with Fleet(2) as fleet:
        jobs = await fleet.open_jobs(2)
        await fleet.stop_coordinator()
        await all_reduce_everywhere(jobs, [integers(rank, 100_000) for rank in range(2)])
        with pytest.raises(Unavailable, match="validator uid 0"):
            await jobs[0]._renew()
        await fleet.miners[0].runner.cleanup()
        for job in jobs:
            with pytest.raises(MinerLost, match="miner uid 1 "):
                await all_reduce(job, integers(0, 400_000))


@in_loop
async def test_a_grant_for_other_keys_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Fleet(1) as fleet:
        make = fleet.coordinator._make_grant

        def for_strangers(*args: Any) -> Grant:
            return replace(make(*args), session_keys=[new_session_key().ss58_address])

        monkeypatch.setattr(fleet.coordinator, "_make_grant", for_strangers)
        with pytest.raises(BadMessage, match="does not name this peer"):
            await fleet.open_job(0, 1)
        monkeypatch.setattr(fleet.coordinator, "_make_grant", make)
        monkeypatch.setattr(grants, "signer", lambda key: lambda statement: bytes(64))
        with pytest.raises(JobRefused, match="signature of this grant"):
            await fleet.open_job(0, 1)


@in_loop
async def test_a_job_of_many_hours_renews_once_in_half_a_lifetime() -> None:
    async with Fleet(1) as fleet:
        (job,) = await fleet.open_jobs(1)
        now = time.time()
        job.grant = replace(job.grant, created_at=now - 36_000, expires_at=now + 3600)
        assert job._renewal_time() >= now + 1800
