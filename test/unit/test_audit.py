"""The audit of a job without a network: what is asked, what is taken, what it costs."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import BadMessage
from mapreduce.wire import audit as audit_module
from mapreduce.wire.audit import MAX_ASKS, JobAudit, Want, Withheld
from mapreduce.wire.bodies import Commit, acks_from
from mapreduce.wire.messages import MAX_MESSAGE_BYTES
from mapreduce.wire.openings import Part, encode_openings, split_openings
from mapreduce.wire.peer_record import PeerRecord
from mapreduce.wire.samples import SampleStore, take_sample
from mapreduce.wire.statements import Acknowledgement
from mapreduce.wire.terms import Terms
from test.memory_job import MemoryJob

if TYPE_CHECKING:
    from mapreduce.wire.proofs import Opening

KIB, MIB = 1024, 1024 * 1024


class Audited:
    """A job in memory after one step, its ranks' records and a validator that knows nothing yet."""

    def __init__(self, peers: int, miners: int, nbytes: int, budget: float, seed: int = 0) -> None:
        frame = min(MIB, max(32 * KIB, nbytes // 16 // (16 * KIB) * 16 * KIB))
        terms = Terms(
            peer_count=peers,
            miner_count=miners,
            bandwidth=1 << 30,
            window_bytes=4 * frame,
            frame_bytes=frame,
        )
        self.job = MemoryJob(terms, seed, socket_bytes=frame, audit_budget=budget)
        self.job._take = lambda queue: bytes(self._drain(queue))  # type: ignore[method-assign]
        self.nbytes = nbytes
        self.audit = JobAudit(self.job.parties.keys, budget)
        self.records = [PeerRecord(peer.signatory) for peer in self.job.peers]

    @staticmethod
    def _drain(queue: bytearray) -> bytes:
        data = bytes(queue)
        queue.clear()
        return data

    def step(self) -> None:
        rng = np.random.default_rng(0)
        count = self.nbytes // 4
        tensors = [rng.random(count, dtype=np.float32) for _ in self.job.peers]
        steps = self.job.all_reduce(tensors, ReduceOp.AVG)
        self.job.run()
        for record, step in zip(self.records, steps, strict=True):
            assert step.error is None
            assert record.step_over(step)

    def tell(self) -> int:
        """All ranks report; returns the bytes of the reports."""
        told = 0
        for rank, record in enumerate(self.records):
            while record.completions:
                completion, signature = record.told(record.completions.popleft())
                told += len(completion.content()) + len(signature)
                self.audit.completed(rank, completion, signature)
        return told

    def bodies(self, rank: int) -> list[bytes]:
        wants, verdicts = self.audit.wants(rank)
        assert not verdicts
        return [b for want in wants for b in self.records[rank].openings(want.step, want.segment)]


@pytest.mark.parametrize(
    ("peers", "segment"), [(2, 4 * MIB), (4, 4 * MIB), (2, 5 * MIB + 4)], ids=str
)
def test_an_audit_stays_within_one_percent_of_the_job(peers: int, segment: int) -> None:
    check_audit_bytes(peers, segment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peers", "segment"), [(8, 4 * MIB), (3, 16 * MIB), (8, 16 * MIB), (2, 64 * MIB)], ids=str
)
def test_an_audit_stays_within_one_percent_of_the_job_at_large(peers: int, segment: int) -> None:
    check_audit_bytes(peers, segment)


def check_audit_bytes(peers: int, segment: int) -> None:
    """A6, with everything that really goes over the wire: completions, evidence, blocks, paths."""
    trial = Audited(peers, 1, segment, budget=0.01)
    trial.step()
    spent = trial.tell()
    for rank in range(peers):
        for body in trial.bodies(rank):
            assert len(body) <= MAX_MESSAGE_BYTES
            spent += len(body)
            assert trial.audit.opened(rank, body) == []
    assert trial.audit.audited_steps == 1
    moved = 2 * peers * segment
    assert 0.002 < spent / moved <= 0.01, spent / moved


def test_a_rank_is_asked_until_it_has_shown_everything_and_three_times_at_most() -> None:
    trial = Audited(2, 1, 300_000, budget=1.0)
    trial.step()
    trial.tell()
    for _ in range(MAX_ASKS):
        assert trial.audit.wants(0) == ([Want(1, 0, True)], [])
    assert trial.audit.wants(0) == ([], [Withheld(0, 1, 0)])
    assert trial.audit.wants(0) == ([], [])
    assert trial.audit.withheld == {0}
    (body, *rest) = trial.bodies(1)
    assert trial.audit.opened(1, body) == []
    assert len(trial.audit.wants(1)[0]) == bool(rest)
    for more in rest:
        trial.audit.opened(1, more)
    assert trial.audit.wants(1) == ([], [])
    assert trial.audit.withheld == {0}


def test_nothing_is_asked_of_a_rank_that_has_not_reported() -> None:
    trial = Audited(2, 1, 300_000, budget=1.0)
    trial.step()
    assert trial.audit.wants(0) == ([], [])
    completion, signature = trial.records[0].told(trial.records[0].completions[0])
    trial.audit.completed(0, completion, signature)
    trial.audit.completed(0, completion, signature)  # told again
    assert len(trial.audit.wants(0)[0]) == 1
    assert trial.audit.wants(1) == ([], [])


def test_openings_that_do_not_fit_are_refused_and_blame_nobody() -> None:
    trial = Audited(2, 1, 300_000, budget=1.0)
    trial.step()
    trial.tell()
    body = trial.bodies(0)[0]
    part = Part.decode(body)
    assert part.certificate is not None
    flipped = bytearray(part.blocks)
    flipped[5] ^= 1
    wrong = {
        "does not open": replace(part, blocks=bytes(flipped)),
        "in the middle of one": replace(part, blocks=part.blocks[:-1]),
        "not the next one": replace(part, first=3),
        "rank 1 has not acknowledged": replace(part, echoes=bytes(len(part.echoes))),
        "echoes of 5 bytes": replace(part, echoes=b"12345"),
        "1 acknowledgements of 2": replace(part, echoes=part.echoes[:132]),
        "not signed": replace(part, certificate=replace(part.certificate, signature=bytes(64))),
        "another place": replace(part, segment=1),
    }
    for says, changed in wrong.items():
        fresh = Audited(2, 1, 300_000, budget=1.0)
        fresh.step()
        fresh.tell()
        with pytest.raises(BadMessage, match=says):
            fresh.audit.opened(0, changed.encode())
        with pytest.raises(BadMessage):  # the blocks of rank 1 are not those of rank 2
            fresh.audit.opened(1, body)
        assert fresh.audit.audited_steps == 0
        assert fresh.audit.withheld == frozenset()
    assert trial.audit.opened(0, Part(step=9, segment=0, first=0).encode()) == []


def test_an_audit_ends_only_when_every_rank_has_opened() -> None:
    trial = Audited(3, 2, 900_000, budget=1.0)
    trial.step()
    trial.tell()
    for rank in range(3):
        assert trial.audit.pending(rank)
        bodies = trial.bodies(rank)
        if rank == 1:  # its first attempt breaks off, and it begins again
            assert trial.audit.opened(rank, bodies[0]) == []
        for body in bodies:
            assert trial.audit.opened(rank, body) == []
        assert trial.audit.pending(0) == (rank < 2)
    assert trial.audit.audited_steps == 1
    assert not trial.audit._steps  # nothing is kept of a step that is over


def test_memory_of_an_audit_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "MAX_OPEN_STEPS", 4)
    trial = Audited(2, 1, 100_000, budget=1.0)
    for _ in range(6):
        trial.step()
    trial.tell()
    assert len(trial.audit._steps) == 4
    monkeypatch.setattr(audit_module, "MAX_HELD_BYTES", 150_000)
    for body in trial.bodies(1):
        trial.audit.opened(1, body)
    held = sum(step.held_bytes for step in trial.audit._steps.values())
    assert held <= 150_000


def test_a_rank_that_tells_of_steps_that_never_were_makes_room_among_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit_module, "MAX_OPEN_STEPS", 4)
    trial = Audited(2, 1, 100_000, budget=1.0)
    trial.step()
    completion, _ = trial.records[1].told(trial.records[1].completions[0])
    trial.tell()
    sign = trial.job.peers[1].signatory.sign
    for number in range(1000, 1020):
        invented = replace(completion, step=number)
        trial.audit.completed(1, invented, sign(invented.statement()))
    for rank in range(2):
        for body in trial.bodies(rank):
            trial.audit.opened(rank, body)
    assert trial.audit.audited_steps == 1


