"""Which miner gets the next frame, how long it is, and how much the kernel may hold."""

from __future__ import annotations

from collections import Counter

import pytest

from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.wire.schedule import (
    FRAME_S,
    QUEUE_S,
    Upload,
    frame_bytes_for,
    next_upload,
    queue_bytes_for,
)

BLOCK = BLOCK_BYTES


def order(uploads: list[Upload], rank: int, frame_bytes: int = BLOCK) -> list[int]:
    """The miners in the order in which they are sent to, if every socket takes everything."""
    turns = []
    while chosen := next_upload(
        uploads,
        rank=rank,
        window_bytes=1 << 30,
        frame_bytes=frame_bytes,
        writable=lambda _: True,
        patient=True,
    ):
        miner, nbytes = chosen
        uploads[miner].sent += nbytes
        turns.append(miner)
    assert all(upload.sent == upload.length for upload in uploads)
    return turns


@pytest.mark.parametrize("rank", range(4))
def test_rank_k_begins_with_miner_k_and_goes_round(rank: int) -> None:
    turns = order([Upload(length=3 * BLOCK) for _ in range(4)], rank)
    assert turns == [(rank + turn) % 4 for turn in range(12)]


def test_turns_are_in_proportion_to_the_segments() -> None:
    lengths = [8 * BLOCK, 4 * BLOCK, 2 * BLOCK]
    turns = order([Upload(length=length) for length in lengths], 0)
    assert Counter(turns[:7]) == {0: 4, 1: 2, 2: 1}


def choose(uploads: list[Upload], writable: set[int], *, patient: bool) -> tuple[int, int] | None:
    return next_upload(
        uploads,
        rank=0,
        window_bytes=2 * BLOCK,
        frame_bytes=4 * BLOCK,
        writable=writable.__contains__,
        patient=patient,
    )


def test_a_turn_waits_for_a_socket_only_while_patient() -> None:
    uploads = [Upload(length=4 * BLOCK), Upload(length=4 * BLOCK)]
    assert choose(uploads, {1}, patient=True) is None
    assert choose(uploads, {1}, patient=False) == (1, 2 * BLOCK)
    assert choose(uploads, set(), patient=False) is None


def test_a_turn_never_waits_for_credit_while_another_has_some() -> None:
    uploads = [Upload(length=4 * BLOCK, sent=2 * BLOCK), Upload(length=4 * BLOCK, sent=3 * BLOCK)]
    uploads[1].released = 2 * BLOCK  # the first is behind, but its window is full
    assert choose(uploads, {0, 1}, patient=True) == (1, BLOCK)
    uploads[0].released = BLOCK
    assert choose(uploads, {0, 1}, patient=True) == (0, BLOCK)


def test_frames_and_queues_follow_the_rate() -> None:
    assert frame_bytes_for(0.0, 1 << 20) == BLOCK
    assert frame_bytes_for(1e12, 1 << 20) == 1 << 20
    rate = 10 * BLOCK / FRAME_S
    assert frame_bytes_for(rate, 1 << 20) == 10 * BLOCK
    assert queue_bytes_for(0.0, 0.1) == BLOCK
    # Twice the bandwidth-delay product, so that a flow that is limited by its queue can grow.
    assert queue_bytes_for(1e7, 0.1) == int(1e7 * (0.2 + QUEUE_S))
