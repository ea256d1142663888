"""The bucket behind limited links: bytes and seconds, no clock and no sockets."""

from __future__ import annotations

import pytest

from test.limits.bucket import Bucket

RATE = 1000.0  # bytes per second
BURST = 20.0
LATE = 100.0


def full() -> Bucket:
    return Bucket(RATE, burst_bytes=BURST, late_bytes=LATE, now=0.0)


def greedy(bucket: Bucket, nbytes: int, *, until: float, late_s: float = 0.0) -> int:
    """How much a sender gets through that takes whenever it may, and wakes up late."""
    now = taken = 0
    while now < until:
        wait_s = bucket.wait_s(now)
        if wait_s > 0.0:
            now += wait_s + late_s
        else:
            bucket.take(nbytes, now)
            taken += nbytes
    return taken


@pytest.mark.parametrize("nbytes", [1, 7, 20, 300])
def test_a_greedy_sender_gets_the_rate_whatever_it_takes_at_a_time(nbytes: int) -> None:
    taken = greedy(full(), nbytes, until=10.0)
    assert 10_000 <= taken <= 10_000 + BURST + 2 * nbytes


def test_timers_that_are_late_cost_nothing_up_to_a_bound() -> None:
    assert greedy(full(), 10, until=10.0, late_s=0.9 * LATE / RATE) >= 10_000 - LATE
    assert greedy(full(), 10, until=10.0, late_s=10 * LATE / RATE) < 2000


def test_a_link_that_was_idle_for_long_gives_one_burst() -> None:
    bucket = full()
    bucket.take(int(BURST), 3600.0)
    assert bucket.wait_s(3600.0) == 0.0
    bucket.take(500, 3600.0)
    assert bucket.wait_s(3600.0) == pytest.approx(0.5)
    assert bucket.wait_s(3600.4) == pytest.approx(0.1)
    assert bucket.wait_s(3600.6) == 0.0


def test_all_that_share_a_bucket_get_the_rate_together() -> None:
    bucket = full()
    now = taken = 0
    while now < 10.0:
        for nbytes in (5, 10, 15):  # each takes one turn, then all wait for the debt
            bucket.take(nbytes, now)
            taken += nbytes
        now += bucket.wait_s(now)
    assert 10_000 <= taken <= 10_000 + BURST + 60
