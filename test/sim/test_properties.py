"""P1 to P11 of the incentive on simulated subnets with fixed seeds; P12 is a unit test.

The fast run has a tenth of the windows, the slow one all of them, on other seeds too.
"""

from __future__ import annotations

import dataclasses

import pytest

from bench import simulate
from bench.incentive import Miner, Owner, Subnet, cosine, deterrence, kendall_tau, pay
from bench.properties import PROPERTIES
from mapreduce.core.scoring import OwnerSeen, Seen

HIDDEN = "P4 Sybils, hidden"
PROMISED = [name for name in PROPERTIES if name != HIDDEN]


def check(name: str, scale: float, seed: int) -> None:
    figures = PROPERTIES[name](scale, seed)
    assert any(figure.bound is not None for figure in figures)
    broken = [figure for figure in figures if not figure.holds]
    assert not broken, broken


@pytest.mark.parametrize("name", PROMISED)
def test_a_tenth_of_the_windows_is_as_promised(name: str) -> None:
    check(name, 0.1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", PROMISED)
def test_all_windows_are_as_promised(name: str, seed: int) -> None:
    check(name, 1.0, seed)


@pytest.mark.skip(reason="needs pairs of miners measured at once: the second pass; see the figures")
def test_sybils_behind_one_line_with_many_addresses_earn_no_more() -> None:
    assert all(figure.value <= 1.10 for figure in PROPERTIES[HIDDEN](0.1, 1))


def test_nothing_that_a_miner_claims_can_enter_the_score() -> None:
    """P7: what a window brings is measured by validators, bots and peers, and there is no more."""
    assert {field.name for field in dataclasses.fields(Seen)} == {
        "goodputs_bytes_per_s",
        "completed",
        "failed",
        "unknown",
        "latencies_s",
        "owners",
    }
    assert {field.name for field in dataclasses.fields(OwnerSeen)} == {
        "completed",
        "failed",
        "ratios",
    }


def test_a_majority_of_slanderers_does_lower_a_miner() -> None:
    """The scenes of P8 would not show what slander does if the slander were harmless by itself."""
    miners = [Miner(kind="honest", capacity_bytes_per_s=1e7)] * 12
    victim = Miner(kind="victim", capacity_bytes_per_s=1e7)
    slander = Owner(slanders=frozenset({"victim"}))
    subnet = Subnet([*miners, victim], seed=1, owners=[slander, slander, slander, Owner()])
    subnet.run(20)
    assert pay(subnet)["victim"] < 0.5


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not() -> None:
    def weights(seed: int) -> list[float]:
        miners = [Miner(kind="honest", capacity_bytes_per_s=1e7)] * 12
        subnet = Subnet(miners, seed=seed, owners=[Owner()] * 3)
        subnet.run(3)
        return [parts.weight for parts in subnet.scores().values()]

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)


def test_the_simulators_own_arithmetic() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert cosine({"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 2.0}) == pytest.approx(1)
    assert cosine({"a": 1.0}, {"b": 1.0}) == 0
    assert deterrence(0.0, 1.0, 140) == 1
    assert deterrence(1.0, 1.0, 140) == 0
    # Caught in every second window: one paid window in each 1 + 140.
    assert deterrence(1.0, 1 - 0.5 ** (1 / 24), 140) == pytest.approx(1 / 141)


def test_the_population_has_all_kinds_and_as_many_as_asked_for() -> None:
    miners = simulate.population(256, 300, 1)
    assert len(miners) == 256
    assert {miner.kind for miner in miners} == set(simulate.MEANING)
    pipes = [miner.pipe for miner in miners if miner.pipe]
    assert {pipes.count(pipe) for pipe in pipes} == {4}
