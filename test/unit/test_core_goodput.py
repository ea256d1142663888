"""Goodput of a benchmark, and what real jobs say of a miner's speed."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from mapreduce.core.goodput import relative_rates, slot_goodput
from mapreduce.core.scoring import ScoringConfig

CONFIG = ScoringConfig()
PEERS = ("p0", "p1", "p2", "p3")


def test_a_steady_rate_is_that_rate_whatever_the_steps() -> None:
    for steps in ([(1200, 12.0)], [(100, 1.0)] * 12, [(70, 0.7)] * 20, [(10, 0.1)] * 35):
        assert slot_goodput(steps, CONFIG) == pytest.approx(100)


def test_the_warm_up_does_not_count() -> None:
    slow_start = [(10, 1.0), (30, 1.0)]
    assert slot_goodput([*slow_start, *[(100, 1.0)] * 10], CONFIG) == pytest.approx(100)
    assert slot_goodput([(10, 2.0)] * 6, CONFIG) == pytest.approx(5)


def test_the_last_partial_second_does_not_count() -> None:
    # Seconds 2 to 10 make eight bins; what came in the last half second is not seen.
    steps = [(100, 1.0)] * 10
    assert slot_goodput([*steps, (10**9, 0.5)], CONFIG) == pytest.approx(100)


def test_the_median_second_decides_and_not_a_burst_or_a_pause() -> None:
    steps = [(100, 1.0)] * 12
    steps[4], steps[7] = (10**6, 1.0), (0, 1.0)
    assert slot_goodput(steps, CONFIG) == pytest.approx(100)


def test_bytes_are_spread_evenly_over_their_step() -> None:
    # Two rates, alternating twice a second: each second holds one of both.
    steps = [(100, 0.5), (300, 0.5)] * 12
    assert slot_goodput(steps, CONFIG) == pytest.approx(400)


def test_a_short_slot_is_cut_into_tenths_of_which_two_are_dropped() -> None:
    steps = [(1, 0.1), (1, 0.1), *[(50, 0.1)] * 8]
    assert slot_goodput(steps, CONFIG) == pytest.approx(500)
    assert slot_goodput([(9, 9.0)], CONFIG) == pytest.approx(1)


def test_too_little_is_no_measurement() -> None:
    assert slot_goodput([], CONFIG) is None
    assert slot_goodput([(100, 0.0)], CONFIG) is None
    assert slot_goodput([(100, 0.05)], CONFIG) is None
    long_warm_up = ScoringConfig(slot_warm_up_s=20.0)
    assert slot_goodput([(100, 1.0)] * 12, long_warm_up) is None
    assert slot_goodput([(100, 1.0)] * 22, long_warm_up) == pytest.approx(100)


def rates_of(
    peers: dict[str, float], miners: dict[str, float], most: float = math.inf
) -> dict[tuple[str, str], float]:
    return {
        (peer, miner): min(most, speed) * share
        for (peer, share), (miner, speed) in itertools.product(peers.items(), miners.items())
    }


MINERS = {"m0": 10.0, "m1": 20.0, "m2": 40.0, "m3": 80.0}
EVEN = dict.fromkeys(PEERS, 1.0)


def test_honest_miners_of_any_speed_reach_what_they_promise() -> None:
    assert relative_rates(rates_of(EVEN, MINERS), MINERS, CONFIG) == pytest.approx(
        dict.fromkeys(MINERS, 1.0)
    )


def test_slow_peers_blame_no_miner() -> None:
    peers = {"p0": 1.0, "p1": 0.1, "p2": 0.1, "p3": 3.0}
    assert relative_rates(rates_of(peers, MINERS), MINERS, CONFIG) == pytest.approx(
        dict.fromkeys(MINERS, 1.0)
    )


@pytest.mark.parametrize("most", [1.0, 15.0, 30.0, 60.0])
def test_where_peers_are_the_bottleneck_fast_miners_are_not_blamed(most: float) -> None:
    assert relative_rates(rates_of(EVEN, MINERS, most), MINERS, CONFIG) == pytest.approx(
        dict.fromkeys(MINERS, 1.0)
    )


@pytest.mark.parametrize("lazy", ["m0", "m1"])
def test_a_miner_at_half_speed_is_seen(lazy: str) -> None:
    real = MINERS | {lazy: MINERS[lazy] / 2}
    ratios = relative_rates(rates_of(EVEN, real), MINERS, CONFIG)
    assert ratios[lazy] == pytest.approx(0.5)
    assert all(ratio == pytest.approx(1) for miner, ratio in ratios.items() if miner != lazy)


def test_the_fastest_of_a_job_can_hide_what_it_has_above_the_upper_quartile() -> None:
    real = MINERS | {"m3": MINERS["m3"] / 2}
    assert relative_rates(rates_of(EVEN, real), MINERS, CONFIG)["m3"] == 1.0
    real = MINERS | {"m3": MINERS["m3"] / 8}
    assert relative_rates(rates_of(EVEN, real), MINERS, CONFIG)["m3"] == pytest.approx(0.4)


def test_half_speed_is_seen_within_noise() -> None:
    rng = random.Random(1)
    found = []
    for _ in range(4):
        real = MINERS | {"m1": MINERS["m1"] / 2}
        rates = {
            pair: rate * math.exp(rng.gauss(0, 0.1)) for pair, rate in rates_of(EVEN, real).items()
        }
        found.append(relative_rates(rates, MINERS, CONFIG)["m1"])
    assert found != [0.5] * 4
    assert all(0.4 < ratio < 0.6 for ratio in found)


def test_ratios_are_clipped() -> None:
    real = MINERS | {"m0": MINERS["m0"] / 1000, "m1": MINERS["m1"] * 1000}
    ratios = relative_rates(rates_of(EVEN, real), MINERS, CONFIG)
    assert ratios["m0"] == CONFIG.organic_ratio_min
    assert ratios["m1"] == 1.0


def test_a_job_with_too_few_parties_says_nothing() -> None:
    two_peers, two_miners = dict(list(EVEN.items())[:2]), dict(list(MINERS.items())[:2])
    assert relative_rates(rates_of(two_peers, MINERS), MINERS, CONFIG) == {}
    assert relative_rates(rates_of(EVEN, two_miners), MINERS, CONFIG) == {}
    assert relative_rates(rates_of(EVEN, MINERS), {}, CONFIG) == {}
    assert relative_rates({}, MINERS, CONFIG) == {}


def test_a_miner_that_no_bot_has_measured_is_left_out() -> None:
    known = {"m0": 10.0, "m1": 20.0, "m2": 40.0, "m3": 0.0}
    assert set(relative_rates(rates_of(EVEN, MINERS), known, CONFIG)) == {"m0", "m1", "m2"}


def test_pairs_that_were_not_timed_are_missing_and_not_slow() -> None:
    rates = rates_of(EVEN, MINERS)
    del rates["p1", "m1"]
    rates["p2", "m2"] = 0.0
    assert relative_rates(rates, MINERS, CONFIG) == pytest.approx(dict.fromkeys(MINERS, 1.0))
