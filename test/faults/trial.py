"""A trial in memory: a job with one liar in it, its validator's audit, and who is blamed in the
end.

One seed is one interleaving, as in `memory_job`. The validator is the shipped `JobAudit`; peers
hand it what the shipped `PeerRecord` gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mapreduce.core.attribution import flagged
from mapreduce.core.dtypes import DType
from mapreduce.core.partition import EQUAL_WEIGHT
from mapreduce.core.reduce import ReduceOp, reduce_reference
from mapreduce.errors import BadMessage, IntegrityError, MapReduceError, ResultDisputed
from mapreduce.net.auth import verify_signature
from mapreduce.wire.audit import JobAudit, Withheld
from mapreduce.wire.messages import Dispute
from mapreduce.wire.miner_session import MinerSession
from mapreduce.wire.peer_record import PeerRecord
from mapreduce.wire.peer_session import PeerSession
from mapreduce.wire.peer_step import Phase
from mapreduce.wire.proofs import Finding, check_claim, check_proof, decode_claim, encode_proof
from mapreduce.wire.terms import Terms
from test.liars import FAULTS
from test.liars.miners import miner_session
from test.liars.peers import forged_proof, peer_record, peer_session
from test.memory_job import MemoryJob

if TYPE_CHECKING:
    from mapreduce.wire.audit import Verdict
    from mapreduce.wire.peer_step import Step

KIB = 1024
MOVES = 200_000


@dataclass
class Blame:
    """What a trial ends in: findings by culprit (hotkey, or session key), the ranks that withheld
    something, and disputes as (rank, uid)."""

    proven: dict[str, Finding] = field(default_factory=dict)
    withheld: set[int] = field(default_factory=set)
    disputes: set[tuple[int, int]] = field(default_factory=set)
    errors: list[tuple[int, MapReduceError]] = field(default_factory=list)  # of honest ranks
    steps: int = 0
    audited: int = 0


class Trial:
    """`peers` and `miners` with one liar: the last peer, or the last miner."""

    def __init__(self, fault: str | None, seed: int, peers: int, miners: int) -> None:
        self.fault = fault
        self.terms = Terms(
            peer_count=peers,
            miner_count=miners,
            bandwidth=64 << 20,
            window_bytes=64 * KIB,
            frame_bytes=32 * KIB,
        )
        self.liar_rank = peers - 1 if fault and FAULTS[fault].by == "peer" else None
        self.liar_miner = miners - 1 if fault and FAULTS[fault].by == "miner" else None
        # Every block of the audited segment is opened.
        self.job = MemoryJob(self.terms, seed, audit_budget=1.0, peer=self._peer, miner=self._miner)
        self.parties = self.job.parties
        self.records = [
            (peer_record(fault) if fault and rank == self.liar_rank else PeerRecord)(peer.signatory)
            for rank, peer in enumerate(self.job.peers)
        ]
        self.audit = JobAudit(self.parties.keys, 1.0)
        self.blame = Blame()

    def _peer(self, terms: Terms, signatory, *rest) -> PeerSession:  # type: ignore[no-untyped-def]
        lies = self.fault is not None and signatory.rank == self.liar_rank
        kind = peer_session(self.fault or "") if lies else PeerSession
        return kind(terms, signatory, *rest)

    def _miner(self, terms: Terms, segment: int, *rest) -> MinerSession:  # type: ignore[no-untyped-def]
        lies = self.fault is not None and segment == self.liar_miner
        return (miner_session(self.fault or "") if lies else MinerSession)(terms, segment, *rest)

    @property
    def honest_ranks(self) -> list[int]:
        return [rank for rank in range(self.terms.peer_count) if rank != self.liar_rank]

    def run(self, steps: int, count: int) -> Blame:
        """Up to `steps` collectives of `count` floats, until a rank gets an error or a proof."""
        rng = np.random.default_rng(self.job.random.randrange(1 << 30))
        for _ in range(steps):
            tensors = [
                rng.standard_normal(count, dtype=np.float32) for _ in range(self.terms.peer_count)
            ]
            try:
                begun = self.job.all_reduce(tensors, ReduceOp.SUM)
            except MapReduceError as error:  # of what came out when the last step was bound
                self.blame.errors.append((-1, error))
                self._keep(error, 0)
                break
            self.blame.steps += 1
            self.job.run(MOVES)
            for peer in self.job.peers:  # the random order of moves says nothing of miners' rates
                peer.weights = (EQUAL_WEIGHT,) * self.terms.miner_count
            self._over(begun, tensors)
            self._contact()
            if self.blame.errors or self.blame.proven:
                break
        for _ in range(5):  # further contacts: the validator asks for what it did not get
            self._contact()
        self.blame.audited = self.audit.audited_steps
        return self.blame

    def _over(self, steps: list[Step], tensors: list[np.ndarray]) -> None:
        expected = reduce_reference(tensors, DType.FLOAT32, ReduceOp.SUM).tobytes()
        for rank, step in enumerate(steps):
            if step.phase is Phase.IN_DOUBT:
                self.job.peers[rank].resolve(None)
            if step.phase is Phase.ACKNOWLEDGED:
                self.job.peers[rank].forsake(MapReduceError("given up"))
            assert step.done, (self.fault, rank, step.phase)
            if rank in self.honest_ranks:
                if step.error is not None:
                    self.blame.errors.append((rank, step.error))
                    # Whatever happened: the tensor is what it was.
                    assert bytes(self.job.results[rank]) == tensors[rank].tobytes()  # type: ignore[arg-type]
                elif self.liar_miner is None:
                    assert bytes(self.job.results[rank]) == expected  # type: ignore[arg-type]
                self._keep(step.error, rank)
                self._keep(self.job.peers[rank].fraud, rank)
            self.records[rank].step_over(step)

    def _keep(self, error: MapReduceError | None, rank: int) -> None:
        """What an honest rank reports."""
        if not isinstance(error, IntegrityError):
            return
        if error.proof:
            self._proven(check_claim(decode_claim(error.proof), self.parties.keys), error.proof)
        elif isinstance(error, ResultDisputed):
            assert error.segment is not None
            dispute = Dispute(
                step=error.step,
                segment=error.segment,
                rank=error.rank - 1,
                what="",
                reject=error.reject.hex(),
            )
            if error.reject or error.rank == rank + 1:
                self.audit.check_dispute(rank, dispute)
                self.blame.disputes.add((dispute.rank, error.uid))

    def _slander(self) -> None:
        """What the liar tells the validator."""
        assert self.liar_rank is not None
        uid = self.parties.keys.miners[0].uid
        own = Dispute(step=1, segment=0, rank=self.liar_rank, what="it is all wrong", reject="")
        self.audit.check_dispute(self.liar_rank, own)
        self.blame.disputes.add((self.liar_rank, uid))
        for dispute in (replace(own, rank=0), replace(own, rank=0, reject="00" * 200)):
            with pytest.raises(BadMessage):  # for others it cannot speak
                self.audit.check_dispute(self.liar_rank, dispute)
        with pytest.raises(BadMessage):
            check_claim(decode_claim(forged_proof()), self.parties.keys)

    def _contact(self) -> None:
        verdicts: list[Verdict] = []
        for rank, record in enumerate(self.records):
            while record.completions:
                self.audit.completed(rank, *record.told(record.completions.popleft()))
        for rank, record in enumerate(self.records):
            wants, withheld = self.audit.wants(rank)
            verdicts += withheld
            for want in wants:
                shown = record.openings if want.openings else record.certificate
                for body in shown(want.step, want.segment):
                    verdicts += self.audit.opened(rank, body)
        for verdict in verdicts:
            if isinstance(verdict, Withheld):
                self.blame.withheld.add(verdict.rank)
            else:
                finding = check_claim(verdict.claim, self.parties.keys)
                signed = self.parties.signed
                data = encode_proof(signed.grant, signed.signature, verdict.claim)
                assert check_proof(data, verify_signature)[1] == finding
                self.blame.proven[finding.culprit] = finding
        if self.fault == "false_accusation":
            self._slander()

    def _proven(self, finding: Finding, proof: bytes) -> None:
        claim = decode_claim(proof)
        signed = self.parties.signed
        data = encode_proof(signed.grant, signed.signature, claim)
        assert check_proof(data, verify_signature)[1] == finding  # anyone can check it
        self.blame.proven[finding.culprit] = finding


def judge(trial: Trial) -> None:
    """Asserts that the trial ended in exactly the verdict of its fault, and blames nobody else."""
    blame, fault = trial.blame, trial.fault
    parties = trial.parties
    if fault is None:
        assert not blame.errors
        assert not blame.proven
        assert not blame.withheld
        assert not blame.disputes
        return
    expected = FAULTS[fault]
    if expected.by == "miner":
        assert trial.liar_miner is not None
        culprit = parties.miners[trial.liar_miner].ss58_address
    else:
        assert trial.liar_rank is not None
        culprit = parties.sessions[trial.liar_rank].ss58_address
    kinds = {who: finding.kind.label[:2] for who, finding in blame.proven.items()}
    assert kinds == ({culprit: expected.proof} if expected.proof else {}), (fault, kinds)
    liars = {trial.liar_rank} if expected.ledger == "unavailable" else set()
    assert blame.withheld == liars, (fault, blame.withheld)
    assert bool(blame.disputes) == (expected.ledger == "unattributed"), (fault, blame.disputes)
    for rank, uid in blame.disputes:
        # One of the two is the liar.
        assert rank == trial.liar_rank or uid - 10 == trial.liar_miner
    flags = flagged(
        [(str(rank), str(uid)) for rank, uid in blame.disputes],
        trial.terms.peer_count,
        trial.terms.miner_count,
    )
    miner, peer = str(10 + (trial.liar_miner or 0)), str(trial.liar_rank)
    assert flags.miners <= ({miner} if expected.by == "miner" else set())
    assert flags.peers <= ({peer} if expected.by == "peer" else set())
    for rank, error in blame.errors:
        assert type(error).__name__ in expected.errors, (fault, rank, error)
