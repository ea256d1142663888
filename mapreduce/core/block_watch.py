"""Whether the chain still moves: when there was a new block, and when its absence is too long.

Time is an argument, in seconds of any clock that does not jump. Knows blocks and patience; knows
neither the chain nor what is done about a silence (`services/watchdog.py`).
"""

from __future__ import annotations

LEAST_S = 120.0
BLOCKS = 10.0
RECONNECTS = 3  # while nothing comes, evenly spread over the limit


def silence_limit(block_time_s: float, least_s: float = LEAST_S) -> float:
    """For how many seconds there may be no new block: ten block times, and no less than
    `least_s`."""
    return max(least_s, BLOCKS * block_time_s)


class BlockWatch:
    """What is known of the chain since `now`, and of the loop that asks it."""

    def __init__(self, limit_s: float, now: float) -> None:
        self.limit_s = limit_s
        self._block: int | None = None
        self._trouble = ""
        self.restart(now)

    @property
    def patience_s(self) -> float:
        """How long one question to the chain may take, so that the loop stays beyond doubt."""
        return self.limit_s / 8

    def restart(self, now: float) -> None:
        """Count from now: this process could not have seen a block before, it was suspended."""
        self._new_at = self._asked_at = now
        self._reconnects = 0

    def asks(self, now: float) -> None:
        """The loop is at work, and about to ask for the newest block."""
        self._asked_at = now

    def saw(self, block: int, now: float) -> None:
        """The chain says that this is the newest block."""
        self._trouble = ""
        # Not any other number: nodes that are behind may take turns in answering.
        if self._block is None or block > self._block:
            self._block = block
            self._new_at = now
            self._reconnects = 0

    def failed(self, reason: str) -> None:
        """The chain did not answer."""
        self._trouble = reason

    def silence_s(self, now: float) -> float:
        """Since when there was no new block, in seconds."""
        return now - self._new_at

    def reconnect_due(self, now: float) -> bool:
        """Whether it is time for the next attempt to connect anew; each is due once."""
        if self._reconnects == RECONNECTS:
            return False
        if self.silence_s(now) < (self._reconnects + 1) * self.limit_s / (RECONNECTS + 1):
            return False
        self._reconnects += 1
        return True

    def is_blocked(self, now: float) -> bool:
        """Whether nobody has asked for so long that the loop itself must stand still."""
        return now - self._asked_at > self.limit_s / 2

    def verdict(self, now: float) -> str | None:
        """Why this neuron must end, in words; None while it need not."""
        silence_s = self.silence_s(now)
        if silence_s <= self.limit_s:
            return None
        if self.is_blocked(now):
            return f"the event loop has been blocked for {now - self._asked_at:.0f} s"
        seen = "no block" if self._block is None else f"no block after {self._block}"
        again = f"{self._reconnects} new connections did not help"
        trouble = f": {self._trouble}" if self._trouble else ""
        return f"the chain has shown {seen} for {silence_s:.0f} s, and {again}{trouble}"
