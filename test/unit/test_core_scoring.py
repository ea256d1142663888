"""The formula, factor by factor, and what a standing remembers."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import TYPE_CHECKING, Any

import pytest

from mapreduce.core.scoring import (
    Components,
    OwnerSeen,
    OwnerView,
    ScoringConfig,
    Seen,
    Standing,
    advance,
    from_json,
    score_all,
    to_json,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG = ScoringConfig()
GOOD = Standing(goodput_bytes_per_s=1e8, windows_measured=12, completed=50.0, latency_s=0.05)


def score(standings: Mapping[str, Standing], **others: Any) -> dict[str, Components]:
    arguments: dict[str, Any] = {
        "banned": {},
        "disputed": frozenset(),
        "clusters": {},
        "cap_bytes_per_s": math.inf,
        "config": CONFIG,
    }
    return score_all(standings, **arguments | others)


def alone(**changes: Any) -> Components:
    return score({"m": dataclasses.replace(GOOD, **changes)})["m"]


def windows(seen: Seen, count: int, standing: Standing | None = None) -> Standing:
    standing = standing or Standing()
    for _ in range(count):
        standing = advance(standing, seen, CONFIG)
    return standing


def owners(count: int, **seen: Any) -> dict[str, OwnerSeen]:
    return {f"owner-{number}": OwnerSeen(**seen) for number in range(count)}


def views(*ratios: float, jobs: int = 10) -> dict[str, OwnerView]:
    return {
        f"owner-{number}": OwnerView(completed=jobs, rated_jobs=jobs, ratio=ratio)
        for number, ratio in enumerate(ratios)
    }


def test_every_constant_says_why_and_keeps_its_range() -> None:
    for known in dataclasses.fields(ScoringConfig):
        assert len(known.metadata["help"]) > 20
        assert known.metadata["low"] <= known.default <= known.metadata["high"]
        for outside in (known.metadata["low"] - 1, known.metadata["high"] + 1, math.nan):
            with pytest.raises(ValueError, match=known.name):
                ScoringConfig(**{known.name: outside})


def test_constants_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown_half"):
        ScoringConfig(unknown_half=0.97)
    with pytest.raises(ValueError, match="organic_owners"):
        ScoringConfig(organic_owners=10, owners_kept=9)


def test_the_score_of_a_flawless_miner_is_its_goodput() -> None:
    parts = alone()
    assert parts.score == parts.cap_bytes_per_s == parts.goodput_bytes_per_s == 1e8
    assert (parts.weight, parts.reasons) == (1.0, ())


def test_goodput_is_an_average_of_window_medians() -> None:
    first = advance(Standing(), Seen(goodputs_bytes_per_s=(1.0, 90.0, 100.0)), CONFIG)
    assert first.goodput_bytes_per_s == 90.0
    later = windows(Seen(goodputs_bytes_per_s=(90.0,)), 4, first)
    later = advance(later, Seen(goodputs_bytes_per_s=(190.0,)), CONFIG)
    assert later.goodput_bytes_per_s == pytest.approx(110.0)


def test_the_first_windows_are_a_plain_mean() -> None:
    standing = Standing()
    for count, rate in enumerate((100.0, 200.0, 600.0), 1):
        seen = Seen(goodputs_bytes_per_s=(rate,), latencies_s=(rate / 1000,))
        standing = advance(standing, seen, CONFIG)
        assert standing.windows_measured == count
    assert standing.goodput_bytes_per_s == pytest.approx(300.0)
    assert standing.latency_s == pytest.approx(0.3)


def test_a_slot_that_failed_counts_as_zero_but_not_before_the_first_that_worked() -> None:
    failed, worked = Seen(goodputs_bytes_per_s=(0.0,)), Seen(goodputs_bytes_per_s=(100.0,))
    assert advance(Standing(), failed, CONFIG).goodput_bytes_per_s is None
    standing = windows(worked, 1, windows(failed, 3))
    assert (standing.goodput_bytes_per_s, standing.windows_measured) == (100.0, 1)
    assert advance(standing, failed, CONFIG).goodput_bytes_per_s == 50.0


def test_a_window_without_measurements_changes_nothing() -> None:
    standing = dataclasses.replace(GOOD, failed=1.0, openness=0.97, owners=views(0.5, 0.6))
    assert advance(standing, Seen(), CONFIG) == standing


def test_real_jobs_alone_change_nothing_else() -> None:
    heard = advance(GOOD, Seen(owners=owners(3, completed=5.0, ratios=(1.0,) * 5)), CONFIG)
    assert dataclasses.replace(heard, owners={}) == GOOD


@pytest.mark.parametrize(("measured", "ramp"), [(0, 0.0), (3, 0.25), (12, 1.0), (500, 1.0)])
def test_the_ramp(measured: int, ramp: float) -> None:
    parts = alone(windows_measured=measured)
    assert (parts.ramp, parts.score) == (ramp, ramp * 1e8)
    assert any("windows" in reason for reason in parts.reasons) is (ramp < 1)


def test_reliability_is_squared_above_the_floor_and_zero_below() -> None:
    parts = alone(completed=75.0, failed=5.0)
    assert parts.reliability == 0.95
    assert parts.score == pytest.approx(1e8 * 0.95**2)
    parts = alone(completed=68.0, failed=12.0)
    assert (parts.reliability, parts.score) == (0.88, 0.0)
    assert parts.reasons == ("reliability 0.880 below 0.90",)


def test_a_newcomers_first_timeouts_are_no_verdict() -> None:
    verdicts = [alone(completed=0.0, failed=float(failed)).score > 0 for failed in range(5)]
    assert verdicts == [True, True, True, False, False]


def test_failures_are_forgotten() -> None:
    failed = windows(Seen(completed=5.0, failed=5.0), 1)
    later = windows(Seen(completed=10.0), 100, failed)
    assert later.failed == pytest.approx(5 * 0.98**100)
    assert later.completed == pytest.approx(10 * (1 - 0.98**100) / 0.02 + 5 * 0.98**100)


def test_users_reliability_lowers_by_the_median_owner() -> None:
    bad = OwnerView(completed=10.0, failed=10.0)
    fine = OwnerView(completed=20.0)
    assert alone(owners={"a": bad, "b": bad}).reliability == 1.0  # two are too few
    weak = OwnerView(completed=17.0, failed=3.0)
    lowered = alone(owners={"a": weak, "b": weak, "c": fine}).reliability
    assert lowered == pytest.approx(1.05 * 37 / 40)
    # They can say what they like: no further than to the floor, at which a miner is still paid.
    assert alone(owners={"a": bad, "b": bad, "c": fine}).reliability == 0.9
    assert alone(owners={"a": bad, "b": bad, "c": fine}).score > 0
    fair = OwnerView(completed=29.0, failed=1.0)
    assert alone(owners={"a": fair, "b": fair, "c": fair}).reliability == 1.0
    assert alone(owners={"a": bad, "b": fine, "c": fine}).reliability == 1.0
    assert alone(owners={"a": bad, "b": bad, "c": fine, "d": fine}).reliability == 1.0
    perfect = {name: OwnerView(completed=1e6) for name in "abc"}
    assert alone(completed=75.0, failed=5.0, owners=perfect).reliability == 0.95


def test_phi_is_the_median_of_owners_and_only_lowers() -> None:
    parts = alone(owners=views(0.5, 0.5, 1.0))
    assert (parts.phi, parts.cap_bytes_per_s) == (0.5, pytest.approx(0.55e8))
    assert parts.reasons == ("real jobs run at 0.50 of the measured speed",)
    assert alone(owners=views(0.92, 0.92, 1.0)).cap_bytes_per_s == 1e8
    assert alone(owners=views(1.0, 1.0, 0.25)).cap_bytes_per_s == 1e8
    assert alone(owners=views(1.0, 1.0, 0.25, 0.25)).cap_bytes_per_s == 1e8


def test_phi_takes_enough_jobs_of_enough_owners() -> None:
    assert alone(owners=views(0.5, 0.5)).phi is None
    assert alone(owners=views(0.5, 0.5, 0.5, jobs=6)).phi is None
    assert alone(owners=views(0.5, 0.5, 0.5, 0.5, jobs=5)).phi == 0.5


def test_an_owners_ratio_follows_its_jobs() -> None:
    seen = Seen(owners={"a": OwnerSeen(completed=2.0, ratios=(1.0, 0.5))})
    view = advance(Standing(), seen, CONFIG).owners["a"]
    assert view == OwnerView(completed=2.0, rated_jobs=2, ratio=pytest.approx(0.75))


def test_an_owners_ratio_is_the_mean_of_its_first_jobs_and_then_an_average() -> None:
    ratios = tuple(0.5 + 0.05 * (number % 3) for number in range(10))
    view = advance(Standing(), Seen(owners={"a": OwnerSeen(completed=10.0, ratios=ratios)}), CONFIG)
    assert view.owners["a"].ratio == pytest.approx(sum(ratios) / 10)
    view = advance(view, Seen(owners={"a": OwnerSeen(completed=1.0, ratios=(1.0,))}), CONFIG)
    expected = sum(ratios) / 10 * (1 - CONFIG.owner_ema_alpha) + CONFIG.owner_ema_alpha
    assert view.owners["a"].ratio == pytest.approx(expected)


def test_owners_that_were_not_heard_of_for_long_are_forgotten() -> None:
    once = advance(Standing(), Seen(owners={"old": OwnerSeen(completed=1.0)}), CONFIG)
    other = Seen(owners={"new": OwnerSeen(completed=1.0)})
    assert set(windows(other, 140, once).owners) == {"old", "new"}
    assert set(windows(other, 150, once).owners) == {"new"}


def test_only_so_many_owners_are_kept_the_newest() -> None:
    config = ScoringConfig(owners_kept=3)
    standing = Standing()
    for name in ("a", "b", "c", "a", "d"):
        seen = Seen(owners={name: OwnerSeen(completed=1.0)})
        standing = advance(standing, seen, config)
    assert list(standing.owners) == ["c", "a", "d"]


def test_openings_not_given_close_the_gate_step_by_step() -> None:
    standing, gates = GOOD, []
    for _ in range(11):
        gates.append(score({"m": standing})["m"].gate)
        standing = advance(standing, Seen(unknown=10.0), CONFIG)
    # A Beta with forgetting .999: 1 - .999^40 = .039, 1 - .999^50 = .049, 1 - .999^110 = .104
    assert gates == [1.0] * 5 + [0.5] * 6
    assert score({"m": standing})["m"].gate == 0.0
    assert standing.openness == pytest.approx(0.999**110)
    assert windows(Seen(completed=24.0), 100, standing).openness > 0.99


def test_openness_is_the_mean_of_a_beta() -> None:
    alpha, beta = 1000.0, 0.0
    standing, rng = Standing(), random.Random(1)
    for _ in range(100):
        given = rng.random() < 0.9
        alpha, beta = 0.999 * alpha + given, 0.999 * beta + (not given)
        seen = Seen(completed=float(given), unknown=float(not given))
        standing = advance(standing, seen, CONFIG)
    assert standing.openness == pytest.approx(alpha / (alpha + beta))


def test_a_banned_miner_gets_nothing_and_a_disputed_one_half() -> None:
    scored = score(
        {"a": GOOD, "b": GOOD, "c": GOOD},
        banned={"b": "proof F1 abc"},
        disputed=frozenset({"b", "c"}),
    )
    assert [scored[name].gate for name in "abc"] == [1.0, 0.0, 0.5]
    assert scored["b"].reasons == ("disputed by many peers", "banned: proof F1 abc")
    assert [scored[name].weight for name in "abc"] == pytest.approx([2 / 3, 0.0, 1 / 3])


def test_latency_above_the_median_costs_up_to_a_tenth() -> None:
    late = {"a": 0.01, "b": 0.05, "c": 0.10}
    scored = score({name: dataclasses.replace(GOOD, latency_s=s) for name, s in late.items()})
    assert [scored[name].latency_factor for name in "abc"] == pytest.approx([1.0, 1.0, 0.95])
    assert alone(latency_s=None).latency_factor == 1.0


def test_a_banned_miners_latency_is_no_reference() -> None:
    slow = dataclasses.replace(GOOD, latency_s=5.0)
    scored = score({"a": GOOD, "b": slow, "c": slow}, banned={"b": "", "c": ""})
    assert scored["a"].latency_factor == 1.0
    fast = dataclasses.replace(GOOD, latency_s=0.001)
    scored = score({"a": GOOD, "b": fast, "c": fast}, banned={"b": "", "c": ""})
    assert scored["a"].latency_factor == 1.0


def test_clusters_lose_two_hundredths_per_further_miner_down_to_a_half() -> None:
    standings = {f"m{number}": GOOD for number in range(40)}
    members = {f"m{number}": "x" for number in range(4)}
    scored = score(standings, clusters=members | {"gone": "x"})
    assert (scored["m0"].cluster_size, scored["m0"].cluster_factor) == (4, 0.94)
    assert (scored["m9"].cluster_size, scored["m9"].cluster_factor) == (1, 1.0)
    scored = score(standings, clusters=dict.fromkeys(standings, 7))
    assert scored["m0"].cluster_factor == 0.5


def test_miners_above_what_bots_can_measure_are_tied() -> None:
    fast = dataclasses.replace(GOOD, goodput_bytes_per_s=9e8)
    scored = score({"a": GOOD, "b": fast}, cap_bytes_per_s=1e8)
    assert scored["a"].weight == scored["b"].weight == 0.5
    assert scored["b"].reasons == ("paid up to the 400 Mbit/s each way that bots can measure",)


def test_without_any_score_there_are_no_weights() -> None:
    assert score({}) == {}
    scored = score({"a": Standing(), "b": GOOD}, banned={"b": "proof"})
    assert all(parts.score == parts.weight == 0 for parts in scored.values())
    assert weights(scored) == {}
    assert "not measured yet" in scored["a"].reasons


def random_standing(rng: random.Random) -> Standing:
    return Standing(
        goodput_bytes_per_s=rng.choice([None, 0.0, rng.uniform(1, 1e9)]),
        windows_measured=rng.randrange(30),
        completed=rng.uniform(0, 100),
        failed=rng.choice([0.0, rng.uniform(0, 30)]),
        openness=rng.uniform(0.85, 1),
        latency_s=rng.choice([None, rng.uniform(0.001, 2)]),
        owners=views(*(rng.uniform(0.25, 1) for _ in range(rng.randrange(6)))),
    )


def test_weights_are_finite_sum_to_one_and_depend_on_no_order() -> None:
    """P12."""
    rng = random.Random(12)
    for _ in range(20):
        standings = {f"m{number}": random_standing(rng) for number in range(24)}
        standings["good"] = GOOD
        members = {name: rng.randrange(8) for name in standings if rng.random() < 0.5}
        banned = {name: "proof" for name in standings if name != "good" and rng.random() < 0.1}
        scored = score(standings, clusters=members, banned=banned)
        assert all(0 <= parts.weight < math.inf for parts in scored.values())
        assert math.fsum(weights(scored).values()) == pytest.approx(1, abs=1e-9)
        shuffled = list(standings)
        rng.shuffle(shuffled)
        mixed = {name: standings[name] for name in shuffled}
        again = score(mixed, clusters=dict(reversed(members.items())), banned=banned)
        assert list(again.items()) == list(scored.items())


def test_a_standing_survives_as_text_bit_for_bit() -> None:
    rng = random.Random(3)
    for _ in range(20):
        standing = random_standing(rng)
        assert from_json(to_json(standing)) == standing
    ordered = dataclasses.replace(GOOD, owners={"z": OwnerView(completed=1.0), "a": OwnerView()})
    assert list(from_json(to_json(ordered)).owners) == ["z", "a"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"goodput_bytes_per_s": "1"},
        {"completed": None},
        {"completed": -1.0},
        {"failed": math.inf},
        {"failed": math.nan},
        {"windows_measured": 1.5},
        {"windows_measured": True},
        {"claimed_bytes_per_s": 1e12},
        {"owners": []},
        {"owners": {"a": {}}},
        {"owners": {"a": 1}},
    ],
    ids=str,
)
def test_what_is_no_standing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"standing|fields"):
        from_json(json.dumps(json.loads(to_json(GOOD)) | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "{}", '"version"'])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no standing"):
        from_json(text)


def test_a_missing_field_is_refused() -> None:
    values = json.loads(to_json(GOOD))
    del values["openness"]
    with pytest.raises(ValueError, match="openness"):
        from_json(json.dumps(values))
