"""What both ends of a job's streams have agreed before the first frame. Numbers only: no names,
keys or addresses."""

from __future__ import annotations

from dataclasses import dataclass

from mapreduce.core.partition import BLOCK_BYTES

MAX_PEERS = 256
MAX_MINERS = 256
MAX_BANDWIDTH = 1 << 40  # 1 TiB in one collective
MAX_WINDOW_BYTES = 256 << 20
MAX_FRAME_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The limits of one job; every frame is checked against them before a byte of it is stored.

    `bandwidth` is the largest collective in bytes (the name is the seed's); `window_bytes` what a
    peer may have sent to a miner beyond what that miner has released; `frame_bytes` the largest
    DATA or RESULT payload. Raises ValueError if the numbers cannot make a job.
    """

    peer_count: int
    miner_count: int
    bandwidth: int
    window_bytes: int
    frame_bytes: int

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("peer_count", self.peer_count, 1, MAX_PEERS),
            ("miner_count", self.miner_count, 1, MAX_MINERS),
            ("bandwidth", self.bandwidth, 1, MAX_BANDWIDTH),
            ("window_bytes", self.window_bytes, BLOCK_BYTES, MAX_WINDOW_BYTES),
            ("frame_bytes", self.frame_bytes, BLOCK_BYTES, MAX_FRAME_BYTES),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}: {low} to {high} is allowed")
        for name, value in (("window_bytes", self.window_bytes), ("frame_bytes", self.frame_bytes)):
            if value % BLOCK_BYTES:
                raise ValueError(f"{name} is {value}: a multiple of {BLOCK_BYTES} is needed")

    @property
    def ring_bytes(self) -> int:
        """The miner's output ring: room for the slowest peer to lag behind by as much as it may run
        ahead."""
        return max(self.window_bytes, 2 * self.frame_bytes)

    @property
    def miner_bytes(self) -> int:
        """What a miner reserves for the job: one window per peer and one output ring, flat in the
        tensor's size."""
        return self.peer_count * self.window_bytes + self.ring_bytes
