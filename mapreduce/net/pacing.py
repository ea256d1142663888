"""Sending no faster than a given rate. Pure: told what was sent and what time it is."""

from __future__ import annotations

BURST_S = 0.002  # of the rate: what a late timer may catch up with


class Pacer:
    """A token bucket of `bytes_per_s`, which a last frame may overdraw."""

    def __init__(self, bytes_per_s: float) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"a rate of {bytes_per_s} bytes per second")
        self._rate = bytes_per_s
        self._tokens = 0.0
        self._at: float | None = None

    def wait_s(self, now: float) -> float:
        """Seconds until something may be sent, 0 if it may be now."""
        if self._at is None:
            self._at = now
        most = self._rate * BURST_S
        self._tokens = min(most, self._tokens + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, -self._tokens / self._rate)

    def spend(self, nbytes: int) -> None:
        """That much was sent."""
        self._tokens -= nbytes
