"""The output ring of a job at a miner: reduced runs, shared by all peers. Knows memory, not frames
or peers' names."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 64  # bytes: a cache line, so that the reduce kernels write aligned


@dataclass(slots=True)
class OutputRun:
    """A frame in the ring: `frame` is header and payload; `readers` counts the peers it has yet to
    go to."""

    frame: memoryview
    readers: int
    end: int  # position of the ring's tail once this run is freed


class OutputRing:
    """Frames of varying length in one buffer, freed in the order in which they were made.

    Memory is taken at the first use and never grows: a run is free when all its readers are done
    with it, and the ring is full while the slowest of them is not.
    """

    def __init__(self, capacity: int, header_bytes: int) -> None:
        self._capacity = capacity
        self._header_bytes = header_bytes
        self._room = -(-header_bytes // ALIGNMENT) * ALIGNMENT
        self._buffer = memoryview(b"")
        self._runs: deque[OutputRun] = deque()
        self._head = 0  # where the next run begins
        self._tail = 0  # where the oldest run in use begins

    def _contiguous(self) -> int:
        """Bytes free in one piece at the head; moves the head to the start if there is more
        there."""
        size = self._capacity
        if not self._runs:
            self._head = self._tail = 0
            return size
        if self._head > self._tail:
            behind, ahead = self._tail, size - self._head
            if ahead >= behind:
                return ahead
            self._head = 0
            return behind
        return self._tail - self._head

    def payload_room(self) -> int:
        """The largest payload in bytes that `allocate` can place now."""
        return max(0, self._contiguous() - self._room - ALIGNMENT)

    def allocate(self, payload_bytes: int, readers: int) -> tuple[OutputRun, memoryview]:
        """A new run and the aligned view of its payload; `payload_bytes` must be at most
        `payload_room()`."""
        if not self._buffer:
            raw = np.empty(self._capacity + ALIGNMENT, dtype=np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            self._buffer = raw.data[start : start + self._capacity]
        begin = self._head
        payload = begin + self._room
        end = payload + -(-payload_bytes // ALIGNMENT) * ALIGNMENT
        assert end <= self._capacity
        frame = self._buffer[payload - self._header_bytes : payload + payload_bytes]
        run = OutputRun(frame=frame, readers=readers, end=end)
        self._runs.append(run)
        self._head = end
        return run, frame[self._header_bytes :]

    def release(self, run: OutputRun) -> None:
        """One reader is done with the run."""
        run.readers -= 1
        while self._runs and self._runs[0].readers == 0:
            self._tail = self._runs.popleft().end