def test_a_made_up_certificate_digest_blames_no_honest_rank() -> None:
    trial = Audited(3, 1, 300_000, budget=1.0)
    trial.step()
    liar = trial.records[1]
    completion, _ = liar.told(liar.completions.popleft())
    made_up = replace(
        completion, segments=(completion.segments[0]._replace(certificate=bytes([1] * 32)),)
    )
    trial.audit.completed(1, made_up, trial.job.peers[1].signatory.sign(made_up.statement()))
    trial.tell()
    for rank in (0, 2):
        for body in trial.bodies(rank):
            trial.audit.opened(rank, body)
    for _ in range(MAX_ASKS + 2):
        for rank in (0, 2):
            assert trial.audit.wants(rank) == ([], [])
    assert trial.audit.withheld == frozenset()


def test_a_sample_that_had_to_make_room_is_not_promised() -> None:
    trial = Audited(2, 1, 100_000, budget=1.0)
    trial.step()
    record = trial.records[0]
    (completion,) = record.completions
    assert completion.sampled == 0
    record.drop(1)
    said, signature = record.told(completion)
    assert said.sampled is None
    trial.audit.completed(0, said, signature)
    assert trial.audit.wants(0) == ([], [])


def test_ranks_that_go_by_different_commits_get_no_verdict_and_no_blame() -> None:
    trial = Audited(2, 2, 600_000, budget=1.0)
    trial.step()
    other = trial.job.peers[1].step
    assert other is not None
    assert other.sample is not None
    del other.trust.commits[0]  # the first miner's COMMIT did not reach the second rank
    sample = take_sample(other, 1.0)
    trial.tell()
    for body in trial.bodies(0):
        assert trial.audit.opened(0, body) == []
    assert sample is not None
    assert sample.evidence.commit_segment == 1
    for body in encode_openings(1, sample.segment, sample.evidence, sample.openings()):
        assert trial.audit.opened(1, body) == []
    assert len(trial.audit._steps[1].challenged) == 2
    assert trial.audit.audited_steps == 0
    assert trial.audit.withheld == frozenset()


