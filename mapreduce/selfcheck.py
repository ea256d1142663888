"""`python -m mapreduce.selfcheck`: whether this installation works on this machine.

A validator, a miner and three peers run one all-reduce here, each a process of its own, and the
bits of the result must be right. An update runs it before it takes a release. Knows what must come
out; knows nothing of the neurons whose place it may take.
"""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Final

import numpy as np

from mapreduce import __version__
from mapreduce.config import run_cli
from mapreduce.core.reduce import check_subnormals
from mapreduce.errors import LocalError
from mapreduce.local import LocalSubnet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peer import Peer

# In float32 and in the order of ranks their sum is the first; in another order, or with more
# precision, it is not.
CONTRIBUTIONS: Final = (2.0**24, 1.0, 1.0)
ELEMENTS: Final = 100_003  # no multiple of a block
TIMEOUT_S: Final = 90.0
ENTRY_POINTS: Final = ("miner", "validator", "benchmark", "all")


def reduce_once(peer: Peer) -> bytes:
    """One rank's part; returns the bytes of the result."""
    tensor = np.full(ELEMENTS, CONTRIBUTIONS[peer.rank - 1], dtype=np.float32)
    result = peer.all_reduce(tensor, op="sum")
    return bytes(np.asarray(result).tobytes())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mapreduce.selfcheck",
        description="Check that this installation works: a small subnet on this machine, one step.",
    )
    parser.parse_args(argv)
    check_subnormals()
    for name in ENTRY_POINTS:
        importlib.import_module(f"neurons.{name}")
    expected = np.full(ELEMENTS, CONTRIBUTIONS[0], dtype=np.float32).tobytes()
    with LocalSubnet(miners=1) as subnet:
        peers = len(CONTRIBUTIONS)
        results = subnet.run(reduce_once, peers, ELEMENTS * 4, timeout_s=TIMEOUT_S)
    for rank, result in enumerate(results, start=1):
        if result != expected:
            raise LocalError(f"the sum that rank {rank} received is wrong")
    print(f"version {__version__} works: three peers, one miner, every bit as it must be")
    return 0


if __name__ == "__main__":
    run_cli(main)
