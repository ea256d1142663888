"""Every peer ends with the same bytes, equal to the rank-order reference.

For every number of peers K and miners N, any shape and dtype.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from mapreduce.core.dtypes import dtype_from_label
from mapreduce.core.reduce import reduce_op, reduce_reference
from mapreduce.local import LocalSubnet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peer import Peer

CASES = 40  # shapes and dtypes for each K and N; `make test` takes a tenth
FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")


@pytest.fixture(scope="module")
def subnet() -> Iterator[LocalSubnet]:
    with LocalSubnet(miners=6) as subnet:
        yield subnet


def random_tensors(rng: random.Random, ranks: int) -> tuple[list[torch.Tensor], str]:
    """One tensor per rank of the same random shape, dtype and layout, and an op for them."""
    dtype = getattr(torch, rng.choice(FLOATS + INTEGERS))
    op = rng.choice(("avg", "sum")) if dtype.is_floating_point else "sum"
    size = rng.choice((0, 1, 7, 5_000, 70_000, 400_000, rng.randrange(1_500_000)))
    shape = rng.choice(((), (size,), (size // 3, 3), (2, size // 8, 1, 4), (1, size)))
    transposed = rng.random() < 0.3
    tensors = []
    for _ in range(ranks):
        random_bits = torch.Generator().manual_seed(rng.randrange(1 << 32))
        if dtype.is_floating_point:
            tensor = torch.randn(shape, generator=random_bits).mul(1000).to(dtype)
        else:
            low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
            tensor = torch.randint(low, high, shape, generator=random_bits, dtype=dtype)
        if transposed and tensor.ndim > 1:
            tensor = tensor.t().contiguous().t() if tensor.ndim == 2 else tensor.transpose(0, 1)
        tensors.append(tensor)
    return tensors, op


def storage(tensor: torch.Tensor) -> np.ndarray:
    flat = tensor.contiguous().reshape(-1)
    return (
        flat.view(torch.int16).numpy().view(np.uint16)
        if flat.dtype is torch.bfloat16
        else flat.numpy()
    )


def check(subnet: LocalSubnet, ranks: int, miners: int, cases: int) -> None:
    rng = random.Random(ranks * 100 + miners)
    name = f"results-{ranks}-{miners}-{cases}"
    peers = [
        subnet.peer(rank, ranks, 16 << 20, miner_count=miners, job=name)
        for rank in range(1, ranks + 1)
    ]
    with ThreadPoolExecutor(ranks) as threads:
        try:
            list(threads.map(lambda peer: peer.init_process_group(), peers))
            for case in range(cases):
                tensors, op = random_tensors(rng, ranks)
                label = str(tensors[0].dtype).removeprefix("torch.")
                expected = reduce_reference(
                    [storage(tensor) for tensor in tensors], dtype_from_label(label), reduce_op(op)
                ).tobytes()

                def reduce(peer: Peer, tensor: torch.Tensor, op: str = op) -> torch.Tensor:
                    return peer.all_reduce(tensor, op)

                for got, tensor in zip(threads.map(reduce, peers, tensors), tensors, strict=True):
                    assert got is tensor
                    assert storage(tensor).tobytes() == expected, (case, label, op, tensor.shape)
        finally:
            list(threads.map(lambda peer: peer.destroy_process_group(), peers))


@pytest.mark.parametrize("miners", range(1, 7))
@pytest.mark.parametrize("ranks", range(1, 6))
def test_a_tenth_of_the_results(subnet: LocalSubnet, ranks: int, miners: int) -> None:
    check(subnet, ranks, miners, CASES // 10)


@pytest.mark.slow
@pytest.mark.parametrize("miners", range(1, 7))
@pytest.mark.parametrize("ranks", range(1, 6))
def test_all_results(subnet: LocalSubnet, ranks: int, miners: int) -> None:
    check(subnet, ranks, miners, CASES)
