"""When a chain counts as silent, and what is said then."""

from __future__ import annotations

import pytest

from mapreduce.core.block_watch import RECONNECTS, BlockWatch, silence_limit


def watch(limit_s: float = 120.0) -> BlockWatch:
    return BlockWatch(limit_s, 1000.0)


def asked(watch: BlockWatch, until: float, block: int | None = None) -> int:
    """Asks every second; returns how often a new connection was due."""
    reconnects = 0
    for second in range(int(until - 1000)):
        now = 1001.0 + second
        watch.asks(now)
        if block is not None:
            watch.saw(block, now)
        reconnects += watch.reconnect_due(now)
    return reconnects


@pytest.mark.parametrize(
    ("block_time_s", "limit_s"), [(0.25, 120), (12, 120), (12.5, 125), (60, 600)]
)
def test_ten_blocks_and_no_less_than_two_minutes(block_time_s, limit_s):
    assert silence_limit(block_time_s) == limit_s


def test_a_chain_that_moves_is_never_silent():
    watched = watch()
    for second in range(10_000):
        now = 1001.0 + second
        watched.asks(now)
        watched.saw(second // 12, now)
        assert watched.verdict(now) is None
        assert not watched.reconnect_due(now)


def test_a_node_that_answers_with_an_old_block_is_silence():
    watched = watch()
    assert asked(watched, 1121.0, block=7) == RECONNECTS
    assert watched.verdict(1121.0) is None  # the first answer was new
    watched.asks(1121.5)
    said = watched.verdict(1121.5)
    assert said == (
        "the chain has shown no block after 7 for 120 s, and 3 new connections did not help"
    )


def test_no_answer_is_silence_and_the_reason_is_told():
    watched = watch()
    asked(watched, 1120.0)
    watched.failed("connection refused")
    assert watched.verdict(1120.0) is None
    watched.asks(1121.0)
    assert "no block for 121 s" in str(watched.verdict(1121.0))
    assert str(watched.verdict(1121.0)).endswith(": connection refused")


def test_nodes_that_are_behind_and_take_turns_are_silence():
    watched = watch()
    watched.saw(9, 1000.0)
    for second in range(121):
        now = 1001.0 + second
        watched.asks(now)
        watched.saw(7 + second % 3, now)
    assert watched.verdict(1121.0) is not None


def test_each_new_connection_is_due_once_and_again_after_a_block():
    watched = watch()
    assert [watched.reconnect_due(t) for t in (1029.9, 1030.0, 1030.1, 1059.0)] == [
        False,
        True,
        False,
        False,
    ]
    assert watched.reconnect_due(1060.0)
    watched.saw(8, 1061.0)
    assert not watched.reconnect_due(1062.0)
    assert watched.reconnect_due(1091.0)


def test_a_loop_that_does_not_ask_is_blocked():
    watched = watch()
    asked(watched, 1100.0, block=7)
    assert watched.verdict(1121.0) is None  # block 7 was new at 1001
    assert watched.verdict(1122.0) == (
        "the chain has shown no block after 7 for 121 s, and 3 new connections did not help"
    )
    blocked = watch()
    blocked.asks(1001.0)
    blocked.saw(7, 1001.0)
    assert blocked.verdict(1122.0) == "the event loop has been blocked for 121 s"


def test_a_question_without_an_answer_is_no_blocked_loop():
    watched = watch()
    watched.asks(1100.0)
    assert not watched.is_blocked(1100.0 + watched.patience_s + 12.0)
    assert watched.is_blocked(1161.0)


def test_a_process_that_stood_still_counts_anew():
    watched = watch()
    watched.saw(7, 1001.0)
    watched.restart(5000.0)
    assert watched.verdict(5119.0) is None
    assert watched.verdict(5121.0) is not None
