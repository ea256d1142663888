"""The bulk stream on real sockets: the upgrade, its refusals, and every way in which it can end."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from mapreduce.errors import (
    JobClosed,
    MapReduceError,
    MinerLost,
    PeerLost,
    PeerTimeout,
    Refused,
    StepAborted,
    Unavailable,
)
from mapreduce.net import stream as net_stream
from mapreduce.net.auth import new_session_key, sign_request
from mapreduce.net.client import make_http_session
from mapreduce.services import miner_job, peer_job
from mapreduce.services.peer_job import PeerJob
from mapreduce.wire.frames import HEADER_BYTES, REPLY, Header, Kind, encode_frame
from test.integration.fleet import (
    Fleet,
    all_reduce,
    all_reduce_everywhere,
    errors_of,
    in_loop,
    integers,
    tensors,
    until,
)
from test.integration.raw_stream import RawStream, jobs_and_raw

if TYPE_CHECKING:
    from bittensor.sp_core import Keypair

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
MIB = 1 << 20


# Upgrade ------------------------------------------------------------------------------------------


@in_loop
async def test_the_miner_answers_only_after_hello() -> None:
    async with Fleet(1) as fleet:
        job, (key,) = await fleet.offer()
        stream = await RawStream.open(fleet.miners[0], job, key)
        stream.send(Kind.PING)
        header = await stream.receive()
        assert (header.kind, header.flags) == (Kind.PING, REPLY)
        stream.writer.close()


@pytest.mark.parametrize("first", ["wrong nonce", "another frame", "garbage"])
def test_a_stream_that_does_not_begin_with_hello_is_cut(first: str) -> None:
    @in_loop
    async def run() -> None:
        async with Fleet(1) as fleet:
            job, (key,) = await fleet.offer()
            stream = await RawStream.open(fleet.miners[0], job, key, hello=False)
            if first == "wrong nonce":
                stream.send(Kind.HELLO, os.urandom(32))
            elif first == "another frame":
                stream.send(Kind.PING)
            else:
                stream.writer.write(b"GET / HTTP/1.1\r\nHost: nobody\r\n\r\n")
            assert await stream.cut()
            if first == "wrong nonce":  # all of it was read, so no reset overtakes the answer
                assert b"protocol violation: the stream does not begin" in stream.farewell
            stream.writer.close()
            await until(lambda: not fleet.miners[0].miner.jobs, "the job ends")

    run()


@in_loop
async def test_a_stream_that_says_nothing_is_cut_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(net_stream, "HELLO_TIMEOUT_S", 0.1)
    async with Fleet(1) as fleet:
        job, (key,) = await fleet.offer()
        with caplog.at_level("INFO", "mapreduce"):
            stream = await RawStream.open(fleet.miners[0], job, key, hello=False)
            assert await stream.cut()
            await until(lambda: not fleet.miners[0].miner.jobs, "the job ends")
        stream.writer.close()
        assert "no HELLO in 0.1 s" in [getattr(r, "reason", "") for r in caplog.records]


@in_loop
async def test_refusals_of_a_stream_are_errors_with_a_code() -> None:
    async with Fleet(1) as fleet:
        node = fleet.miners[0]
        (job,) = await fleet.open_jobs(1)

        async def refused(key: Keypair, grant_job: str) -> tuple[int | None, str, str]:
            peer = PeerJob(
                make_http_session(), fleet.validator, key, job._signed, job.grant, job.rank
            )
            path = f"/v1/jobs/{grant_job}/stream"
            headers = sign_request(
                key, method="GET", path=path, body=b"", receiver=node.remote.hotkey
            )
            stream = net_stream.FrameStream(peer, peer.session.reader(0), 0)
            with pytest.raises(Refused, match=r"miner uid 1 at 127\.0\.0\.1:\d+ refused") as caught:
                await net_stream.connect_stream(peer._http, node.remote, path, headers, stream)
            await peer.close()
            return caught.value.status, caught.value.code, str(caught.value)

        stranger = new_session_key()
        assert (await refused(stranger, job.grant.job))[:2] == (403, "not_in_job")
        assert (await refused(stranger, "0" * 32))[:2] == (404, "no_such_job")
        status, code, text = await refused(job._key, job.grant.job)
        assert (status, code) == (409, "stream_taken")
        assert "rank 1 has had its stream" in text
        await all_reduce_everywhere([job], [integers(0, 1000)])  # the first one lives on


@in_loop
async def test_a_server_that_is_no_miner_is_named() -> None:
    async with Fleet(1) as fleet:
        answers = [
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
            b"not http at all\r\n\r\n",
            b"",
        ]

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answers.pop(0) if answers else b"")  # the client may try once more
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            key = new_session_key()
            port = server.sockets[0].getsockname()[1]
            for says in ("without a nonce", "HTTP status 200", "cannot be reached", "cannot be"):
                grant = fleet.grant([key], fleet.miners)
                job = PeerJob(
                    make_http_session(), fleet.validator, key, fleet.sign(grant), grant, 0
                )
                job.miners = [net_stream.Remote("miner uid 7", key.ss58_address, "127.0.0.1", port)]
                with pytest.raises(ExceptionGroup) as caught:
                    await job.connect()
                await job.close()
                (error,) = caught.value.exceptions
                assert isinstance(error, Unavailable | Refused)
                assert "miner uid 7 at 127.0.0.1" in str(error)
                assert says in str(error)


# Breaking it --------------------------------------------------------------------------------------


VIOLATIONS = {
    "lost its framing": b"X" * HEADER_BYTES,
    "unknown frame kind 99": b"MR\x63" + bytes(29),
    "may not send RESULT": Header(kind=Kind.RESULT, length=16).encode() + b"x",
    "may not send COMMIT": encode_frame(Header(kind=Kind.COMMIT, length=1), b"\x01"),
    "for step 9, which was not opened": Header(kind=Kind.DATA, step=9, length=16).encode() + b"x",
    "DATA of 16777216 bytes": Header(kind=Kind.DATA, length=16 * MIB).encode() + b"x",
    "at most 65536 are allowed": Header(kind=Kind.ABORT, length=65537).encode(),
    "OPEN body of 1 bytes is too short": encode_frame(
        Header(kind=Kind.OPEN, step=1, rank=2, length=1), b"\x01"
    ),
}


@pytest.mark.parametrize("says", VIOLATIONS)
def test_a_violation_ends_that_stream_only_and_is_named_to_the_others(says: str) -> None:
    @in_loop
    async def run() -> None:
        async with Fleet(1) as fleet:
            other_jobs = await fleet.open_jobs(2)
            jobs, raw = await jobs_and_raw(fleet, 2)
            failing = asyncio.create_task(errors_of(jobs))
            await until(lambda: jobs[0].session.step, "the step begins")
            raw.writer.write(VIOLATIONS[says])
            assert await raw.cut()
            raw.writer.close()
            for error in await failing:
                assert isinstance(error, PeerLost)
                assert error.rank == 3
                assert says in str(error)
            assert all(not job.session.lost for job in jobs)
            await all_reduce_everywhere(other_jobs, tensors(other_jobs, 100_000))

    run()


@in_loop
async def test_a_miner_that_breaks_the_protocol_is_named_and_left() -> None:
    async with Fleet(1) as fleet:
        jobs = await fleet.open_jobs(2)
        session = fleet.miners[0].miner.jobs[jobs[0].grant.job].session
        send = session._send_step

        def send_nonsense(rank: int, kind: Kind, *args: Any, **kwargs: Any) -> None:
            send(rank, Kind.ACK if kind is Kind.CERTIFICATE else kind, *args, **kwargs)

        session._send_step = send_nonsense  # type: ignore[method-assign]
        for error in await errors_of(jobs):
            assert isinstance(error, MinerLost)
            assert (error.uid, error.hotkey) == (1, fleet.miners[0].remote.hotkey)
            assert "ACK" in str(error)


@in_loop
async def test_a_reset_by_a_peer_fails_the_step_on_the_others() -> None:
    async with Fleet(1) as fleet:
        jobs, raw = await jobs_and_raw(fleet, 2)
        failing = asyncio.create_task(errors_of(jobs))
        await until(lambda: jobs[0].session.step, "the step begins")
        raw.reset()
        for error in await failing:
            assert isinstance(error, PeerLost)
            assert error.rank == 3
        await until(lambda: len(fleet.connections()) <= 4, "the table forgets the stream")


@in_loop
async def test_a_reset_by_a_miner_is_the_loss_of_that_miner() -> None:
    async with Fleet(2) as fleet:
        jobs = await fleet.open_jobs(2)
        node = fleet.miners[0]
        failing = asyncio.create_task(errors_of(jobs[:1]))  # rank 2 does not come
        await until(lambda: jobs[0].session.step, "the step begins")
        for stream in tuple(node.miner.jobs[jobs[0].grant.job]._streams.values()):
            assert stream._transport is not None
            raw = stream._transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream._transport.abort()
        (error,) = await failing
        assert isinstance(error, MinerLost)
        assert (error.uid, error.hotkey) == (node.uid, node.remote.hotkey)
        with pytest.raises(MinerLost, match=f"miner uid {node.uid} "):
            await all_reduce(jobs[1], integers(1, 100))


@in_loop
async def test_a_rank_that_lost_a_miner_between_steps_does_not_keep_the_others_waiting() -> None:
    async with Fleet(2) as fleet:
        jobs = await fleet.open_jobs(2, miner_count=2)
        await all_reduce_everywhere(jobs, tensors(jobs, 1000))  # step 1 is at segment 1's miner
        jobs[0]._streams[1].fail("connection reset")
        await until(lambda: jobs[0].session.lost, "rank 1 has lost its miner")
        waiting = asyncio.create_task(all_reduce(jobs[1], integers(1, 10)))  # at the other miner
        await until(lambda: jobs[1].session.step.number == 2, "rank 2 has entered")  # type: ignore[union-attr]
        with pytest.raises(MinerLost):
            await all_reduce(jobs[0], integers(0, 10))
        with pytest.raises(PeerLost, match="rank 1 was lost in step 2: miner uid"):
            await waiting


@in_loop
async def test_a_silent_peer_is_cut_and_one_that_pings_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(miner_job, "SILENCE_S", 0.4)
    monkeypatch.setattr(miner_job, "CHECK_S", 0.02)
    monkeypatch.setattr(peer_job, "PING_IDLE_S", 0.02)
    async with Fleet(1) as fleet:
        jobs, raw = await jobs_and_raw(fleet, 1)
        with pytest.raises(PeerLost, match="rank 2 was lost in step 1: no sign of life") as caught:
            await all_reduce(jobs[0], integers(0, 1000))
        assert caught.value.rank == 2
        assert await raw.cut()
        raw.writer.close()
        assert not jobs[0].session.lost


@in_loop
async def test_a_silent_miner_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_job, "SILENCE_S", 0.2)
    monkeypatch.setattr(peer_job, "PING_IDLE_S", 0.02)
    async with Fleet(1) as fleet:
        (job,) = await fleet.open_jobs(1)
        for stream in fleet.miners[0].miner.jobs[job.grant.job]._streams.values():
            assert stream._transport is not None
            stream._transport.pause_reading()
        with pytest.raises(MinerLost, match=r"no sign of life for 0\.2 s"):
            await all_reduce(job, integers(0, 1000))


@in_loop
async def test_a_miner_that_stops_mid_step_says_goodbye() -> None:
    async with Fleet(2) as fleet:
        jobs, raw = await jobs_and_raw(fleet, 2)
        failing = asyncio.create_task(errors_of(jobs))
        await until(lambda: jobs[0].session.step, "the step begins")
        await fleet.miners[0].runner.cleanup()
        for error in await failing:
            assert isinstance(error, MinerLost)
            assert "it said goodbye: the miner is shutting down" in str(error)
        raw.writer.close()


# Giving up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deadline", "seconds"), [("timeout_s", 0.1), ("enter_timeout_s", 0.2)])
def test_a_deadline_names_the_ranks_that_did_not_come(deadline: str, seconds: float) -> None:
    @in_loop
    async def run() -> None:
        async with Fleet(2) as fleet:
            jobs = await fleet.open_jobs(3)
            with pytest.raises(PeerTimeout) as caught:
                await all_reduce(jobs[0], integers(0, 50_000), **{deadline: seconds})
            assert caught.value.ranks == (2, 3)
            assert f"after {seconds:g} s: waiting for ranks 2, 3" in str(caught.value)
            for late in jobs[1:]:
                with pytest.raises(StepAborted, match="aborted by rank 1") as aborted:
                    await all_reduce(late, integers(1, 50_000))
                assert aborted.value.rank == 1
            await all_reduce_everywhere(jobs, tensors(jobs, 50_000))

    run()


@in_loop
async def test_a_cancelled_collective_fails_everywhere_and_the_job_lives_on() -> None:
    async with Fleet(2) as fleet:
        jobs = await fleet.open_jobs(3)
        failing = [asyncio.create_task(all_reduce(job, integers(0, 50_000))) for job in jobs[:2]]
        await until(lambda: all(job.session.step for job in jobs[:2]), "two ranks are in")
        failing[0].cancel()
        with pytest.raises(StepAborted) as caught:
            await failing[1]
        assert caught.value.rank == 1
        with pytest.raises(StepAborted):
            await all_reduce(jobs[2], integers(0, 50_000))
        await all_reduce_everywhere(jobs, tensors(jobs, 50_000))


@in_loop
async def test_a_job_closed_inside_a_step_ends_it_for_all() -> None:
    async with Fleet(2) as fleet:
        jobs = await fleet.open_jobs(3)
        failing = asyncio.create_task(errors_of(jobs[:2]))
        await until(lambda: all(job.session.step for job in jobs[:2]), "two ranks are in")
        await jobs[0].close()
        mine, theirs = await failing
        assert isinstance(mine, JobClosed)
        assert isinstance(theirs, StepAborted)
        assert theirs.rank == 1
        with pytest.raises(MapReduceError, match="rank 1"):
            await all_reduce(jobs[2], integers(0, 50_000))
