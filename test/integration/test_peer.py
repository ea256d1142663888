"""The public `Peer` on a subnet of real processes: what works, and what is refused by name."""

from __future__ import annotations

import asyncio
import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from mapreduce.errors import (
    ChainUnavailable,
    CollectiveMismatch,
    ConfigError,
    InvalidArgument,
    JobClosed,
    JobRefused,
    PeerTimeout,
    ShapeMismatch,
    StepAborted,
    TensorTooLarge,
    UnsupportedTensor,
    ValidatorUnreachable,
    WalletError,
)
from mapreduce.local import NETUID, LocalSubnet
from peer import Peer
from test.integration.ranks import BANDWIDTH, open_ranks, run_ranks, succeed, together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def subnet() -> Iterator[LocalSubnet]:
    with LocalSubnet(miners=2) as running:
        yield running


# What works ---------------------------------------------------------------------------------------


def test_steps_on_warm_connections_in_place_and_returned(subnet: LocalSubnet) -> None:
    def train_steps(peer: Peer) -> list[int]:
        for step in range(1, 6):
            x = torch.full((1000,), float(peer.rank))
            version = x._version
            assert peer.all_reduce(x, "sum") is x
            assert x._version > version  # autograd must notice that it was written to
            assert torch.equal(x, torch.full((1000,), 6.0))
            assert peer.last_step is not None
            assert peer.last_step.step == step
            assert peer.last_step.tensor_bytes == 4000
            assert peer.last_step.bytes_up == peer.last_step.bytes_down == 4000
            assert peer.last_step.seconds > 0
            assert peer.last_step.mbit_per_s_up > 0
        assert peer.all_reduce(torch.ones(200_000)).sum() == 200_000
        assert torch.equal(peer.broadcast(torch.ones(3) if peer.rank == 1 else None), torch.ones(3))
        return [miner.uid for miner in peer.miners]

    uids = succeed(run_ranks(subnet, 3, train_steps))
    assert uids[0] == uids[1] == uids[2]
    assert sorted(uids[0]) == [1, 2]


def test_several_jobs_in_one_process(subnet: LocalSubnet) -> None:
    def job(offset: float) -> Callable[[], Any]:
        def reduce(peer: Peer) -> float:
            return float(peer.all_reduce(torch.tensor([peer.rank + offset]))[0])

        return lambda: run_ranks(subnet, 2, reduce, job=f"several {offset}")

    assert together(*(job(10.0 * n) for n in range(3))) == [[1.5, 1.5], [11.5, 11.5], [21.5, 21.5]]


def test_one_rank_alone(subnet: LocalSubnet) -> None:
    def alone(peer: Peer) -> None:
        x = torch.randn(100_000)
        before = x.clone()
        assert torch.equal(peer.all_reduce(x), before)
        assert torch.equal(peer.broadcast(x), before)
        assert len(peer.miners) == 1

    succeed(run_ranks(subnet, 1, alone))


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


def test_dtypes_shapes_and_strides(subnet: LocalSubnet) -> None:
    def reduce(peer: Peer) -> None:
        for dtype in FLOATS + INTEGERS:
            for shape in ((), (0,), (7,), (3, 5), (2, 0, 3), (40_000,)):
                x = torch.full(shape, peer.rank, dtype=dtype)
                peer.all_reduce(x, "sum")
                assert torch.equal(x, torch.full(shape, 3, dtype=dtype)), (dtype, shape)
        for dtype in FLOATS:
            x = torch.full((50,), 2 * peer.rank, dtype=dtype)
            assert torch.equal(peer.all_reduce(x), torch.full((50,), 3, dtype=dtype))

        base = torch.arange(24.0).reshape(4, 6) * peer.rank
        view = base.t()[::2]
        assert not view.is_contiguous()
        peer.all_reduce(view, "sum")
        expected = torch.arange(24.0).reshape(4, 6) * peer.rank
        expected.t()[::2] = torch.arange(24.0).reshape(4, 6).t()[::2] * 3
        assert torch.equal(base, expected)

        for array in (np.ones(5), np.array(1.0), np.ones((0, 2)), np.ones((4, 6)).T[::2]):
            array *= peer.rank
            assert peer.all_reduce(array, "sum") is array
            assert (array == 3).all()
        counts = np.array([peer.rank], dtype=np.int64)
        assert peer.all_reduce(counts, op="sum")[0] == 3

    succeed(run_ranks(subnet, 2, reduce))


