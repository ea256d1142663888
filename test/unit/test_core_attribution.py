"""Disputes that nobody can prove: many honest complaints raise doubt, slander does not."""

from __future__ import annotations

import random

import pytest

from mapreduce.core.attribution import Flags, flagged

NOBODY: frozenset[str] = frozenset()
MINERS = [f"m{number}" for number in range(8)]


def peers(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


def against(accusers: list[str], *accused: str) -> list[tuple[str, str]]:
    return [(peer, miner) for peer in accusers for miner in accused]


def mirrored(disputes: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(miner, peer) for peer, miner in disputes]


def test_no_disputes_no_flags() -> None:
    assert flagged([], 8, 8) == Flags(miners=NOBODY, peers=NOBODY)
    assert flagged([], 0, 0) == Flags(miners=NOBODY, peers=NOBODY)


@pytest.mark.parametrize("victims", range(1, len(MINERS) + 1))
def test_one_slanderer_of_eight_gets_no_miner_flagged(victims: int) -> None:
    flags = flagged(against(["p0"], *MINERS[:victims]), 8, len(MINERS))
    assert flags.miners == NOBODY
    # Three miners and more that quarrel with nobody else speak against the slanderer.
    assert flags.peers == ({"p0"} if victims >= 3 else NOBODY)


@pytest.mark.parametrize("victims", [1, 2, 3, 8])
def test_three_colluding_of_sixteen_get_no_miner_flagged(victims: int) -> None:
    flags = flagged(against(peers(3), *MINERS[:victims]), 16, 8)
    assert flags.miners == NOBODY
    assert flags.peers == NOBODY  # their victims dispute with two others each: neither is believed


def test_four_of_sixteen_with_one_complaint_each_flag_the_miner() -> None:
    assert flagged(against(peers(4), "m0"), 16, 8) == Flags(miners=frozenset({"m0"}), peers=NOBODY)


@pytest.mark.parametrize(
    ("peer_count", "needed"),
    [(1, 3), (3, 3), (8, 3), (15, 3), (16, 4), (20, 4), (21, 5), (35, 7), (36, 8), (256, 52)],
)
def test_the_threshold_is_three_or_a_fifth(peer_count: int, needed: int) -> None:
    assert flagged(against(peers(needed - 1), "m0"), peer_count, 1).miners == NOBODY
    assert flagged(against(peers(needed), "m0"), peer_count, 1).miners == {"m0"}


def test_a_peer_that_quarrels_with_three_miners_does_not_count() -> None:
    credible = against(peers(2), "m0")
    quarrels = [("p2", "m0"), ("p2", "m1"), ("p2", "m2")]
    assert flagged(credible + quarrels[:1], 8, 8).miners == {"m0"}
    assert flagged(credible + quarrels[:2], 8, 8).miners == {"m0"}  # one other: still believed
    assert flagged(credible + quarrels, 8, 8).miners == NOBODY
    enough = against(["p3"], "m0")
    assert flagged(credible + quarrels + enough, 8, 8).miners == {"m0"}


def test_two_lying_miners_are_both_flagged_a_third_hides_all() -> None:
    assert flagged(against(peers(8), "m0", "m1"), 8, 16).miners == {"m0", "m1"}
    assert flagged(against(peers(8), "m0", "m1", "m2"), 8, 16).miners == NOBODY


def test_peers_are_judged_by_the_same_rule() -> None:
    for accusers, others in ((3, 16), (4, 16), (4, 20), (4, 21)):
        disputes = [*against(peers(accusers), "m0"), *against(["p9"], "m0", "m1", "m2")]
        there = flagged(disputes, others, 8)
        back = flagged(mirrored(disputes), 8, others)
        assert (there.miners, there.peers) == (back.peers, back.miners)
    assert flagged(mirrored(against(peers(4), "m0")), 8, 16).peers == {"m0"}


def test_the_counts_of_the_two_sides_are_not_mixed_up() -> None:
    disputes = against(peers(4), "m0")
    assert flagged(disputes, 20, 1000).miners == {"m0"}
    assert flagged(disputes, 1000, 20).miners == NOBODY
    assert flagged(mirrored(disputes), 1000, 20).peers == {"m0"}
    assert flagged(mirrored(disputes), 20, 1000).peers == NOBODY


def test_repeated_disputes_count_once() -> None:
    assert flagged(against(peers(2), "m0") * 100, 8, 8).miners == NOBODY
    disputes = against(peers(3), "m0", "m1")
    assert flagged(disputes * 3, 8, 8) == flagged(disputes, 8, 8)
    assert flagged(disputes, 8, 8).miners == {"m0", "m1"}


def test_a_peer_and_a_miner_of_the_same_hotkey_are_two_parties() -> None:
    same = [("k", "m0"), ("p1", "m0"), ("p2", "m0"), ("p3", "k"), ("p4", "k")]
    assert flagged(same, 8, 8) == Flags(miners=frozenset({"m0"}), peers=NOBODY)


def test_the_order_of_disputes_does_not_matter() -> None:
    rng = random.Random(5)
    seen = set()
    for _ in range(40):
        disputes = [
            (f"p{rng.randrange(12)}", f"m{rng.randrange(8)}") for _ in range(rng.randrange(24))
        ]
        flags = flagged(disputes, 12, 8)
        seen.add(flags)
        for _ in range(5):
            rng.shuffle(disputes)
            assert flagged(iter(disputes), 12, 8) == flags
    assert len(seen) > 5  # the draws were not all of the dull kind
