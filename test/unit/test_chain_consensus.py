"""Yuma consensus of the embedded chain, against examples computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mapreduce.chain.consensus import Ballot, Verdict, count

HALF = 32767 / 65535  # the usual kappa

# Two validators (uids 0 and 1) with the same stake, three miners (2, 3, 4), all long registered.
BALLOT = Ballot(
    stakes=[50, 50, 0, 0, 0],
    permits=[True, True, False, False, False],
    last_update=[100, 100, 0, 0, 0],
    registered_at=[10, 10, 10, 10, 10],
    weights={0: [(2, 1), (3, 3)], 1: [(2, 10), (3, 30)]},
    owner_uid=None,
    block=150,
    activity_cutoff_blocks=100,
    kappa=HALF,
)


def counted(**changes: object) -> Verdict:
    return count(replace(BALLOT, **changes))  # type: ignore[arg-type]


def test_validators_who_agree_share_the_dividends_by_stake() -> None:
    verdict = counted(stakes=[75, 25, 0, 0, 0])
    assert verdict.consensus == pytest.approx([0, 0, 0.25, 0.75, 0])
    assert verdict.incentive == pytest.approx([0, 0, 0.25, 0.75, 0])
    assert verdict.dividends == pytest.approx([0.75, 0.25, 0, 0, 0])
    assert verdict.emission == pytest.approx([0.375, 0.125, 0.125, 0.375, 0])


def test_weight_beyond_what_the_majority_gives_is_clipped() -> None:
    # 60 % of the stake says miner 2 gets half; the rest gives it everything.
    verdict = counted(stakes=[60, 40, 0, 0, 0], weights={0: [(2, 1), (3, 1)], 1: [(2, 1), (4, 0)]})
    assert verdict.consensus == pytest.approx([0, 0, 0.5, 0.5, 0])
    # Ranks: 0.6 * 0.5 + 0.4 * 0.5 = 0.5 for miner 2, 0.6 * 0.5 = 0.3 for miner 3.
    assert verdict.incentive == pytest.approx([0, 0, 0.625, 0.375, 0])
    # Bonds on miner 2: 0.3 and 0.2 of 0.5; on miner 3: all of validator 0.
    assert verdict.dividends == pytest.approx([0.6 * 0.625 + 0.375, 0.4 * 0.625, 0, 0, 0])


def test_a_minority_alone_pays_nobody() -> None:
    verdict = counted(stakes=[60, 40, 0, 0, 0], weights={0: [(2, 1)], 1: [(4, 1)]})
    assert verdict.consensus == [0, 0, 1, 0, 0]
    assert verdict.incentive == [0, 0, 1, 0, 0]
    assert verdict.dividends == [1, 0, 0, 0, 0]


def test_exactly_half_of_the_stake_is_a_majority() -> None:
    verdict = counted(weights={0: [(2, 1)], 1: [(4, 1)]})
    assert verdict.consensus == [0, 0, 1, 0, 1]
    assert verdict.incentive == pytest.approx([0, 0, 0.5, 0, 0.5])


@pytest.mark.parametrize("kappa", [0.0, 0.25, 0.35, HALF, 0.9, 1.0])
def test_the_median_holds_at_every_majority(kappa: float) -> None:
    rows = {0: [(2, 2), (3, 8)], 1: [(2, 6), (3, 4)]}
    verdict = counted(stakes=[70, 30, 0, 0, 0], weights=rows, kappa=kappa)
    # Miner 2: 0.2 from 70 %, 0.6 from 30 %; miner 3: 0.8 from 70 %, 0.4 from 30 %.
    assert verdict.consensus[2] == pytest.approx(0.6 if kappa < 0.3 else 0.2)
    assert verdict.consensus[3] == pytest.approx(0.8 if kappa <= 0.7 else 0.4)


def test_a_validator_without_a_permit_has_no_vote() -> None:
    verdict = counted(
        permits=[True, False, False, False, False], weights={0: [(2, 1)], 1: [(3, 1)]}
    )
    assert verdict.incentive == [0, 0, 1, 0, 0]
    assert verdict.dividends == [1, 0, 0, 0, 0]


def test_the_owner_votes_without_a_permit_and_may_weigh_itself() -> None:
    none = [False] * 5
    verdict = counted(permits=none, owner_uid=1, weights={1: [(1, 1), (3, 1)]})
    assert verdict.incentive == pytest.approx([0, 0.5, 0, 0.5, 0])
    assert verdict.dividends == [0, 1, 0, 0, 0]


def test_self_weights_are_dropped_before_the_row_is_normalised() -> None:
    verdict = counted(weights={0: [(0, 60), (2, 1), (3, 3)], 1: [(2, 1), (3, 3)]})
    assert verdict.incentive == pytest.approx([0, 0, 0.25, 0.75, 0])


def test_a_validator_that_fell_silent_has_no_vote() -> None:
    rows = {0: [(2, 1)], 1: [(3, 1)]}
    just_in_time = counted(last_update=[100, 50, 0, 0, 0], weights=rows)
    assert just_in_time.active == [True, True, False, False, False]
    assert just_in_time.incentive == pytest.approx([0, 0, 0.5, 0.5, 0])
    late = counted(last_update=[100, 49, 0, 0, 0], weights=rows)
    assert late.active == [True, False, False, False, False]
    assert late.incentive == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("registered", [100, 101])
def test_weights_older_than_a_registration_are_not_the_newcomers(registered: int) -> None:
    verdict = counted(registered_at=[10, 10, registered, 10, 10])
    assert verdict.incentive == [0, 0, 0, 1, 0]


def test_where_nobody_judged_emission_follows_stake() -> None:
    verdict = counted(stakes=[75, 25, 0, 0, 0], weights={})
    assert verdict.incentive == verdict.dividends == [0] * 5
    assert verdict.emission == pytest.approx([0.75, 0.25, 0, 0, 0])
    asleep = counted(stakes=[75, 25, 0, 0, 0], weights={}, block=10_000)
    assert asleep.emission == pytest.approx([0.75, 0.25, 0, 0, 0])


def test_nobody_and_nothing_is_counted_too() -> None:
    empty = count(
        replace(BALLOT, stakes=[], permits=[], last_update=[], registered_at=[], weights={})
    )
    assert empty.incentive == empty.emission == []
    assert counted(stakes=[0] * 5).emission == [0] * 5
    assert counted(weights={0: [(2, 0)], 1: []}).incentive == [0] * 5
