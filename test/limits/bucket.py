"""A token bucket that may go into debt. Knows bytes and the seconds that it is told; knows no
clock and no sockets."""

from __future__ import annotations


class Bucket:
    """Lets `bytes_per_s` through in the long run. An idle link saves up `burst_bytes`; while it is
    in debt, and so somebody waits, it saves up `late_bytes`: then the wait was longer than it had
    to be, and the link was not idle.

    Bytes are taken after they have been read, so a take always succeeds; whoever finds the bucket
    in debt waits until it is paid.
    """

    def __init__(
        self, bytes_per_s: float, *, burst_bytes: float, late_bytes: float, now: float
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._late_bytes = late_bytes
        self._level_bytes = burst_bytes
        self._at = now

    def take(self, nbytes: int, now: float) -> None:
        """Takes bytes that have passed at `now` in seconds."""
        self._fill(now)
        self._level_bytes -= nbytes

    def wait_s(self, now: float) -> float:
        """Seconds until the debt is paid, 0.0 if there is none."""
        self._fill(now)
        debt_bytes = -self._level_bytes
        # Less than a byte is a rounding error: a wait for it might be too short for any clock.
        return debt_bytes / self.bytes_per_s if debt_bytes >= 1.0 else 0.0

    def _fill(self, now: float) -> None:
        level = self._level_bytes
        most = self._late_bytes if level < 0 else max(self._burst_bytes, level)
        self._level_bytes = min(most, level + (now - self._at) * self.bytes_per_s)
        self._at = now
