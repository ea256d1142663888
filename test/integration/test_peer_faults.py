"""Processes that die, stop or are interrupted inside a step, and what a peer leaves behind."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from mapreduce.errors import MinerLost, PeerLost, StepAborted, ValidatorUnreachable
from mapreduce.local import LocalSubnet
from test.integration.ranks import open_ranks, run_ranks, succeed, together, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peer import Peer

pytestmark = pytest.mark.timeout(90)

BANDWIDTH = 1 << 20


@pytest.fixture(scope="module")
def subnet() -> Iterator[LocalSubnet]:
    with LocalSubnet(miners=5) as running:  # three of them do not survive the tests
        yield running


def in_step(peer: Peer, waiting_for: tuple[int, ...]) -> bool:
    """Whether this peer is inside a step and knows that it waits for exactly these ranks."""
    step = peer._job.session.step if peer._job else None
    return step is not None and tuple(rank + 1 for rank in step.waiting_for) == waiting_for


def destroy(*peers: Peer) -> None:
    succeed(together(*(peer.destroy_process_group for peer in peers)))


# Miners -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_miner_that_ends_mid_step_is_named_on_every_rank(
    subnet: LocalSubnet, number: signal.Signals
) -> None:
    one, two, late = open_ranks(subnet, 3, miner_count=2)
    victim = one.miners[1]  # step 1 of a small tensor begins at the second of two miners
    child = next(c for c in subnet.miners if c.name == f"miner-{victim.uid}")
    tensors = [torch.full((1000,), float(rank)) for rank in (1, 2, 3)]
    with ThreadPoolExecutor() as pool:
        steps = [pool.submit(p.all_reduce, x) for p, x in zip((one, two), tensors, strict=False)]
        wait_for(lambda: in_step(one, (3,)), "two ranks are in the step")
        child.send_signal(number)
        errors = [step.exception(timeout=20) for step in steps]
    if number == signal.SIGTERM:
        assert child.wait(10.0) == 0
    with pytest.raises(MinerLost) as caught:
        late.all_reduce(tensors[2])
    for error in (*errors, caught.value):
        assert isinstance(error, MinerLost)
        assert (error.uid, error.hotkey, error.segment) == (victim.uid, victim.hotkey, 1)
        assert number != signal.SIGTERM or "the miner is shutting down" in str(error)
    for rank, tensor in enumerate(tensors, start=1):
        assert torch.equal(tensor, torch.full((1000,), float(rank)))
    destroy(one, two, late)
    # The next job finds other miners.
    results = succeed(run_ranks(subnet, 2, lambda p: p.all_reduce(torch.ones(10)), miner_count=2))
    assert all(torch.equal(result, torch.ones(10)) for result in results)


def test_what_results_have_overwritten_comes_back_when_the_step_fails(subnet: LocalSubnet) -> None:
    one, two = open_ranks(subnet, 2, miner_count=2)
    victim = next(c for c in subnet.miners if c.name == f"miner-{one.miners[1].uid}")
    tensors = [torch.full((BANDWIDTH // 4,), float(rank)) for rank in (1, 2)]
    victim.send_signal(signal.SIGSTOP)  # the other miner's half of the tensor comes, and no more
    with ThreadPoolExecutor() as pool:
        steps = [pool.submit(p.all_reduce, x) for p, x in zip((one, two), tensors, strict=True)]
        wait_for(lambda: all(x[0] == 1.5 for x in tensors), "results are in both tensors")
        victim.send_signal(signal.SIGKILL)
        errors = [step.exception(timeout=20) for step in steps]
    assert all(isinstance(error, MinerLost) for error in errors)
    for rank, tensor in enumerate(tensors, start=1):
        assert torch.equal(tensor, torch.full((BANDWIDTH // 4,), float(rank)))
    destroy(one, two)


def test_a_validator_that_is_dead_is_unreachable_but_ends_no_job() -> None:
    with LocalSubnet(miners=1) as subnet:
        (peer,) = open_ranks(subnet, 1)
        assert subnet.validator is not None
        subnet.validator.kill()
        assert torch.equal(peer.all_reduce(torch.ones(100_000)), torch.ones(100_000))
        with pytest.raises(
            ValidatorUnreachable, match=r"validator uid 0 at 127\.0\.0\.\d:\d+ cannot be reached"
        ):
            subnet.peer(1, 1, BANDWIDTH).init_process_group()
        peer.destroy_process_group()


# Ranks --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rank_2_in_a_step(subnet: LocalSubnet, job: str) -> Iterator[tuple[Any, Peer, Any, Peer]]:
    """Rank 2 of 3 in a process of its own, rank 1 in a thread, both in step 1; rank 3 late."""
    place = [subnet.network, subnet.netuid, subnet.validator_uid, subnet.directory / "wallets"]
    process = subprocess.Popen(
        [sys.executable, "-m", "test.integration.one_rank", *map(str, place), "2", "3", job],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process, ThreadPoolExecutor() as pool:
        options: dict[str, Any] = {"job": job, "miner_count": 1, "join_timeout": 30.0}
        peers = [subnet.peer(rank, 3, BANDWIDTH, **options) for rank in (1, 3)]
        try:
            succeed(together(*(peer.init_process_group for peer in peers)))
            step = pool.submit(peers[0].all_reduce, torch.ones(1000))
            wait_for(lambda: in_step(peers[0], (3,)), "ranks 1 and 2 are in the step", 30.0)
            yield process, peers[0], step, peers[1]
        finally:
            process.kill()
            destroy(*peers)


def test_a_rank_that_is_killed_mid_step_is_named(subnet: LocalSubnet) -> None:
    with rank_2_in_a_step(subnet, "killed") as (process, _, step, late):
        process.kill()
        error = step.exception(timeout=20)
        assert isinstance(error, PeerLost)
        assert error.rank == 2
        with pytest.raises(PeerLost, match="rank 2 was lost"):
            late.all_reduce(torch.ones(1000))


def test_ctrl_c_leaves_nothing_and_is_named_to_the_others(subnet: LocalSubnet) -> None:
    with rank_2_in_a_step(subnet, "interrupted") as (process, _, step, late):
        watched = psutil.Process(process.pid)
        assert watched.children(recursive=True) == []
        process.send_signal(signal.SIGINT)
        error = step.exception(timeout=20)
        assert isinstance(error, StepAborted)
        assert error.rank == 2
        assert "Ctrl+C" in str(error)
        out, err = process.communicate(timeout=20)
        assert out == "joined\n"
        assert re.search(r"^KeyboardInterrupt", err, re.M)
        assert "MapReduceError" not in err
        assert process.returncode == -signal.SIGINT
        with pytest.raises((StepAborted, PeerLost), match="rank 2"):
            late.all_reduce(torch.ones(1000))


def test_ctrl_c_in_this_process_leaves_the_peer_usable(subnet: LocalSubnet) -> None:
    one, two = open_ranks(subnet, 2, miner_count=1)
    x = torch.full((1000,), 2.0)

    def interrupt() -> None:
        wait_for(lambda: in_step(one, (2,)), "rank 1 is in the step")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        one.all_reduce(x)
    thread.join()
    with pytest.raises(StepAborted, match=r"rank 1: interrupted \(Ctrl\+C\)"):
        two.all_reduce(torch.ones(1000))
    assert torch.equal(x, torch.full((1000,), 2.0))
    succeed(together(lambda: one.all_reduce(x), lambda: two.all_reduce(torch.zeros(1000))))
    assert torch.equal(x, torch.ones(1000))
    destroy(one, two)


def test_an_error_of_one_rank_reaches_the_others(subnet: LocalSubnet) -> None:
    def train(peer: Peer) -> None:
        peer.all_reduce(torch.ones(10))
        if peer.rank == 2:
            raise ZeroDivisionError("a bug of the training script")
        peer.all_reduce(torch.ones(10))

    one, two, three = run_ranks(subnet, 3, train)
    assert isinstance(two, ZeroDivisionError)
    for error in (one, three):
        assert isinstance(error, PeerLost)
        assert error.rank == 2
        assert "the peer is done" in str(error)


# What is left -------------------------------------------------------------------------------------


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: `uordblks` and `hblkhd` are the bytes that are in use."""

    NAMES = (
        *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
        *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
    )
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def memory_in_use(process: psutil.Process) -> int:
    """Bytes that nobody has freed: resident memory moves by megabytes with what malloc keeps."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # another C library
        return int(process.memory_info().rss)
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def measure() -> tuple[int, int, int, int]:
    """Sockets, descriptors, threads and bytes in use of this process."""
    gc.collect()
    process = psutil.Process()
    sockets = len(process.net_connections())
    return sockets, process.num_fds(), threading.active_count(), memory_in_use(process)


def run_jobs(subnet: LocalSubnet, count: int) -> None:
    for _ in range(count):
        succeed(run_ranks(subnet, 2, lambda p: p.all_reduce(torch.ones(50_000)), miner_count=1))


@pytest.mark.parametrize("jobs", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_jobs_leave_no_socket_thread_or_memory(subnet: LocalSubnet, jobs: int) -> None:
    idle = measure()
    run_jobs(subnet, 5)
    after_5 = measure()
    run_jobs(subnet, jobs - 5)
    after_all = measure()
    assert after_all[:3] == after_5[:3]
    assert after_all[0] == idle[0]
    assert after_all[2] == idle[2]
    assert after_all[3] - after_5[3] < 1 << 20
    peers = [thread for thread in threading.enumerate() if thread.name.startswith("mapreduce-rank")]
    assert not peers


def test_ports_are_free_after_the_subnet() -> None:
    with LocalSubnet(miners=1) as subnet:
        ports = [subnet.axon(uid)[1] for uid in (0, 1)]
        pids = [child.pid for child in (subnet.validator, *subnet.miners) if child is not None]
        succeed(run_ranks(subnet, 1, lambda p: p.all_reduce(torch.ones(10))))
    listening = {c.laddr.port for c in psutil.net_connections() if c.status == psutil.CONN_LISTEN}
    assert not listening.intersection(ports)
    assert not any(psutil.pid_exists(pid) for pid in pids)
