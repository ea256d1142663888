"""Partition of a tensor: whatever the arguments, every byte belongs to exactly one miner."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mapreduce.core.partition import (
    BLOCK_BYTES,
    EQUAL_WEIGHT,
    MIN_SEGMENT_BYTES,
    Segment,
    map_digest,
    partition,
    rebalance,
)

KIB = 1024
MIB = 1024 * KIB

sizes = st.one_of(
    st.integers(0, 4 * MIN_SEGMENT_BYTES),
    st.integers(0, 64).map(lambda n: n * MIN_SEGMENT_BYTES),
    st.integers(0, 1 << 44),
)
weight = st.one_of(st.just(0.0), st.floats(0, 1e12), st.integers(0, 9).map(float))


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, list[float] | None]:
    count = draw(st.integers(1, 64))
    first = draw(st.integers(0, count - 1))
    weights = draw(st.none() | st.lists(weight, min_size=count, max_size=count).filter(any))
    return draw(sizes), count, first, weights


@given(plans())
@example((2 * MIN_SEGMENT_BYTES + 1, 2, 0, None))  # the partial block must not shorten a segment
@example((MIB, 3, 1, [5e-324, 1.7e308, 0.0]))
@settings(max_examples=50, deadline=None)
def test_segments_cover_the_tensor_in_whole_blocks(
    plan: tuple[int, int, int, list[float] | None],
) -> None:
    total, count, first, weights = plan
    segments = partition(total, count, first=first, weights=weights)
    assert segments == partition(total, count, first=first, weights=weights)
    assert [segment.index for segment in segments] == list(range(count))
    end = 0
    for segment in segments:
        assert segment.offset == end
        assert segment.offset % BLOCK_BYTES == 0 or segment.length == 0
        end += segment.length
    assert end == total
    held = [segment for segment in segments if segment.length]
    assert sum(segment.blocks for segment in held) == math.ceil(total / BLOCK_BYTES)
    assert all(segment.length % BLOCK_BYTES == 0 for segment in held[:-1])
    if len(held) > 1:
        assert min(segment.length for segment in held) >= MIN_SEGMENT_BYTES
        assert all(weights is None or weights[segment.index] > 0 for segment in held)
    if 0 < total < 2 * MIN_SEGMENT_BYTES:
        assert [segment.index for segment in held] == [first]


@given(total=sizes, count=st.integers(1, 64), turn=st.integers(0, 63))
@settings(max_examples=50, deadline=None)
def test_equal_segments_differ_by_a_block_at_most(total: int, count: int, turn: int) -> None:
    first = turn % count
    segments = partition(total, count, first=first)
    used = min(count, max(1, total // MIN_SEGMENT_BYTES))
    holders = {(first + i) % count for i in range(used)}
    assert {segment.index for segment in segments if segment.length} == (
        holders if total else set()
    )
    blocks = [segments[miner].blocks for miner in holders]
    assert max(blocks) - min(blocks) <= 1


@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=20), total=st.integers(0, 1 << 40))
@settings(max_examples=50, deadline=None)
def test_shares_are_in_proportion_to_the_weights(weights: list[float], total: int) -> None:
    total += 3000 * MIN_SEGMENT_BYTES  # enough for the lightest of 20
    segments = partition(total, len(weights), weights=weights)
    blocks = math.ceil(total / BLOCK_BYTES)
    for segment, share in zip(segments, weights, strict=True):
        assert abs(segment.blocks - blocks * share / math.fsum(weights)) < 1.01


def test_equal_weights_are_no_weights() -> None:
    for total in (0, 5 * MIB + 1, 64 * MIB + 77):
        assert partition(total, 7, first=3, weights=[0.3] * 7) == partition(total, 7, first=3)


@pytest.mark.parametrize("total", [0, 1, 256 * KIB, 511 * KIB])
def test_small_tensors_go_to_the_anchor_alone_even_at_weight_zero(total: int) -> None:
    for first in range(4):
        weights = [1.0] * 4
        weights[first] = 0.0
        segments = partition(total, 4, first=first, weights=weights)
        assert [segment.length for segment in segments] == [
            total if miner == first else 0 for miner in range(4)
        ]
        assert segments[first].blocks == math.ceil(total / BLOCK_BYTES)


def test_fewer_segments_than_miners_follow_the_rotation() -> None:
    segments = partition(MIB, 6, first=4)
    assert [segment.length for segment in segments] == [256 * KIB, 256 * KIB, 0, 0] + [
        256 * KIB
    ] * 2


def test_a_weight_of_zero_gets_nothing_of_a_large_tensor() -> None:
    segments = partition(4 * MIB, 3, first=1, weights=[1, 0, 3])
    assert [segment.length for segment in segments] == [MIB, 0, 3 * MIB]


def test_a_share_below_the_minimum_is_left_to_the_others() -> None:
    segments = partition(MIB, 4, weights=[1, 2, 1, 0.01])
    assert [segment.length for segment in segments] == [256 * KIB, 512 * KIB, 256 * KIB, 0]


def test_of_equal_weights_the_last_in_the_rotation_is_left_out() -> None:
    segments = partition(MIB, 4, first=1, weights=[1, 1, 2, 1])
    assert [segment.length for segment in segments] == [0, 256 * KIB, 512 * KIB, 256 * KIB]


def test_small_tensors_rotate_even_past_a_heavier_miner() -> None:
    segments = partition(2 * MIB - 1, 8, first=0, weights=[1] * 7 + [1.05])
    assert [segment.index for segment in segments if segment.length] == [0, 1, 2, 3, 4, 5, 6]


def test_the_digest_is_pinned_and_sees_every_field() -> None:
    segments = (Segment(0, 0, 16384), Segment(1, 16384, 100))
    assert map_digest(segments).hex() == "ebdbded2ab8dfdadc26cdb8db6dc3825"
    others = [
        (Segment(0, 0, 16384),),
        (Segment(0, 0, 16384), Segment(2, 16384, 100)),
        (Segment(0, 0, 16384), Segment(1, 16385, 100)),
        (Segment(0, 0, 16384), Segment(1, 16384, 101)),
    ]
    assert len({map_digest(other) for other in [segments, *others]}) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_bytes": -1}, "total_bytes is -1"),
        ({"segment_count": 0}, "segment_count is 0"),
        ({"first": 2}, "first is 2, must be in 0..1"),
        ({"first": -1}, "first is -1"),
        ({"weights": [1.0]}, "1 weights for 2 segments"),
        ({"weights": [1.0, -1.0]}, "finite and 0 or more"),
        ({"weights": [1.0, math.nan]}, "finite and 0 or more"),
        ({"weights": [math.inf, 1.0]}, "finite and 0 or more"),
        ({"weights": [0.0, 0.0]}, "all weights are zero"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(**({"total_bytes": MIB, "segment_count": 2} | arguments))  # type: ignore[arg-type]


# Weights for the next step ----------------------------------------------------------------------

EQUAL = (EQUAL_WEIGHT,) * 4


def test_a_quarter_of_the_rate_gets_a_quarter_of_the_bytes_at_once() -> None:
    weights = rebalance(EQUAL, [1000] * 4, [100_000] * 3 + [400_000])
    assert sum(weights) == pytest.approx(sum(EQUAL), rel=1e-6)
    assert weights[0] == weights[1] == weights[2]
    assert weights[3] / weights[0] == pytest.approx(1 / 4, rel=1e-3)


def test_times_that_scatter_move_weights_a_quarter_of_the_way() -> None:
    weights = rebalance(EQUAL, [1 << 30] * 4, [100_000, 100_000, 100_000, 105_000])
    exact = 4 * EQUAL_WEIGHT * (1 / 105) / (3 / 100 + 1 / 105)
    assert weights[3] - EQUAL_WEIGHT == pytest.approx((exact - EQUAL_WEIGHT) / 4, rel=1e-3)


def test_segments_that_end_together_leave_the_weights_alone() -> None:
    weights = (EQUAL_WEIGHT, 2 * EQUAL_WEIGHT)
    assert rebalance(weights, [1 << 20, 2 << 20], [90_000, 90_000]) == weights


@pytest.mark.parametrize(
    ("lengths", "times_us"),
    [
        ([1000] * 4, [5000, 5000, 5000, 19_000]),  # too short to tell
        ([1000, 0, 0, 0], [400_000, 0, 0, 0]),  # nobody to compare with
        ([1000] * 4, [0] * 4),
    ],
)
def test_what_measures_nothing_changes_nothing(lengths: list[int], times_us: list[int]) -> None:
    assert rebalance(EQUAL, lengths, times_us) == EQUAL


def test_a_miner_that_took_no_part_keeps_its_weight() -> None:
    weights = rebalance(EQUAL, [1000, 0, 1000, 1000], [100_000, 0, 100_000, 400_000])
    assert weights[1] == EQUAL_WEIGHT


@given(
    st.lists(
        st.tuples(st.integers(1, 1 << 24), st.integers(0, 1 << 40), st.integers(0, (1 << 32) - 1)),
        min_size=1,
        max_size=16,
    )
)
def test_whatever_miners_say_the_weights_can_cut_a_tensor(said: list[tuple[int, int, int]]) -> None:
    weights = rebalance(*map(list, zip(*said, strict=True)))
    assert all(weight >= 1 for weight in weights)
    segments = partition(1 << 30, len(weights), weights=weights)
    assert sum(segment.length for segment in segments) == 1 << 30
