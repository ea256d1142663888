"""The verdict and the table of the incentive's demo, from numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mapreduce.demo_incentive import Row, View, shares, table, verdicts

LINKS = (50.0, 100.0, 200.0, 400.0)


def paid() -> list[Row]:
    """Four honest miners that get their shares, and a liar that gets nothing."""
    weights = [link / sum(LINKS) for link in LINKS]
    rows = [
        Row(uid=uid, link_mbit_per_s=link, lies=False, weight=weight, incentive=weight)
        for uid, (link, weight) in enumerate(zip(LINKS, weights, strict=True), 1)
    ]
    return [*rows, Row(uid=5, link_mbit_per_s=200.0, lies=True, gate=0.0, strikes=1)]


def failed(rows: list[Row]) -> set[str]:
    return {name for name, value in verdicts(rows).items() if not value}


def with_weight(rows: list[Row], index: int, factor: float) -> list[Row]:
    """The same with another weight of one miner, and the incentive that follows from it."""
    rows = list(rows)
    weight = rows[index].weight * factor
    rows[index] = replace(rows[index], weight=weight, incentive=weight)
    total = sum(row.weight for row in rows)
    return [replace(r, weight=r.weight / total, incentive=r.weight / total) for r in rows]


def test_fair_shares_are_of_the_links_and_a_liar_has_none() -> None:
    fair = shares(paid())
    assert fair == {1: 50 / 750, 2: 100 / 750, 3: 200 / 750, 4: 400 / 750, 5: 0.0}


def test_what_is_as_promised_passes() -> None:
    assert failed(paid()) == set()
    assert failed(with_weight(paid(), 0, 1.08)) == set()


def test_incentive_may_be_rounded_to_the_chains_whole_numbers() -> None:
    rows = [replace(row, incentive=round(row.incentive * 65535) / 65535) for row in paid()]
    assert failed(rows) == set()


SHARE = "each_honest_miner_within_10_percent_of_its_share"


@pytest.mark.parametrize(
    ("rows", "claims"),
    [
        (with_weight(paid(), 0, 1.15), {SHARE}),
        (with_weight(paid(), 0, 0.85), {SHARE}),
        (with_weight(paid(), 0, 2.5), {SHARE, "weights_follow_bandwidth"}),
        (with_weight([replace(r, weight=0.2) for r in paid()], 0, 1.0), {SHARE}),
    ],
)
def test_weights_that_are_not_the_links_fail(rows: list[Row], claims: set[str]) -> None:
    assert claims <= failed(rows)


def test_a_liar_that_gets_anything_fails() -> None:
    rows = paid()
    for part in ("weight", "incentive"):
        wrong = [*rows[:4], replace(rows[4], **{part: 1 / 65535})]
        assert "a_proven_lie_is_paid_nothing" in failed(wrong)
    for unproven in ({"strikes": 0}, {"gate": None}, {"gate": 1.0}):
        assert "a_proven_lie_is_paid_nothing" in failed([*rows[:4], replace(rows[4], **unproven)])
    assert "a_proven_lie_is_paid_nothing" in failed(rows[:4])  # nobody was there to be caught


def test_incentive_that_is_not_the_weights_fails() -> None:
    rows = paid()
    swapped = [replace(rows[0], incentive=rows[1].incentive), *rows[1:]]
    assert failed(swapped) == {"incentive_follows_weights"}
    unpaid = [replace(row, incentive=0.0) for row in rows]
    assert failed(unpaid) == {"incentive_follows_weights"}


def test_a_liar_is_out_when_its_gate_is_shut_and_the_chain_holds_no_weight() -> None:
    honest, liar = paid()[:4], paid()[4]
    for wrong in (replace(liar, gate=None), replace(liar, gate=1.0), replace(liar, weight=0.1)):
        assert not View(block=1, last_update=0, rows=(*honest, wrong)).liar_is_out
    assert View(block=1, last_update=0, rows=(*honest, liar)).liar_is_out


def test_the_table_shows_the_heaviest_first_and_what_nobody_has_said_as_a_dash() -> None:
    rows = paid()
    rows[3] = replace(rows[3], measured_mbit_per_s=401.26, reliability=1.0, gate=1.0, score=1.5e6)
    lines = table(rows)
    assert len({len(line.removesuffix("  lies")) for line in lines}) == 1
    assert [line.split()[0] for line in lines] == ["uid", "4", "3", "2", "1", "5"]
    numbers = ["4", "400", "401.3", "1.000", "1.0", "1.50", "0.5333", "0.5333", "0.5333", "0"]
    assert lines[1].split() == numbers
    assert lines[2].split()[2:6] == ["-"] * 4
    assert lines[5].endswith("lies")
    assert lines[5].split()[-2] == "1"
