"""Both ends of the protocol in memory: every schedule ends, every rank gets the same bytes, every
failure is named."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from mapreduce.core.dtypes import DType
from mapreduce.core.reduce import ReduceOp, reduce_reference
from mapreduce.errors import (
    CollectiveMismatch,
    MinerLost,
    PeerLost,
    PeerTimeout,
    ShapeMismatch,
    StepAborted,
    StepInDoubt,
)
from mapreduce.wire.bodies import TensorSpec
from mapreduce.wire.peer_session import Phase
from mapreduce.wire.terms import Terms
from test.memory_job import MemoryJob

KIB = 1024


def terms(peers: int, miners: int, *, window: int = 64 * KIB, frame: int = 32 * KIB) -> Terms:
    return Terms(
        peer_count=peers,
        miner_count=miners,
        bandwidth=64 << 20,
        window_bytes=window,
        frame_bytes=frame,
    )


def gradients(peers: int, count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(count, dtype=np.float32) for _ in range(peers)]


def assert_reduced(job: MemoryJob, tensors: list[np.ndarray], op: ReduceOp) -> None:
    expected = reduce_reference(tensors, DType.FLOAT32, op).tobytes()
    for rank, peer in enumerate(job.peers):
        assert peer.step is not None
        assert peer.step.phase is Phase.COMMITTED, peer.step.error
        assert bytes(job.results[rank]) == expected


@pytest.mark.parametrize(("peers", "miners"), [(1, 1), (2, 1), (3, 2), (2, 4), (4, 3)])
def test_all_reduce_gives_every_rank_the_rank_order_sum(peers: int, miners: int) -> None:
    job = MemoryJob(terms(peers, miners), seed=peers * 10 + miners)
    for step in range(3):
        tensors = gradients(peers, 250_000 + step, seed=step)
        op = ReduceOp.SUM if step == 1 else ReduceOp.AVG
        job.all_reduce(tensors, op)
        job.run()
        assert_reduced(job, tensors, op)


@pytest.mark.parametrize("count", [0, 1, 3, 4096, 65_536, 65_537, 200_000])
def test_tensors_smaller_than_the_miners(count: int) -> None:
    job = MemoryJob(terms(3, 4), seed=count)
    for _ in range(4):  # the anchor moves from miner to miner
        tensors = gradients(3, count)
        job.all_reduce(tensors)
        job.run()
        assert_reduced(job, tensors, ReduceOp.AVG)


@pytest.mark.parametrize("root", [0, 2])
@pytest.mark.parametrize("count", [0, 5, 300_001])
def test_broadcast_to_ranks_that_know_nothing_and_to_ranks_that_pass_a_tensor(
    root: int, count: int
) -> None:
    job = MemoryJob(terms(3, 4), seed=count)
    tensor = gradients(1, count)[0]
    for rank in range(3):
        given = tensor if rank == root else None if rank == 1 else np.zeros_like(tensor)
        job.begin(rank, ReduceOp.BROADCAST, given, root=root, contribute=rank == root)
    job.run()
    for rank, peer in enumerate(job.peers):
        assert peer.step is not None
        assert peer.step.phase is Phase.COMMITTED, peer.step.error
        assert peer.step.tensor == TensorSpec(dtype=DType.FLOAT32, shape=(count,))
        if rank != root:
            assert bytes(job.results[rank]) == tensor.tobytes()


@pytest.mark.parametrize("peers", [2, 3, 4, 5])
def test_every_order_of_arrival_gives_the_same_bytes_and_the_same_root(peers: int) -> None:
    """A1: in full, the uploads of all ranks in all orders, one whole upload after the other."""
    tensors = gradients(peers, 9000, seed=peers)
    tensors[0][:3] = np.array([1e-45, -0.0, np.inf], dtype=np.float32)
    results, roots = set(), set()
    for order in itertools.permutations(range(peers)):
        job = MemoryJob(terms(peers, 1))
        job.all_reduce(tensors, ReduceOp.SUM)
        for rank in order:
            while job._uploadable(rank):
                job._peer_upload(rank)
            if job.peers[rank]._control[0]:
                job._peer_control((rank, 0))
            while job.streams[rank, 0].to_miner:
                job._deliver_to_miner((rank, 0))
        job.run()
        assert_reduced(job, tensors, ReduceOp.SUM)
        results.update(bytes(result) for result in job.results if result is not None)
        roots.update(p.step.trust.certificates[0].root for p in job.peers if p.step)
    assert len(results) == len(roots) == 1


def test_results_come_back_while_the_upload_is_still_running() -> None:
    job = MemoryJob(terms(2, 1, window=16 * KIB, frame=16 * KIB))
    steps = job.all_reduce(gradients(2, 100_000))
    job.run()
    # With a window of one block nothing could be sent at all unless results released it on the way.
    assert all(step.phase is Phase.COMMITTED for step in steps)


def test_a_miner_holds_one_window_a_peer_and_one_ring_whatever_the_tensor() -> None:
    job = MemoryJob(terms(3, 1))
    job.all_reduce(gradients(3, 1_000_000))
    job.run()
    miner = job.miners[0]
    held = sum(len(ring) for ring in miner._rings) + len(miner._output._buffer)
    assert held == job.terms.miner_bytes


@pytest.mark.parametrize("seed", range(30))
def test_every_schedule_comes_to_an_end(seed: int) -> None:
    check_schedule(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30, 3000))
def test_every_schedule_comes_to_an_end_thousands(seed: int) -> None:
    check_schedule(seed)


def check_schedule(seed: int) -> None:
    """Random job, sizes, windows from one block, socket sizes and order of everything."""
    rng = random.Random(seed)
    peers, miners = rng.randint(1, 5), rng.randint(1, 6)
    frame = rng.choice((1, 2, 4)) * 16 * KIB
    window = rng.choice((1, 2, 3, 8)) * 16 * KIB
    job = MemoryJob(
        terms(peers, miners, window=window, frame=frame),
        seed=seed,
        socket_bytes=rng.choice((1, 16 * KIB, 256 * KIB)),
    )
    for step in range(rng.randint(1, 4)):
        count = rng.choice((0, 1, 1000, 70_000, 200_000, 400_000))
        if rng.random() < 0.3:
            root = rng.randrange(peers)
            tensor = gradients(1, count, seed=step)[0]
            for rank in range(peers):
                given = tensor if rank == root or rng.random() < 0.5 else None
                job.begin(rank, ReduceOp.BROADCAST, given, root=root, contribute=rank == root)
            job.run()
            assert all(p.step and p.step.phase is Phase.COMMITTED for p in job.peers)
        else:
            tensors = gradients(peers, count, seed=step)
            op = rng.choice((ReduceOp.AVG, ReduceOp.SUM))
            order = list(range(peers))
            rng.shuffle(order)
            for rank in order:
                job.begin(rank, op, tensors[rank])
                job.run_some(rng.choice((0, 0, 3, 50)))
            job.run()
            assert_reduced(job, tensors, op)
    assert job.violations == []


# Disagreement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1000, 1001, 1000), (1000, 400_000, 1000), (0, 5, 5)])
def test_different_shapes_fail_on_every_rank_naming_them(sizes: tuple[int, ...]) -> None:
    job = MemoryJob(terms(3, 4))
    for _ in range(3):
        for rank, size in enumerate(sizes):
            job.begin(rank, ReduceOp.AVG, gradients(1, size)[0])
        job.run()
        for peer in job.peers:
            assert peer.step is not None
            error = peer.step.error
            assert isinstance(error, ShapeMismatch)
            assert error.differences["shape"] == {r + 1: f"({s},)" for r, s in enumerate(sizes)}
    tensors = gradients(3, 70_000)  # the job lives on
    job.all_reduce(tensors)
    job.run()
    assert_reduced(job, tensors, ReduceOp.AVG)


def test_different_dtypes_ops_and_calls_are_named() -> None:
    job = MemoryJob(terms(2, 2))
    job.begin(0, ReduceOp.SUM, np.zeros(4, dtype=np.float32))
    job.begin(1, ReduceOp.SUM, np.zeros(4, dtype=np.int32))
    job.run()
    error = job.peers[0].step.error  # type: ignore[union-attr]
    assert isinstance(error, CollectiveMismatch)
    assert "dtype (rank 1: float32, rank 2: int32)" in str(error)

    job.begin(0, ReduceOp.BROADCAST, None, root=1, contribute=False)
    job.begin(1, ReduceOp.AVG, np.zeros(4, dtype=np.float32))
    job.run()
    error = job.peers[1].step.error  # type: ignore[union-attr]
    assert isinstance(error, CollectiveMismatch)
    assert "op (rank 1: broadcast, rank 2: avg)" in str(error)


def test_two_roots_are_a_mismatch() -> None:
    job = MemoryJob(terms(2, 1))
    for rank in range(2):
        job.begin(rank, ReduceOp.BROADCAST, np.zeros(4, dtype=np.float32), root=rank)
    job.run()
    assert all("root" in str(peer.step.error) for peer in job.peers if peer.step)


# Loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moves", [0, 10, 100, 400])
def test_a_lost_peer_fails_the_step_on_the_others_by_name(moves: int) -> None:
    job = MemoryJob(terms(3, 2), seed=moves)
    steps = job.all_reduce(gradients(3, 300_000))
    job.run_some(moves)
    job.kill_peer(1)
    job.run()
    for rank in (0, 2):
        assert isinstance(steps[rank].error, PeerLost)
        assert steps[rank].error.rank == 2
    job.begin(0, ReduceOp.AVG, gradients(1, 10)[0])  # and every later step at once
    job.run()
    assert isinstance(job.peers[0].step.error, PeerLost)  # type: ignore[union-attr]


@pytest.mark.parametrize("moves", [0, 10, 100, 400])
def test_a_lost_miner_is_named_with_its_segment(moves: int) -> None:
    job = MemoryJob(terms(3, 2), seed=moves)
    steps = job.all_reduce(gradients(3, 300_000))
    job.run_some(moves)
    job.kill_miner(1)
    job.run()
    for step in steps:
        assert isinstance(step.error, MinerLost)
        assert (step.error.uid, step.error.segment) == (11, 1)
    with pytest.raises(MinerLost):
        job.begin(0, ReduceOp.AVG, gradients(1, 10)[0])


def test_one_broken_stream_fails_the_step_on_every_rank() -> None:
    job = MemoryJob(terms(3, 2))
    steps = job.all_reduce(gradients(3, 300_000))
    job.run_some(50)
    job.cut(0, 1)
    job.run()
    assert all(step.phase is Phase.FAILED for step in steps)
    assert isinstance(steps[0].error, MinerLost)
    assert all(isinstance(step.error, (MinerLost, PeerLost)) for step in steps)


@pytest.mark.parametrize("seed", range(60))
def test_ranks_never_disagree_on_the_outcome_when_streams_break(seed: int) -> None:
    check_outcome(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60, 1000))
def test_ranks_never_disagree_on_the_outcome_when_streams_break_hundreds(seed: int) -> None:
    check_outcome(seed)


def check_outcome(seed: int) -> None:
    """Whatever breaks and whenever: no rank commits a step that another one saw fail, and a rank
    that does not commit has its tensor back."""
    job = MemoryJob(terms(3, 2), seed=seed)
    tensors = gradients(3, 140_000)
    steps = job.all_reduce(tensors)
    job.run_some(job.random.randrange(250, 420))
    for _ in range(job.random.randint(1, 3)):
        fault = job.random.choice(("cut", "peer", "miner"))
        if fault == "cut":
            job.cut(job.random.randrange(3), job.random.randrange(2))
        elif fault == "peer":
            job.kill_peer(job.random.randrange(3))
        else:
            job.kill_miner(job.random.randrange(2))
        job.run_some(job.random.randrange(20))
    job.run()
    phases = {step.phase for step in steps}
    assert not {Phase.COMMITTED, Phase.FAILED} <= phases, [step.error for step in steps]
    assert Phase.RUNNING not in phases
    expected = reduce_reference(tensors, DType.FLOAT32, ReduceOp.AVG).tobytes()
    for rank, step in enumerate(steps):
        if step.phase is Phase.COMMITTED:
            assert bytes(job.results[rank]) == expected
        else:
            job.peers[rank].resolve(None)  # those in doubt: nobody knows
            assert bytes(job.results[rank]) == tensors[rank].tobytes()


def test_an_acknowledged_rank_may_not_abort_and_learns_the_outcome_from_the_other_miner() -> None:
    job = MemoryJob(terms(2, 2))
    steps = job.all_reduce(gradients(2, 200_000))
    while any(step.phase is Phase.RUNNING for step in steps):
        job.run_some(1)
    interrupted = StepAborted(1, 1, "Ctrl+C")
    assert not job.peers[0].abort("peer_abort", "Ctrl+C", interrupted)
    job.cut(0, 0)
    job.run()
    # Miner 0 may have this rank's acknowledgement or not; miner 1 is going to.
    assert steps[0].phase is Phase.COMMITTED
    assert steps[1].phase is Phase.COMMITTED


def test_a_bound_rank_that_forsakes_its_step_has_its_tensor_back() -> None:
    job = MemoryJob(terms(2, 2))
    tensors = gradients(2, 200_000)
    steps = job.all_reduce(tensors)
    while steps[0].phase is Phase.RUNNING:
        job.run_some(1)
    job.peers[0].forsake(StepAborted(1, 1, "Ctrl+C"))
    assert bytes(job.results[0]) == tensors[0].tobytes()
    job.run()
    assert steps[0].phase is Phase.FAILED
    assert steps[1].phase is Phase.COMMITTED


def test_doubt_is_told_apart_from_failure() -> None:
    job = MemoryJob(terms(2, 1))
    steps = job.all_reduce(gradients(2, 70_000))
    while steps[0].phase is Phase.RUNNING:
        job.run_some(1)
    job.kill_miner(0)
    assert steps[0].phase is Phase.IN_DOUBT
    job.peers[0].resolve(None)
    assert isinstance(steps[0].error, StepInDoubt)


def test_abort_reaches_ranks_in_the_step_and_ranks_still_to_come() -> None:
    job = MemoryJob(terms(3, 2))
    tensors = gradients(3, 200_000)
    early = [job.begin(rank, ReduceOp.AVG, tensors[rank]) for rank in (0, 1)]
    job.run()
    assert all(step.phase is Phase.RUNNING and not step.entered for step in early)
    for miner in range(2):
        job.peers[0].ping(miner)
    job.run()
    assert early[0].waiting_for == (2,)

    error = PeerTimeout([3], 5, "not all ranks entered step 1")
    assert job.peers[0].abort("peer_timeout", str(error), error)
    job.run()
    late = job.begin(2, ReduceOp.AVG, tensors[2])
    job.run()
    assert early[0].error is error
    for step in (early[1], late):
        assert isinstance(step.error, StepAborted)
        assert step.error.rank == 1
        assert "rank 3" in str(step.error)
    job.all_reduce(tensors)
    job.run()
    assert_reduced(job, tensors, ReduceOp.AVG)


# Segments by rate ---------------------------------------------------------------------------------


def test_every_rank_gives_a_slow_miner_less_from_the_next_step_on() -> None:
    job = MemoryJob(terms(3, 3))
    tensors = gradients(3, 600_000)
    job.all_reduce(tensors)
    while job.run_some(1):
        job.now += 0.02 if job.streams[0, 2].to_peer else 0.0  # results of the third miner lag
    assert_reduced(job, tensors, ReduceOp.AVG)
    assert len({peer.weights for peer in job.peers}) == 1
    first = job.peers[0].step
    steps = job.all_reduce(tensors)
    job.run()
    assert_reduced(job, tensors, ReduceOp.AVG)
    assert first is not None
    assert steps[0].segments[2].length < first.segments[2].length
