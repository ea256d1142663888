"""What a miner and a peer hold in memory while a tensor passes through, whatever its size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mapreduce.local import LocalSubnet
from mapreduce.wire.terms import Terms

if sys.platform != "linux":
    pytest.skip("peak memory is read from /proc", allow_module_level=True)

MIB = 1 << 20
PEERS = 3


def peak_rss_bytes(pid: int | str) -> int:
    """The high-water mark of a process's resident memory since `reset_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc")


def reset_peak(pid: int | str) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def reduce_warm_then_measured(peer: object, megabytes: int) -> int:
    """Two steps on one connection; returns this peer's growth in bytes during the second."""
    import torch

    for size in (1, megabytes):
        tensor = torch.ones(size * MIB // 4)
        reset_peak("self")
        before = peak_rss_bytes("self")
        peer.all_reduce(tensor)  # type: ignore[attr-defined]
    return peak_rss_bytes("self") - before


def reduce_64(peer: object) -> int:
    return reduce_warm_then_measured(peer, 64)


def reduce_512(peer: object) -> int:
    return reduce_warm_then_measured(peer, 512)


@pytest.mark.parametrize(
    ("megabytes", "fn"), [(64, reduce_64), pytest.param(512, reduce_512, marks=pytest.mark.slow)]
)
def test_memory_is_bounded_by_windows_not_by_the_tensor(megabytes: int, fn: object) -> None:
    terms = Terms(
        peer_count=PEERS,
        miner_count=1,
        bandwidth=megabytes * MIB,
        window_bytes=4 * MIB,
        frame_bytes=MIB,
    )
    with LocalSubnet(miners=1) as subnet:
        pid = subnet.miners[0].pid
        reset_peak(pid)
        idle = peak_rss_bytes(pid)
        grown = subnet.run(fn, PEERS, terms.bandwidth, miner_count=1)  # type: ignore[arg-type]
        miner = peak_rss_bytes(pid) - idle
    print(f"\n{megabytes} MiB: miner +{miner / MIB:.1f} MiB, peers +{max(grown) / MIB:.1f} MiB")
    # The bound: K windows and the output ring, and 32 MiB for everything else.
    assert miner < terms.miner_bytes + 32 * MIB
    # One result buffer beside the tensor, which was there before; 64 MiB for everything else.
    assert max(grown) < megabytes * MIB + 64 * MIB
