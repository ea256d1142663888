"""The validator's ledgers: what was written is read back, and blame never changes its kind."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mapreduce.errors import LocalError
from mapreduce.store import ledger as ledger_module
from mapreduce.store.ledger import (
    KEEP_ENTRIES_S,
    KEEP_JOBS_S,
    DisputeEntry,
    Ledger,
    ProofEntry,
    UnavailableEntry,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path) as opened:
        yield opened


def add_proof(
    ledger: Ledger,
    proof_id: str,
    now: float,
    *,
    role: str = "miner",
    who: str = "m0",
    job: str = "j",
    data: bytes = b"evidence",
) -> bool:
    return ledger.add_proof(
        proof_id, kind="F1", role=role, culprit=who, job=job, step=7, segment=3, data=data, now=now
    )


def add_unavailable(ledger: Ledger, role: str, hotkey: str, now: float) -> None:
    ledger.add_unavailable(
        role=role, hotkey=hotkey, job="j", step=1, segment=2, what="no opening", now=now
    )


def add_dispute(
    ledger: Ledger,
    peer: str,
    miner: str,
    now: float,
    *,
    job: str = "j",
    step: int = 1,
    segment: int = 2,
    what: str = "rejected root",
) -> None:
    ledger.add_dispute(
        peer=peer, miner=miner, job=job, step=step, segment=segment, what=what, now=now
    )


def test_a_proof_is_kept_with_its_evidence(ledger: Ledger) -> None:
    evidence = bytes(range(256)) * 600  # about what K = 8 openings take
    assert add_proof(ledger, "a", 10.5, data=evidence)
    assert ledger.proof("a") == evidence
    assert ledger.proof("b") is None
    assert ledger.proofs() == [
        ProofEntry(
            id="a", kind="F1", role="miner", culprit="m0", job="j", step=7, segment=3, at=10.5
        )
    ]


def test_a_known_proof_is_not_replaced(ledger: Ledger) -> None:
    assert add_proof(ledger, "a", 1.0, who="m0", data=b"first")
    assert not add_proof(ledger, "a", 2.0, who="m1", data=b"second")
    assert ledger.proof("a") == b"first"
    assert [(entry.culprit, entry.at) for entry in ledger.proofs()] == [("m0", 1.0)]


def test_unavailable_blames_one_party_softly(ledger: Ledger) -> None:
    add_unavailable(ledger, "peer", "p0", 1.0)
    add_unavailable(ledger, "miner", "m0", 2.0)
    add_unavailable(ledger, "miner", "m0", 2.0)  # each time counts
    peer = UnavailableEntry(
        role="peer", hotkey="p0", job="j", step=1, segment=2, what="no opening", at=1.0
    )
    miner = dataclasses.replace(peer, role="miner", hotkey="m0", at=2.0)
    assert ledger.unavailable() == [peer, miner, miner]


def test_a_dispute_names_two_and_counts_once(ledger: Ledger) -> None:
    add_dispute(ledger, "p0", "m0", 1.0)
    add_dispute(ledger, "p0", "m0", 9.0, what="again")
    assert ledger.disputes() == [
        DisputeEntry(
            peer="p0", miner="m0", job="j", step=1, segment=2, what="rejected root", at=1.0
        )
    ]
    add_dispute(ledger, "p1", "m0", 2.0)
    add_dispute(ledger, "p0", "m1", 3.0)
    add_dispute(ledger, "p0", "m0", 4.0, job="k")
    add_dispute(ledger, "p0", "m0", 5.0, step=2)
    add_dispute(ledger, "p0", "m0", 6.0, segment=3)
    assert [entry.at for entry in ledger.disputes()] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_the_three_ledgers_do_not_mix(ledger: Ledger) -> None:
    def counts() -> tuple[int, int, int]:
        return len(ledger.proofs()), len(ledger.unavailable()), len(ledger.disputes())

    add_unavailable(ledger, "miner", "m0", 1.0)
    assert counts() == (0, 1, 0)
    add_dispute(ledger, "p0", "m0", 1.0)
    assert counts() == (0, 1, 1)
    assert ledger.banned(2.0, 100.0) == {}  # neither is a proof
    add_proof(ledger, "a", 1.0)
    assert counts() == (1, 1, 1)


@pytest.mark.parametrize("role", ["", "validator", "Miner"])
def test_blame_needs_a_peer_or_a_miner(ledger: Ledger, role: str) -> None:
    with pytest.raises(LocalError, match="CHECK"):
        add_unavailable(ledger, role, "m0", 1.0)
    with pytest.raises(LocalError, match="CHECK"):
        add_proof(ledger, "a", 1.0, role=role)
    assert ledger.unavailable() == []
    assert ledger.proofs() == []


def test_since_takes_the_window_and_sorts_by_time(ledger: Ledger) -> None:
    for at in (3.0, 1.0, 2.0):
        add_proof(ledger, f"id{at}", at)
        add_unavailable(ledger, "peer", "p0", at)
        add_dispute(ledger, "p0", f"m{at}", at)
    for read in (ledger.proofs, ledger.unavailable, ledger.disputes):
        assert [entry.at for entry in read()] == [1.0, 2.0, 3.0]
        assert [entry.at for entry in read(2.0)] == [2.0, 3.0]
        assert read(3.5) == []


def test_a_proof_bans_a_miner_until_it_is_too_old(ledger: Ledger) -> None:
    add_proof(ledger, "new", 200.0, who="m0")
    add_proof(ledger, "old", 100.0, who="m0")  # found later, happened before
    add_proof(ledger, "other", 150.0, who="m1")
    add_proof(ledger, "peer", 200.0, who="p0", role="peer")
    assert ledger.banned(200.0, 1000.0) == {"m0": "new", "m1": "other"}
    assert ledger.banned(249.5, 100.0) == {"m0": "new", "m1": "other"}
    assert ledger.banned(250.0, 100.0) == {"m0": "new"}
    assert ledger.banned(300.0, 100.0) == {}
    assert ledger.banned(200.0, 0.0) == {}


def test_everything_is_there_after_a_restart(path: Path) -> None:
    with Ledger.open(path) as first:
        add_proof(first, "a", 1.0)
        add_unavailable(first, "peer", "p0", 2.0)
        add_dispute(first, "p0", "m0", 3.0)
        before = first.proofs(), first.unavailable(), first.disputes()
    with pytest.raises(LocalError, match="closed"):
        first.proofs()
    first.close()
    with Ledger.open(path) as second:
        assert (second.proofs(), second.unavailable(), second.disputes()) == before
        assert second.proof("a") == b"evidence"
        assert not add_proof(second, "a", 9.0)
        add_dispute(second, "p0", "m0", 9.0)
        assert len(second.disputes()) == 1


def test_entries_and_proofs_of_one_job_are_read_alone(ledger: Ledger) -> None:
    for job in ("j", "k"):
        for at in (1.0, 2.0):
            ledger.add_unavailable(
                role="peer", hotkey="p0", job=job, step=1, segment=2, what=job, now=at
            )
            add_proof(ledger, f"{job}{at}", at, job=job)
    assert [(entry.job, entry.at) for entry in ledger.unavailable(job="k")] == [
        ("k", 1.0),
        ("k", 2.0),
    ]
    assert [entry.at for entry in ledger.unavailable(2.0, job="j")] == [2.0]
    assert [entry.id for entry in ledger.proofs(job="k")] == ["k1.0", "k2.0"]
    assert [entry.id for entry in ledger.proofs(2.0, job="j")] == ["j2.0"]
    assert ledger.unavailable(job="other") == []
    assert ledger.proofs(job="other") == []


def test_the_rows_of_one_job_or_hotkey_are_found_without_reading_those_of_others(
    ledger: Ledger,
) -> None:
    database = ledger._database
    statements: list[str] = []
    database._connection.set_trace_callback(statements.append)
    ledger.unavailable(job="j")
    ledger.proofs(job="j")
    ledger.proofs_of("m0", 1)
    ledger.proof_entry("a")
    ledger.peers_disputing("m0", 0.0)
    database._connection.set_trace_callback(None)
    plans = [database.execute(f"EXPLAIN QUERY PLAN {statement}") for statement in statements]
    found_by = ("job=?", "job=?", "culprit=?", "id=?", "ledger=? AND at>?")
    for plan, key in zip(plans, found_by, strict=True):
        assert any(key in row[3] for row in plan), plan


def test_a_hotkey_finds_what_is_held_against_it(ledger: Ledger) -> None:
    for number, who in enumerate(("m0", "m1", "m0", "m0")):
        add_proof(ledger, str(number), float(number), who=who)
    assert [entry.id for entry in ledger.proofs_of("m0", 2)] == ["3", "2"]
    assert ledger.proofs_of("m2", 2) == []
    entry = ledger.proof_entry("1")
    assert entry is not None
    assert (entry.culprit, entry.at) == ("m1", 1.0)
    assert ledger.proof_entry("4") is None
    for job, (peer, now) in enumerate([("p0", 1.0), ("p1", 2.0), ("p2", 3.0), ("p2", 3.0)]):
        add_dispute(ledger, peer, "m0", now, job=str(job))
    add_dispute(ledger, "p9", "m1", 3.0)
    assert ledger.peers_disputing("m0", 2.0) == 2


def test_old_jobs_go_when_one_comes(ledger: Ledger) -> None:
    ledger.add_job("a", "first", 0.0)
    ledger.add_job("b", "second", KEEP_JOBS_S)
    assert (ledger.job("a"), ledger.job("b")) == ("first", "second")
    ledger.add_job("b", "third", KEEP_JOBS_S + 1.0)
    assert (ledger.job("a"), ledger.job("b")) == (None, "third")


def test_old_entries_go_a_bounded_number_at_a_time(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_PRUNED", 2)
    for at in (1.0, 2.0, 3.0):
        add_unavailable(ledger, "peer", "p0", at)
        add_dispute(ledger, "p0", f"m{at}", at)
    add_proof(ledger, "a", 1.0)
    now = KEEP_ENTRIES_S + 3.0
    assert [ledger.prune(now, 0.0) for _ in range(3)] == [2, 2, 0]
    assert [entry.at for entry in ledger.unavailable()] == [3.0]
    assert [entry.at for entry in ledger.disputes()] == [3.0]
    assert ledger.proof("a") == b"evidence"


def test_the_oldest_evidence_goes_but_neither_the_verdict_nor_what_a_ban_rests_on(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "KEEP_EVIDENCE", 2)
    for number in range(5):
        add_proof(ledger, f"id{number}", float(number))
    entries = ledger.proofs()
    assert ledger.prune(10.0, ban_s=8.5) == 2  # id2 is one too many, but young
    assert [ledger.proof(entry.id) is None for entry in entries] == [True, True] + [False] * 3
    assert ledger.banned(10.0, 8.5).keys() == {"m0"}
    assert ledger.prune(10.0, ban_s=8.0) == 1  # as old as a ban: no ban rests on it
    assert ledger.prune(99.0, ban_s=8.0) == 0
    assert [ledger.proof(entry.id) is None for entry in entries] == [True] * 3 + [False] * 2
    assert ledger.proofs() == entries
    assert not add_proof(ledger, "id0", 50.0)


WRITER = """
import sys
from pathlib import Path
from mapreduce.store.ledger import Ledger
ledger = Ledger.open(Path(sys.argv[1]))
for n in range(10**9):
    ledger.add_proof(f"id{n}", kind="F1", role="miner", culprit="m", job="j", step=n, segment=0,
                     data=bytes([n % 256]) * 5000, now=float(n))
    ledger.add_dispute(peer="p", miner="m", job="j", step=n, segment=0, what="x", now=float(n))
    sys.stdout.write("x")
    sys.stdout.flush()
"""


def test_a_killed_validator_leaves_a_prefix(path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with writer:
        try:
            reported = len(writer.stdout.read(300))  # past a checkpoint, at 1000 pages
        finally:
            writer.kill()
        reported += len(writer.stdout.read())
    with Ledger.open(path) as ledger:
        steps = [entry.step for entry in ledger.proofs()]
        assert steps == list(range(len(steps)))
        assert len(steps) - reported in (0, 1)  # at most the one it was about to report
        assert len(steps) - len(ledger.disputes()) in (0, 1)
        for step in (0, len(steps) - 1):
            assert ledger.proof(f"id{step}") == bytes([step % 256]) * 5000
        assert add_proof(ledger, "after", 0.0)