def test_broadcast_is_verbatim_and_takes_any_dtype(subnet: LocalSubnet) -> None:
    quiet_with_payload = torch.tensor([0x7FC01234, -1, 0x7F800001], dtype=torch.int32)

    def send(peer: Peer) -> None:
        def everywhere(value: Any, into: Any = None, src: int = 1) -> Any:
            return peer.broadcast(value if peer.rank == src else into, src=src)

        odd = everywhere(quiet_with_payload.view(torch.float32))
        assert torch.equal(odd.view(torch.int32), quiet_with_payload)
        for value in (
            torch.tensor([True, False]),
            torch.tensor([1 + 2j, 3j]),
            torch.tensor(5, dtype=torch.int64),
            torch.empty(0, 3, dtype=torch.bfloat16),
            torch.arange(6).reshape(2, 3).t(),
        ):
            for src in (1, 2):
                got = everywhere(value, src=src)
                assert torch.equal(got, value)
                assert (got.dtype, got.shape) == (value.dtype, value.shape)
        mine = torch.zeros(1000)
        assert (everywhere(torch.ones(1000), mine) is mine) == (peer.rank != 1)
        assert peer.rank == 1 or torch.equal(mine, torch.ones(1000))
        array = np.zeros((3, 4), dtype=np.float32).T
        everywhere(np.ones((4, 3), dtype=np.float32), array)
        assert (array == (peer.rank != 1)).all()
        constant = np.arange(3)
        constant.flags.writeable = False
        assert everywhere(constant).tolist() == [0, 1, 2]
        new = everywhere(torch.ones(2))
        new += 1  # memory of its own, and writable
        parameter = torch.nn.Parameter(torch.full((3,), float(peer.rank)))
        with torch.no_grad():
            everywhere(parameter, parameter)
        assert torch.equal(parameter.detach(), torch.ones(3))

    succeed(run_ranks(subnet, 3, send))


def test_nan_and_infinity(subnet: LocalSubnet) -> None:
    def reduce(peer: Peer) -> None:
        inf = float("inf")
        x = torch.tensor([1.0, inf, inf, -inf, 3e38])
        if peer.rank == 2:
            x = torch.tensor([0xFFC01234 - (1 << 32), 0, 0, 0, 0], dtype=torch.int32).view(x.dtype)
            x[1:] = torch.tensor([1.0, -inf, -inf, 3e38])
        peer.all_reduce(x, "sum")
        assert x.view(torch.int32)[0] == x.view(torch.int32)[2] == 0x7FC00000
        assert x[[1, 3, 4]].tolist() == [inf, -inf, inf]

    succeed(run_ranks(subnet, 2, reduce))


def test_inside_a_running_event_loop(subnet: LocalSubnet) -> None:
    async def cell() -> float:
        peer = subnet.peer(1, 1, BANDWIDTH, job="notebook")
        peer.init_process_group()
        x = peer.all_reduce(torch.full((10,), 7.0))
        peer.destroy_process_group()
        return float(x[0])

    assert asyncio.run(cell()) == 7.0


# What ranks disagree on ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (
            lambda p, x: p.all_reduce(x if p.rank < 3 else x[:9]),
            ShapeMismatch,
            "step 1: the ranks disagree on shape (ranks 1, 2: (10,), rank 3: (9,))",
        ),
        (
            lambda p, x: p.all_reduce(x if p.rank < 3 else x.reshape(2, 5)),
            ShapeMismatch,
            "shape (ranks 1, 2: (10,), rank 3: (2, 5))",
        ),
        (
            lambda p, x: p.all_reduce(x if p.rank < 3 else x.double()),
            CollectiveMismatch,
            "dtype (ranks 1, 2: float32, rank 3: float64)",
        ),
        (
            lambda p, x: p.all_reduce(x, "avg" if p.rank < 3 else "sum"),
            CollectiveMismatch,
            "op (ranks 1, 2: avg, rank 3: sum)",
        ),
        (
            lambda p, x: p.all_reduce(x) if p.rank < 3 else p.broadcast(x),
            CollectiveMismatch,
            "op (ranks 1, 2: avg, rank 3: broadcast)",
        ),
        (
            lambda p, x: p.broadcast(x, src=min(p.rank, 2)),
            CollectiveMismatch,
            "root (rank 1: rank 1, ranks 2, 3: rank 2)",
        ),
        (
            lambda p, x: p.broadcast(x if p.rank < 3 else x.int()),
            CollectiveMismatch,
            "dtype (ranks 1, 2: float32, rank 3: int32)",
        ),
    ],
)
def test_every_rank_hears_who_disagrees_and_goes_on(
    subnet: LocalSubnet, call: Any, kind: type[CollectiveMismatch], says: str
) -> None:
    def disagree(peer: Peer) -> None:
        x = torch.arange(10.0) + peer.rank
        before = x.clone()
        with pytest.raises(kind) as caught:
            call(peer, x)
        assert says in str(caught.value)
        assert caught.value.step == 1
        assert torch.equal(x, before)
        assert torch.equal(peer.all_reduce(x), torch.arange(10.0) + 2)

    succeed(run_ranks(subnet, 3, disagree))


