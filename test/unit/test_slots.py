"""A benchmark job in numbers: its size, whom its reports blame, and the time that a miner took."""

from __future__ import annotations

import random

import pytest

from mapreduce.core.scoring import ScoringConfig
from mapreduce.services.slots import Verdict, _steps_of, judge, slot_size
from mapreduce.wire.benchmarks import MAX_WHAT, BenchmarkReport, Blame, SegmentTime
from mapreduce.wire.messages import MAX_MESSAGE_BYTES, encode_message
from mapreduce.wire.terms import MAX_BANDWIDTH

CONFIG = ScoringConfig()
UIDS = {7: "a", 8: "b", 9: "c"}
KINDS = ("lost", "stalled", "wrong", "disputed")
NBYTES = 1_000_000


def step(uids: list[int]) -> list[SegmentTime]:
    return [SegmentTime(uid=uid, nbytes=NBYTES, first_us=20_000, last_us=900_000) for uid in uids]


def report(
    rank: int, *blames: tuple[int, str], steps: int = 12, error: str = ""
) -> BenchmarkReport:
    return BenchmarkReport(
        job="ab" * 16,
        rank=rank,
        granted="",
        steps=[step(list(UIDS))] * steps,
        blames=[Blame(uid=uid, kind=kind, what="so") for uid, kind in blames],  # type: ignore[arg-type]
        error=error,
    )


def judged(*reports: BenchmarkReport, peers: int = 0, **refused: str) -> dict[str, Verdict]:
    return judge(
        UIDS,
        {told.rank: told for told in reports},
        peers or len(reports),
        refused=refused,
        seconds=10.0,
        config=CONFIG,
    )


def failed(verdicts: dict[str, Verdict]) -> set[str]:
    return {hotkey for hotkey, verdict in verdicts.items() if verdict.outcome == "failed"}


# Blame -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lost", "stalled", "disputed"])
def test_a_miner_has_failed_if_more_than_half_of_the_bots_say_so(kind: str) -> None:
    for peers in range(1, 6):
        for blaming in range(peers + 1):
            told = [report(r, *([(8, kind)] if r < blaming else [])) for r in range(peers)]
            assert failed(judged(*told)) == ({"b"} if 2 * blaming > peers else set())


def test_one_proof_is_enough() -> None:
    verdicts = judged(report(0), report(1, (8, "wrong")), report(2))
    assert failed(verdicts) == {"b"}
    assert verdicts["b"].reason == "wrong: so"


def test_a_bot_that_blames_a_miner_twice_counts_once() -> None:
    assert failed(judged(report(0, (8, "lost"), (8, "stalled")), report(1), report(2))) == set()


def test_bots_without_a_report_blame_nobody_but_count() -> None:
    assert failed(judged(report(0, (8, "lost")), peers=2)) == set()
    assert failed(judged(report(0, (8, "lost")), report(1, (8, "lost")), peers=3)) == {"b"}


def test_an_abort_counts_only_if_all_bots_were_told_of_one() -> None:
    told = [report(rank, (8, "aborted")) for rank in range(3)]
    assert failed(judged(*told)) == {"b"}
    assert failed(judged(*told[:2], report(2))) == set()
    assert failed(judged(*told, peers=4)) == set()


def test_a_lone_bot_that_lost_all_of_several_miners_is_cut_off_itself() -> None:
    lost = [(uid, "lost") for uid in UIDS]
    assert failed(judged(report(0, *lost))) == set()
    assert failed(judged(report(0, *lost[:2]))) == {"a", "b"}
    assert failed(judged(report(0, *lost), report(1, *lost))) == {"a", "b", "c"}


def test_a_miner_that_refuses_the_job_has_failed_and_its_reason_is_kept() -> None:
    verdicts = judged(report(0), b="has no time")
    assert failed(verdicts) == {"b"}
    assert verdicts["b"].reason == "did not take the job: has no time"


def test_a_slot_that_broke_off_before_its_half_measures_nobody() -> None:
    early = judged(report(0, steps=4, error="the network is gone"))
    assert {verdict.outcome for verdict in early.values()} == {"void"}
    assert early["a"].reason == "the network is gone"
    late = judged(report(0, steps=9, error="the network is gone"))
    assert {verdict.outcome for verdict in late.values()} == {"measured"}


def test_no_report_measures_nobody() -> None:
    assert {verdict.outcome for verdict in judged(peers=3).values()} == {"void"}


# Time --------------------------------------------------------------------------------------------