def test_a_second_nonce_of_a_lying_rank_keeps_no_honest_rank_from_opening() -> None:
    trial = Audited(2, 1, 300_000, budget=1.0)
    trial.step()
    trial.tell()
    liar = trial.job.peers[1]
    honest = trial.bodies(0)
    bodies = trial.bodies(1)
    part = Part.decode(bodies[0])
    first, own = acks_from(part.echoes)
    said = Acknowledgement(
        place=trial.job.parties.keys.place(1, 0),
        rank=1,
        segment_us=0,
        nonce=bytes(32),
        step_digest=own.step_digest,
    )
    forged = replace(
        own, segment_us=0, nonce=bytes(32), signature=liar.signatory.sign(said.statement())
    )
    body = replace(part, echoes=Commit(acks=(first, forged)).echoes()).encode()
    with contextlib.suppress(BadMessage):  # its blocks may be others than those it has
        trial.audit.opened(1, body)
    assert len(trial.audit._steps[1].challenged) == 1  # the liar's
    for body in honest:
        assert trial.audit.opened(0, body) == []
    assert len(trial.audit._steps[1].challenged) == 2
    assert trial.audit.wants(0) == ([], [])
    assert trial.audit.withheld == frozenset()


def test_samples_are_kept_newest_first_within_their_bound() -> None:
    trial = Audited(2, 1, 100_000, budget=1.0)
    store = SampleStore(max_bytes=250_000)
    kept = []
    for _ in range(5):
        trial.step()
        step = trial.job.peers[0].step
        assert step is not None
        assert step.sample is not None
        store.add(step.sample)
        kept.append(step.number)
        assert store.kept_bytes <= 250_000
    assert store.get(1) is None
    assert store.get(5) is not None
    assert store.promise(4)  # the validator was told of it
    assert not store.promise(1)
    for _ in range(4):
        trial.step()
        step = trial.job.peers[0].step
        assert step is not None
        assert step.sample is not None
        store.add(step.sample)
    assert store.get(4) is not None
    assert store.get(5) is None
    assert store.kept_bytes <= 250_000
    store.drop(4)
    assert store.get(4) is None
    huge = SampleStore(max_bytes=10)
    assert step is not None
    assert step.sample is not None
    huge.add(step.sample)
    assert (huge.get(step.number), huge.kept_bytes) == (None, 0)


def test_a_broadcast_and_a_job_without_a_budget_keep_no_sample() -> None:
    trial = Audited(2, 1, 300_000, budget=1.0)
    trial.job.begin(0, ReduceOp.BROADCAST, np.ones(75_000, dtype=np.float32))
    trial.job.begin(1, ReduceOp.BROADCAST, None, contribute=False)
    trial.job.run()
    assert [p.step.sample for p in trial.job.peers if p.step] == [None, None]
    other = Audited(2, 1, 300_000, budget=0.0)
    other.step()
    assert [p.step.sample for p in other.job.peers if p.step] == [None, None]


def test_openings_survive_being_split_into_bodies() -> None:
    trial = Audited(2, 1, 700_000, budget=1.0)
    trial.step()
    step = trial.job.peers[0].step
    assert step is not None
    sample = step.sample
    assert sample is not None
    openings = sample.openings()
    bodies = encode_openings(1, 0, sample.evidence, openings)
    assert len(bodies) > 1
    back: list[Opening] = []
    numbers = sample.blocks * 2
    for body in bodies:
        part = Part.decode(body)
        assert part.first == len(back)
        back += split_openings(part.blocks, sample.nbytes, numbers[len(back) :])
    assert back == openings
    with pytest.raises(BadMessage, match="bytes behind the last opening"):
        split_openings(bodies[0], sample.nbytes, ())


def test_who_gets_on_slowly_is_not_asked_in_vain() -> None:
    """A link so slow that one contact carries one sample: six steps take more than three asks."""
    trial = Audited(2, 1, 100_000, budget=1.0)
    for _ in range(6):
        trial.step()
    trial.tell()
    for step in range(1, 7):
        wants, verdicts = trial.audit.wants(0)
        assert not verdicts
        assert wants[0] == Want(step, 0, True)
        for body in trial.records[0].openings(step, 0):
            trial.audit.opened(0, body)
    assert trial.audit.wants(0) == ([], [])
    assert trial.audit.withheld == frozenset()


def test_an_answer_holds_a_bounded_number_of_wants_the_openings_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit_module, "MAX_WANTS", 2)
    trial = Audited(2, 1, 100_000, budget=1.0)
    for _ in range(4):
        trial.step()
    trial.tell()
    assert trial.audit.wants(0)[0] == [Want(1, 0, True), Want(2, 0, True)]