def test_steps_in_another_order(subnet: LocalSubnet) -> None:
    def disagree(peer: Peer) -> None:
        x, y = torch.ones(10), torch.ones(20)
        for _ in range(2):
            with pytest.raises(ShapeMismatch, match=r"rank 1: \((1|2)0,\), rank 2: \((1|2)0,\)"):
                peer.all_reduce(x if peer.rank == 1 else y)
            x, y = y, x
        assert x.sum() == 10
        peer.all_reduce(x)

    succeed(run_ranks(subnet, 2, disagree))


def test_a_timeout_names_the_rank_that_did_not_come(subnet: LocalSubnet) -> None:
    one, two = open_ranks(subnet, 2)
    x = torch.ones(100_000)
    with pytest.raises(PeerTimeout, match=r"after 0\.3 s: waiting for rank 2$") as caught:
        one.all_reduce(x, timeout=0.3)
    assert (caught.value.rank, caught.value.seconds) == (2, 0.3)
    with pytest.raises(StepAborted, match=r"aborted by rank 1: .*rank 2") as aborted:
        two.all_reduce(torch.ones(100_000))
    assert aborted.value.rank == 1
    ones = together(lambda: one.all_reduce(x), lambda: two.all_reduce(torch.ones(100_000)))
    assert all(torch.equal(result, torch.ones(100_000)) for result in ones)
    with pytest.raises(JobClosed, match=r"destroyed|given up"):
        succeed(together(lambda: one.all_reduce(x), lambda: destroy_inside(one)))
    two.destroy_process_group()


def destroy_inside(peer: Peer) -> None:
    """Destroys from another thread while a collective waits."""
    while not peer._busy.locked() or peer._job is None or peer._job.session.step.done:
        os.sched_yield()
    peer.destroy_process_group()


# What one rank gets wrong -------------------------------------------------------------------------


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


BAD_TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: [1.0, 2.0], "not list"),
    "sparse": (lambda: torch.ones(3).to_sparse(), "to_dense()"),
    "grad": (lambda: torch.ones(3, requires_grad=True), "tensor.detach()"),
    "meta": (lambda: torch.ones(3, device="meta"), "the tensor is on meta: pass tensor.cpu()"),
    "expanded": (lambda: torch.ones(1).expand(5), "tensor.contiguous()"),
    "unfolded": (lambda: torch.ones(9).unfold(0, 3, 1), "tensor.contiguous()"),
    "inference": (inference_tensor, "tensor.clone()"),
    "quantized": (quantized, "dequantize()"),
    "avg of integers": (lambda: torch.ones(3, dtype=torch.int32), 'op="sum"'),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "complex64"),
    "read-only": (lambda: np.broadcast_to(np.ones(1), (3,)), "read-only"),
    "objects": (lambda: np.array([object()]), "object"),
}


def test_tensors_that_cannot_be_reduced_cost_no_step(subnet: LocalSubnet) -> None:
    one, two = open_ranks(subnet, 2)
    for name, (make, says) in BAD_TENSORS.items():
        with pytest.raises(UnsupportedTensor) as caught:
            one.all_reduce(make())
        assert isinstance(caught.value, TypeError)
        assert says in str(caught.value), name
    too_large = torch.zeros(BANDWIDTH // 4 + 1)
    with pytest.raises(TensorTooLarge, match=f"{BANDWIDTH + 4} bytes.*bandwidth={BANDWIDTH}"):
        one.all_reduce(too_large)
    with pytest.raises(TensorTooLarge):
        one.broadcast(too_large)
    for call, says in (
        (lambda: one.all_reduce(torch.ones(1), "median"), "median"),
        (lambda: one.all_reduce(torch.ones(1), "broadcast"), "call broadcast"),
        (lambda: one.all_reduce(torch.ones(1), timeout=0), "timeout = 0"),
        (lambda: one.broadcast(torch.ones(1), src=3), "src = 3 is out of range: 1 to 2"),
        (lambda: one.broadcast(), "rank 1 sends this broadcast and must pass a tensor"),
    ):
        with pytest.raises(InvalidArgument, match=says):
            call()
    full = torch.ones(BANDWIDTH // 4)
    succeed(together(lambda: one.all_reduce(full), lambda: two.all_reduce(full.clone())))
    assert one.last_step is not None
    assert one.last_step.step == 1
    succeed(together(one.destroy_process_group, two.destroy_process_group))


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"rank": 0}, InvalidArgument, "rank = 0 is out of range: ranks of 2 peers are 1 to 2"),
        ({"rank": 3}, InvalidArgument, "rank = 3 is out of range: ranks of 2 peers are 1 to 2"),
        ({"peer_count": 0}, InvalidArgument, "peer_count = 0"),
        ({"bandwidth": 0}, InvalidArgument, "bandwidth = 0"),
        ({"validator_uid": 99}, ConfigError, "netuid 10 has no such uid"),
        ({"netuid": 99}, ConfigError, "netuid = 99"),
        ({"network": "nowhere"}, ConfigError, "'nowhere' is unknown"),
        ({"network": "ws://127.0.0.1:1"}, ChainUnavailable, "ws://127.0.0.1:1"),
        ({"wallet": 5}, WalletError, "not int"),
        ({"wallet": "nobody/none"}, WalletError, "no key file"),
    ],
)
def test_a_peer_that_cannot_join_says_why(
    subnet: LocalSubnet, change: dict[str, Any], kind: type[Exception], says: str
) -> None:
    arguments: dict[str, Any] = {
        "rank": 1,
        "peer_count": 2,
        "bandwidth": 100,
        "wallet": subnet.wallet(),
        "validator_uid": subnet.validator_uid,
        "netuid": NETUID,
        "network": subnet.network,
    }
    with pytest.raises(kind) as caught:
        Peer(**(arguments | change)).init_process_group()
    assert says in str(caught.value)