def timed(*waits: tuple[int, int]) -> list[BenchmarkReport]:
    """What bots report that waited so many microseconds for the first and for the last result."""
    return [
        BenchmarkReport(
            job="ab" * 16,
            rank=rank,
            granted="",
            steps=[[SegmentTime(uid=7, nbytes=NBYTES, first_us=first_us, last_us=last_us)]],
            blames=[],
            error="",
        )
        for rank, (first_us, last_us) in enumerate(waits)
    ]


def seconds_of(*waits: tuple[int, int]) -> float:
    ((nbytes, seconds),), _ = _steps_of(7, timed(*waits), len(waits))
    assert nbytes == 2 * len(waits) * NBYTES
    return seconds


def test_no_choice_of_the_miner_makes_it_much_faster_than_it_was() -> None:
    chance = random.Random(1)
    for _ in range(300):
        ends = [chance.randrange(1, 5_000_000) for _ in range(chance.randint(1, 6))]
        waits = [(chance.randrange(end + 1), end) for end in ends]  # all ranks enter at once
        assert 0.95 * max(ends) <= seconds_of(*waits) * 1e6 + 1e-6 <= max(ends) + 1e-5


def test_ranks_that_enter_early_wait_at_the_miners_expense_only_beyond_a_small_part() -> None:
    # The last rank enters 40 ms after the first; the miner takes a second from there.
    early, late = (45_000, 1_040_000), (5_000, 1_000_000)
    assert seconds_of(early, late) == pytest.approx(0.995)
    # 200 ms: the miner is charged for what is more than a twentieth.
    assert seconds_of((205_000, 1_200_000), late) == pytest.approx(1.14)


def test_a_late_first_result_hides_no_more_than_its_small_part() -> None:
    for first_us in (0, 10_000, 500_000, 1_000_000):
        steps, latencies = _steps_of(7, timed((first_us, 1_000_000)), 1)
        assert steps[0][1] == pytest.approx(1.0 - min(first_us * 1e-6, 0.05))
        assert latencies == [pytest.approx(first_us * 1e-6)]


def test_ranks_served_one_after_the_other_take_as_long_as_all_of_them() -> None:
    assert seconds_of((0, 10), (10, 20), (20, 30)) == pytest.approx(28.5e-6)


def test_steps_that_not_all_ranks_made_do_not_count() -> None:
    steps, _ = _steps_of(7, [report(0, steps=3), report(1, steps=5)], 2)
    assert len(steps) == 3


# Size --------------------------------------------------------------------------------------------


def test_the_size_of_a_slot_is_within_the_terms_and_its_largest_report_fits() -> None:
    for miners in (1, 2, 3, 17, 255, 256):
        for peers in (1, 2, 255, 256):
            for estimate in (1.0, 25e6, 1e15):
                size = slot_size(
                    [estimate] * miners,
                    peers,
                    seconds=10.0,
                    max_bytes_per_s=1e14,
                    chance=1.0,
                    leisure=0.5,
                )
                assert 4 <= size.tensor_bytes <= MAX_BANDWIDTH
                assert size.tensor_bytes % 4 == 0
                assert size.steps * miners <= 1000


@pytest.mark.parametrize("miners", [1, 5, 256])
def test_the_largest_report_fits_a_message(miners: int) -> None:
    size = slot_size([1e9] * miners, 1, seconds=10.0, max_bytes_per_s=1e9, chance=0.5, leisure=0.5)
    hour_us = 3_600_000_000
    parts = [
        SegmentTime(uid=65_535, nbytes=MAX_BANDWIDTH, first_us=hour_us, last_us=hour_us)
    ] * miners
    told = BenchmarkReport(
        job="ab" * 16,
        rank=255,
        granted="ab" * 16,
        steps=[parts] * size.steps,
        blames=[],
        error="x" * 1024,
    )
    assert len(encode_message(told)) < MAX_MESSAGE_BYTES


def test_a_report_that_blames_every_miner_fits_a_message() -> None:
    parts = [
        SegmentTime(uid=65_535, nbytes=MAX_BANDWIDTH // 256, first_us=10**9, last_us=10**9)
    ] * 256
    told = BenchmarkReport(
        job="ab" * 16,
        rank=255,
        granted="ab" * 16,
        steps=[parts] * 3,
        blames=[Blame(uid=65_535, kind="disputed", what="x" * MAX_WHAT)] * 256,
        error="x" * 1024,
    )
    assert len(encode_message(told)) < MAX_MESSAGE_BYTES
