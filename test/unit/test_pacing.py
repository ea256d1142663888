"""A pacer sends no faster than its rate, on a clock of the test."""

from __future__ import annotations

import random

import pytest

from mapreduce.net.pacing import BURST_S, Pacer


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="a rate of"):
        Pacer(rate)


def test_a_frame_is_paid_for_before_the_next() -> None:
    pacer = Pacer(1000.0)
    assert pacer.wait_s(5.0) == 0.0
    pacer.spend(500)
    assert pacer.wait_s(5.0) == pytest.approx(0.5)
    assert pacer.wait_s(5.25) == pytest.approx(0.25)
    assert pacer.wait_s(5.5) == pytest.approx(0.0)


def test_a_long_rest_is_worth_one_burst() -> None:
    pacer = Pacer(1000.0)
    pacer.wait_s(0.0)
    pacer.wait_s(100.0)
    pacer.spend(1000)
    assert pacer.wait_s(100.0) == pytest.approx(1.0 - BURST_S)


def test_late_timers_never_send_more_than_the_rate_one_burst_and_one_frame() -> None:
    chance, pacer, now, sent = random.Random(1), Pacer(1e6), 0.0, 0
    for _ in range(500):
        now += pacer.wait_s(now) + chance.choice((0.0, 0.001, 0.01))
        if pacer.wait_s(now) < 1e-9:
            pacer.spend(10_000)
            sent += 10_000
        assert sent <= 1e6 * (now + BURST_S) + 10_000 + 1
    assert sent > 1_000_000
