"""What a miner reads of its score, and what an operator reads of all."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

from mapreduce.core.scoring import Components
from mapreduce.errors import BadMessage, LocalError
from mapreduce.score import leaderboard_lines, main, score_lines
from mapreduce.store.database import Database
from mapreduce.store.history import History, Leader, Measurement, Score, Seen
from mapreduce.wire.messages import MAX_MESSAGE_BYTES, decode_message, encode_message
from mapreduce.wire.scores import (
    MAX_MEASUREMENTS,
    MAX_REASON,
    MAX_STRIKES,
    Ban,
    Measured,
    ScoreFeedback,
    SignedScore,
    Strike,
    WeightsFailed,
    WeightsSet,
    WindowScore,
    read_components,
    score_statement,
)

if TYPE_CHECKING:
    from pathlib import Path

VALIDATOR = "5" + "V" * 47
HOTKEY = "5" + "H" * 47
NOW = 1_700_000_000.0

PARTS = Components(
    goodput_bytes_per_s=100e6,  # 400 Mbit/s each way
    cap_bytes_per_s=50e6,
    phi=0.5,
    reliability=0.98,
    latency_s=0.020,
    latency_factor=0.95,
    gate=0.5,
    ramp=0.75,
    cluster_size=3,
    cluster_factor=0.96,
    score=16.4e6,
    weight=0.125,
    reasons=("disputed by many peers", "measured in 9 of 12 windows"),
)


def feedback(**changes: Any) -> ScoreFeedback:
    fields: dict[str, Any] = {
        "validator": VALIDATOR,
        "hotkey": HOTKEY,
        "netuid": 10,
        "uid": 7,
        "at": NOW,
        "status": "scored",
        "window": 412,
        "window_closed_at": NOW - 600,
        "score": WindowScore(rank=2, miners=8, components=PARTS),
        "cap_bytes_per_s": 200e6,
        "measurements": [],
        "ban": None,
        "strikes": [],
        "disputes": 0,
        "weights": WeightsSet(at=NOW - 7200, block=1234, dry_run=False, weight=0.125),
        "weights_failed": None,
    }
    return ScoreFeedback(**(fields | changes))


def measured(**changes: Any) -> Measured:
    fields: dict[str, Any] = {
        "window": 412,
        "window_at": NOW - 4920,
        "outcome": "measured",
        "goodput_bytes_per_s": 100e6,
        "latency_s": 0.02,
        "reason": "",
    }
    return Measured(**(fields | changes))


def leader(**changes: Any) -> Leader:
    factors = asdict(PARTS)
    score, weight = factors.pop("score"), factors.pop("weight")
    fields: dict[str, Any] = {
        "hotkey": HOTKEY,
        "uid": 7,
        "ip": "198.51.100.7",
        "rank": 1,
        "score": score,
        "weight": weight,
        "components_json": json.dumps(factors),
        "measured_at": NOW - 300,
        "goodput_bytes_per_s": 90e6,
        "strikes": ("a" * 32, "b" * 32),
    }
    return Leader(**(fields | changes))


# The message ------------------------------------------------------------------------------------


def test_a_score_survives_the_wire_bit_for_bit() -> None:
    strike = Strike(proof="a" * 32, kind="F1 wrong sum", role="miner", at=NOW - 1)
    sent = feedback(
        measurements=[measured()],
        strikes=[strike],
        ban=Ban(proof="a" * 32, own=True, until=NOW + 1),
        weights_failed=WeightsFailed(at=NOW, reason="too fast"),
    )
    assert decode_message(ScoreFeedback, encode_message(sent)) == sent


def test_a_hotkey_of_which_nothing_is_known_has_an_answer() -> None:
    sent = feedback(
        uid=None,
        status="not registered",
        window=None,
        window_closed_at=None,
        score=None,
        weights=None,
    )
    assert decode_message(ScoreFeedback, encode_message(sent)) == sent


def test_the_largest_answer_is_far_below_the_limit() -> None:
    worst = "\x01" * MAX_REASON  # no character grows more when it is quoted, and then once more
    strike = Strike(proof="a" * 32, kind="F1 wrong sum", role="miner", at=NOW)
    sent = feedback(
        measurements=[measured(reason=worst)] * MAX_MEASUREMENTS,
        strikes=[strike] * MAX_STRIKES,
        weights_failed=WeightsFailed(at=NOW, reason=worst),
    )
    signed = SignedScore(score=encode_message(sent).decode(), signature="0" * 128)
    assert len(encode_message(signed)) < MAX_MESSAGE_BYTES * 3 // 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", "fine"),
        ("hotkey", "nobody"),
        ("measurements", [asdict(measured())] * (MAX_MEASUREMENTS + 1)),
        ("measurements", [asdict(measured()) | {"reason": "x" * (MAX_REASON + 1)}]),
        ("strikes", [{"proof": "../../etc", "kind": "F1", "role": "miner", "at": 0.0}]),
        ("disputes", -1),
    ],
)
def test_an_answer_out_of_bounds_is_refused_by_name(field: str, value: object) -> None:
    fields = json.loads(encode_message(feedback())) | {field: value}
    with pytest.raises(BadMessage, match=f"ScoreFeedback: {field}"):
        decode_message(ScoreFeedback, json.dumps(fields))


def test_no_answer_has_a_place_for_what_tells_benchmarks_apart() -> None:
    text = encode_message(feedback(measurements=[measured()])).decode()
    for name in ("job", "step", "segment", "bot", '"ip"'):
        assert name not in text.replace("real jobs", "")


def test_what_is_signed_can_be_nothing_else() -> None:
    assert score_statement("{}") == b"mapreduce/1 score\n{}"


def test_a_stored_score_is_whole_again() -> None:
    stored = leader()
    read = read_components(stored.components_json, score=stored.score, weight=stored.weight)
    assert read == PARTS
    with pytest.raises(BadMessage, match="Components: goodput_bytes_per_s"):
        read_components("{}", score=1.0, weight=1.0)


# What is printed --------------------------------------------------------------------------------


def test_every_component_is_shown_with_its_meaning() -> None:
    lines = [" ".join(line.split()) for line in score_lines(feedback())]
    for start in (
        f"hotkey {HOTKEY}, uid 7",
        "status scored; the last window closed 10 minutes ago",
        "score 16.400 MB/s, rank 2 of 8 in window 412",
        "weight 0.1250 of all scores",
        "measured 400.0 Mbit/s each way, by bots",
        "paid for 200.0 Mbit/s the same after real jobs, at most the 800.0 Mbit/s that bots can",
        "real jobs 0.50 ",
        "reliability 0.980 ",
        "latency 20 ms ",
        "factor 0.950 ",
        "gate 0.50 ",
        "ramp 0.75 ",
        "cluster 3 ",
        "factor 0.96 ",
        "lowered: disputed by many peers",
        "lowered: measured in 9 of 12 windows",
        "chain this validator has set a weight of 0.1250 at block 1234, 2 hours ago",
    ):
        assert any(line.startswith(start) for line in lines), start


def test_what_is_unknown_is_a_dash() -> None:
    parts = replace(PARTS, phi=None, latency_s=None)
    score = WindowScore(rank=1, miners=1, components=parts)
    cells = [line.split() for line in score_lines(feedback(score=score))]
    assert ["real", "jobs", "-"] in [line[:3] for line in cells]
    assert ["latency", "-"] in [line[:2] for line in cells]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"status": "not scored yet"}, "not scored yet: the first window"),
        ({"status": "not registered", "uid": None}, "not registered on netuid 10"),
    ],
)
def test_without_a_score_the_reason_is_told(changes: dict[str, Any], expected: str) -> None:
    lines = score_lines(feedback(score=None, weights=None, **changes))
    assert lines[2].startswith(f"status     {expected}")
    assert not [line for line in lines if line.startswith(("score", "weight", "  lowered"))]
    assert "chain      this validator has set no weights yet" in lines


@pytest.mark.parametrize(
    ("own", "whom"), [(True, "it;"), (False, "another hotkey of its coldkey or address;")]
)
def test_a_ban_names_its_proof_and_its_end(own: bool, whom: str) -> None:
    ban = Ban(proof="c" * 32, own=own, until=NOW + 86400)
    lines = score_lines(feedback(status="banned", ban=ban))
    assert f"banned until 2023-11-15 22:13 UTC for proof {'c' * 32} against {whom}" in lines[2]


def test_measurements_strikes_disputes_and_failures_are_lines() -> None:
    rows = [
        measured(),
        measured(outcome="failed", goodput_bytes_per_s=0.0, latency_s=None, reason="it stalled"),
        measured(outcome="void", goodput_bytes_per_s=0.0, latency_s=None),
    ]
    strike = Strike(proof="a" * 32, kind="F1 wrong sum", role="miner", at=NOW - 86400 * 3)
    failed = WeightsFailed(at=NOW - 30, reason="no permit")
    lines = score_lines(
        feedback(measurements=rows, strikes=[strike], disputes=2, weights_failed=failed)
    )
    head = "  window 412, from 2023-11-14 20:51 UTC: "
    assert f"{head}400.0 Mbit/s, first byte after 20 ms" in lines
    assert f"{head}failed: it stalled" in lines
    assert f"{head}shows nothing" in lines
    assert f"  {'a' * 32}  F1 wrong sum, as miner, 3 days ago" in lines
    assert "disputes   2 peers in the last day; proves nothing" in lines
    assert "           last failure 30 s ago: no permit" in lines


def test_a_time_that_no_calendar_has_is_printed_all_the_same() -> None:
    lines = score_lines(feedback(measurements=[measured(window_at=1e300)]))
    assert "1e+300 s of the Unix epoch" in "\n".join(lines)


def test_the_leaderboard_has_a_line_per_miner() -> None:
    lines = leaderboard_lines(
        [leader(), leader(rank=2, uid=None, measured_at=None, strikes=())], NOW
    )
    assert lines[0].split() == [
        *("rank", "uid", "hotkey", "Mbit/s", "reliability", "gate", "ramp", "score", "MB/s"),
        *("weight", "measured", "strikes", "reasons"),
    ]
    short = "5HHHHH..HHHHH"
    reasons = "disputed by many peers; measured in 9 of 12 windows"
    cells = ["1", "7", short, "400.0", "0.980", "0.50", "0.75", "16.400", "0.1250", "5", "minutes"]
    assert lines[1].split() == [*cells, "ago", "2", *reasons.split()]
    assert lines[2].split()[:3] == ["2", "-", short]
    assert "never        0" in lines[2]
    where = lines[0].index("reasons")
    assert lines[1].index("disputed") == where == lines[2].index("disputed")


# The command ------------------------------------------------------------------------------------


def answers(monkeypatch: pytest.MonkeyPatch, score: ScoreFeedback) -> list[Path | None]:
    """Has the command answered so; returns the directories for proofs that it is called with."""
    asked: list[Path | None] = []

    async def ask(_: object, directory: Path | None) -> object:
        asked.append(directory)
        signed = SignedScore(score=encode_message(score).decode(), signature="0" * 128)
        if directory is None:
            return signed, score, {}
        return signed, score, {"a" * 32: directory / "a.proof", "b" * 32: None}

    monkeypatch.setattr("mapreduce.score.ask", ask)
    return asked


def test_the_proofs_that_were_fetched_are_named_and_those_that_are_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = answers(monkeypatch, feedback())
    assert main(["--proofs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"validator  {VALIDATOR} of netuid 10"
    assert lines[-2:] == [
        f"  {'a' * 32}: {tmp_path / 'a.proof'}",
        f"  {'b' * 32}: its evidence is not kept any more",
    ]
    assert main(["--proofs", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["proofs"] == {"a" * 32: str(tmp_path / "a.proof"), "b" * 32: None}
    assert asked == [tmp_path, tmp_path]


def test_programs_get_what_was_signed_and_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = feedback(measurements=[measured()])
    assert answers(monkeypatch, score) == []
    assert main(["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert decode_message(ScoreFeedback, printed["signed"]["score"]) == score
    assert decode_message(ScoreFeedback, json.dumps(printed["score"])) == score
    assert printed["proofs"] == {}


def test_a_validator_cannot_drive_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [measured(outcome="failed", reason="\x1b[2J\nscore")]
    answers(monkeypatch, feedback(measurements=rows))
    assert main([]) == 0
    assert "failed, first byte after 20 ms: ?[2J?score\n" in capsys.readouterr().out


# The state file ---------------------------------------------------------------------------------


def closed_window(path: Path) -> Database:
    database = Database.open(path)
    history = History(database)
    history.see([Seen(uid=7, hotkey=HOTKEY, coldkey=HOTKEY, ip=None)], NOW)
    row = Measurement(
        at=NOW,
        window=1,
        job="0" * 32,
        hotkey=HOTKEY,
        outcome="measured",
        goodput_bytes_per_s=90e6,
        latency_s=0.1,
        seconds=1.0,
        bytes=1,
        reason="",
    )
    history.add_slot([row])
    text = leader().components_json
    score = Score(rank=1, score=PARTS.score, weight=PARTS.weight, components_json=text)
    history.close_window(1, NOW, {}, {HOTKEY: score})
    return database


def test_a_state_file_is_read_while_a_validator_has_it_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state.sqlite"
    with closed_window(path):
        assert main(["--state", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert lines[1].split()[:4] == ["1", "7", "5HHHHH..HHHHH", "400.0"]
        assert main(["--state", str(path), "--json"]) == 0
        (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["hotkey"], entry["rank"], entry["goodput_bytes_per_s"]) == (HOTKEY, 1, 90e6)
    assert entry["components"]["reasons"] == list(PARTS.reasons)
    assert "components_json" not in entry


def test_a_state_file_without_a_score_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state.sqlite"
    Database.open(path).close()
    assert main(["--state", str(path)]) == 0
    assert capsys.readouterr().out == "no scores yet\n"


def test_a_missing_state_file_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="cannot read the validator's state"):
        main(["--state", str(tmp_path / "none")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_reading_a_state_file_needs_no_chain(tmp_path: Path) -> None:
    closed_window(tmp_path / "state").close()
    code = (
        "import sys; from mapreduce.score import main; "
        f"main(['--state', {str(tmp_path / 'state')!r}]); "
        "print(sorted({'torch', 'bittensor', 'aiohttp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