def test_a_job_that_is_not_granted_says_why(subnet: LocalSubnet) -> None:
    missing = subnet.peer(2, 3, BANDWIDTH, join_timeout=0.2)
    with pytest.raises(JobRefused, match=r"ranks 1, 3 of 3 did not join within 0\.2 s"):
        missing.init_process_group()
    with pytest.raises(JobRefused, match="3 miners are needed, 2 can take the job"):
        subnet.peer(1, 1, BANDWIDTH, miner_count=3).init_process_group()
    twice = [subnet.peer(1, 2, BANDWIDTH, job="twice", join_timeout=1.0) for _ in range(2)]
    errors = together(*(peer.init_process_group for peer in twice))
    assert all(isinstance(error, JobRefused) for error in errors)
    assert sorted(error.code for error in errors) == ["rank_taken", "ranks_missing"]
    missing.destroy_process_group()


def test_a_validator_that_serves_no_axon(subnet: LocalSubnet) -> None:
    from mapreduce.chain import open_chain
    from mapreduce.chain.actions import register_hotkey
    from mapreduce.chain.wallets import create_wallet

    async def register() -> int:
        wallet = create_wallet(str(subnet.directory / "wallets"), "local", "unserved")
        async with open_chain(subnet.network) as client:
            return int(await register_hotkey(client, wallet, NETUID))

    uid = asyncio.run(register())
    peer = Peer(1, 1, 100, subnet.wallet(), uid, NETUID, subnet.network)
    with pytest.raises(ValidatorUnreachable, match=f"uid {uid} .* has not served an axon"):
        peer.init_process_group()


# Life ---------------------------------------------------------------------------------------------


def test_a_peer_without_a_process_group(subnet: LocalSubnet) -> None:
    peer = subnet.peer(1, 1, BANDWIDTH, job="life")
    for _ in range(2):
        peer.destroy_process_group()
        assert peer.miners == ()
        assert peer.last_step is None
        for call in (lambda: peer.all_reduce(torch.ones(1)), lambda: peer.broadcast(torch.ones(1))):
            with pytest.raises(JobClosed, match="call init_process_group"):
                call()
        peer.init_process_group()
        with pytest.raises(JobClosed, match="initialised already"):
            peer.init_process_group()
        assert peer.all_reduce(torch.ones(1)) == 1
    peer.destroy_process_group()


def test_a_fork_gets_a_clear_error_and_the_parent_goes_on(subnet: LocalSubnet) -> None:
    with subnet.peer(1, 1, BANDWIDTH, job="fork") as peer:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads and fork: that is what is tested
            child = os.fork()
        if child == 0:
            said = b"nothing"
            try:
                try:
                    peer.init_process_group()
                except JobClosed:
                    peer.all_reduce(torch.ones(1))
            except JobClosed as error:
                said = str(error).encode()
            peer.destroy_process_group()
            os.write(writing, said)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            text = pipe.read().decode()
        assert os.waitpid(child, 0)[1] == 0
        assert f"initialised in process {os.getpid()} and does not survive a fork" in text
        assert torch.equal(peer.all_reduce(torch.ones(1000)), torch.ones(1000))
