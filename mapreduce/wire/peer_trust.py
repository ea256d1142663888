"""What one step commits to at a peer, and what its miners have committed to: statements in, bodies
and verdicts out.

Knows trees, signatures and which statement must fit which. Does not know the order of a step
(`peer_session.py`), nor what follows from a verdict for others.

A BadFrame raised here is a violation of the protocol by the miner whose frame it was; an
IntegrityError says that a statement does not fit the data, and the step must fail everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mapreduce.core.challenge import NONCE_BYTES, nonce_hash
from mapreduce.core.hash_tree import DIGEST_BYTES, BlockTree
from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import (
    BadFrame,
    BadMessage,
    CertificateConflict,
    MinerFraud,
    ResultDisputed,
)
from mapreduce.wire.bodies import (
    VERSION_PREFIX,
    Ack,
    Commit,
    Open,
    split_signature,
    with_signature,
)
from mapreduce.wire.proofs import Claim, ProofKind, Signed, contradiction, encode_claim
from mapreduce.wire.statements import (
    NO_ROOT,
    Certificate,
    Receipt,
    Reject,
    Upload,
    commit_statement,
    open_statement,
    step_digest,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mapreduce.wire.keys import JobKeys
    from mapreduce.wire.peer_step import Step
    from mapreduce.wire.statements import Place


class Signatory:
    """One rank (index) of a job, as it signs: with `sign`, and with nonces from `random_bytes`."""

    def __init__(
        self,
        keys: JobKeys,
        rank: int,
        sign: Callable[[bytes], bytes],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self.keys = keys
        self.rank = rank
        self.sign = sign
        self.random_bytes = random_bytes


class StepTrust:
    """The statements of one step at one rank. Segments and miners are indexes."""

    def __init__(self, signatory: Signatory, step: int, miner_count: int) -> None:
        self.signatory = signatory
        self.step = step
        self.sent = [BlockTree() for _ in range(miner_count)]
        self.received = [BlockTree() for _ in range(miner_count)]
        self.certificates: dict[int, Certificate] = {}
        self.signed: dict[int, Signed] = {}  # the same, as others can check them
        self.commits: dict[int, tuple[Ack, ...]] = {}
        self.conflict: CertificateConflict | None = None
        self._keys = signatory.keys
        self._rank = signatory.rank
        self._nonces = [signatory.random_bytes(NONCE_BYTES) for _ in range(miner_count)]
        self._closed: set[int] = set()
        self._receipts: dict[int, Signed] = {}
        self._acks: dict[int, Ack] = {}
        self._step_digest = b""

    def _place(self, miner: int) -> Place:
        return self._keys.place(self.step, miner)

    def _upload(self, kind: type[Upload | Receipt | Reject], miner: int, root: bytes) -> bytes:
        return kind(
            place=self._place(miner),
            rank=self._rank,
            nbytes=self.sent[miner].nbytes,
            root=root,
            nonce_hash=nonce_hash(self._nonces[miner]),
        ).statement()

    # What this rank says ------------------------------------------------------------------------

    def nonce_hash(self, miner: int) -> bytes:
        """What this rank's OPEN commits it to."""
        return nonce_hash(self._nonces[miner])

    def open_body(self, miner: int, opened: Open) -> bytes:
        body = opened.encode()
        statement = open_statement(self._place(miner), self._rank, body)
        return with_signature(body, self.signatory.sign(statement))

    def close_body(self, miner: int) -> bytes:
        root = self.sent[miner].root()
        self._closed.add(miner)
        signature = self.signatory.sign(self._upload(Upload, miner, root))
        return with_signature(VERSION_PREFIX + root, signature)

    def ack_body(self, miner: int, segment_us: int) -> bytes:
        """Of a rank that holds the whole result: every involved miner has certified."""
        if not self._step_digest:
            certified = {m: made.digest for m, made in self.certificates.items()}
            self._step_digest = step_digest(certified)
        ack = Ack(
            segment_us=segment_us,
            nonce=self._nonces[miner],
            step_digest=self._step_digest,
            signature=b"",
        )
        signature = self.signatory.sign(ack.statement(self._place(miner), self._rank))
        ack = replace(ack, signature=signature)
        self._acks[miner] = ack
        return ack.encode()

    # What miners say ----------------------------------------------------------------------------

    def opened(self, miner: int, sender: int, body: memoryview) -> Open:
        """The OPEN of a broadcast's root, which the miner has passed on."""
        content, signature = split_signature("OPEN", body, None)
        content = VERSION_PREFIX + content
        statement = open_statement(self._place(miner), sender, content)
        if not self._keys.signed_by_rank(sender, statement, signature):
            raise BadFrame(f"OPEN that rank {sender + 1} has not signed")
        return Open.decode(memoryview(content))

    def receipt(self, miner: int, body: memoryview) -> None:
        """The miner has received what this rank sent."""
        _, signature = split_signature("RECEIPT", body, 0)
        if miner not in self._closed:
            raise BadFrame("RECEIPT before CLOSE")
        statement = self._upload(Receipt, miner, self.sent[miner].root())
        if not self._keys.signed_by_miner(miner, statement, signature):
            raise BadFrame("RECEIPT that is not signed for what was sent")
        self._receipts[miner] = Signed(statement=statement, signature=signature)

    def reject(self, miner: int, body: memoryview) -> None:
        """The miner says that it has received other bytes. Raises ResultDisputed."""
        seen, signature = split_signature("REJECT", body, DIGEST_BYTES)
        if miner not in self._closed or miner in self._receipts:
            raise BadFrame("REJECT before CLOSE, or after RECEIPT")
        statement = self._upload(Reject, miner, seen)
        if not self._keys.signed_by_miner(miner, statement, signature):
            raise BadFrame("REJECT that is not signed")
        if seen == self.sent[miner].root():
            raise BadFrame("REJECT of exactly what was sent")
        what = "it says that it received other bytes than were sent"
        raise self._disputed(miner, what, reject=statement + signature)

    def certificate(self, miner: int, body: memoryview, step: Step) -> None:
        """The miner has certified its segment; the result may still be on its way. Raises BadFrame,
        MinerFraud or ResultDisputed."""
        content, signature = split_signature("CERTIFICATE", body, None)
        try:
            made = Certificate.from_content(self._place(miner), content)
        except BadMessage as error:
            raise BadFrame(str(error)) from None
        statement = made.statement()
        if not self._keys.signed_by_miner(miner, statement, signature):
            raise BadFrame("CERTIFICATE that is not signed")
        signed = Signed(statement=statement, signature=signature)
        if miner in self.certificates:
            self._second(miner, signed)
        self._check_operation(miner, made, step)
        self._check_entry(miner, made, signed)
        if made.op is ReduceOp.BROADCAST and made.root != made.entries[made.sender][0]:
            raise self._fraud(
                miner,
                Claim(kind=ProofKind.WRONG_SUM, statements=(signed,)),
                "it has certified a broadcast that is not what was sent",
            )
        self.certificates[miner], self.signed[miner] = made, signed

    def _second(self, miner: int, signed: Signed) -> None:
        first = self.signed[miner]
        if first.statement == signed.statement:
            raise BadFrame("CERTIFICATE for a segment that has one")
        raise self._fraud(
            miner,
            contradiction(ProofKind.TWO_CERTIFICATES, first, signed),
            "it has certified two different results of one step",
        )

    def _check_entry(self, miner: int, made: Certificate, signed: Signed) -> None:
        """What it says that this rank contributed."""
        root, committed = made.entries[self._rank]
        contributes = self._rank in made.contributors
        own = self.sent[miner].root() if contributes else NO_ROOT
        if (root, committed) == (own, self.nonce_hash(miner)):
            if contributes and miner not in self._receipts:
                raise BadFrame("CERTIFICATE before RECEIPT")
            return
        if miner in self._receipts:
            raise self._fraud(
                miner,
                Claim(kind=ProofKind.BROKEN_RECEIPT, statements=(self._receipts[miner], signed)),
                f"it certified other bytes of rank {self._rank + 1} than it had signed for",
            )
        raise self._disputed(miner, "it certifies what this rank has not sent")

    def _check_operation(self, miner: int, made: Certificate, step: Step) -> None:
        """It must be the step that this rank is in."""
        if step.tensor is None:
            raise BadFrame("CERTIFICATE of a broadcast that was never announced")
        opened = (step.op, step.tensor.dtype, step.root, step.segments[miner].length)
        if (made.op, made.dtype, made.sender, made.nbytes) != opened:
            raise BadFrame("CERTIFICATE of another operation than this rank is in")
        if len(made.entries) != len(self._keys.session_keys):
            raise BadFrame(f"CERTIFICATE of {len(made.entries)} ranks")

    def check_output(self, miner: int) -> None:
        """The whole result of a certified segment is here. Raises ResultDisputed."""
        if self.certificates[miner].root != self.received[miner].root():
            raise self._disputed(miner, "the bytes received are not those that it certifies")

    def commit(self, miner: int, body: memoryview) -> tuple[int, ...]:
        """All ranks have acknowledged; returns the microseconds that each stated. Sets `conflict`
        if a rank was shown other certificates than this one."""
        commit, signature = Commit.decode(body, len(self._keys.session_keys))
        statement = commit_statement(self._place(miner), commit.echoes())
        if not self._keys.signed_by_miner(miner, statement, signature):
            raise BadFrame("COMMIT that is not signed")
        entries = self.certificates[miner].entries
        for rank, ack in enumerate(commit.acks):
            if rank == self._rank:
                if ack != self._acks[miner]:
                    raise BadFrame("COMMIT echoes another ACK than this rank's")
                continue
            said = ack.statement(self._place(miner), rank)
            if not self._keys.signed_by_rank(rank, said, ack.signature):
                raise BadFrame(f"COMMIT echoes an ACK that rank {rank + 1} has not signed")
            if ack.step_digest != self._step_digest:
                ranks = (self._rank + 1, rank + 1)
                self.conflict = CertificateConflict(ranks, step=self.step)
            elif nonce_hash(ack.nonce) != entries[rank][1]:
                raise BadFrame(f"COMMIT echoes a nonce that rank {rank + 1} was not committed to")
        self.commits[miner] = commit.acks
        return tuple(ack.segment_us for ack in commit.acks)

    # Verdicts -----------------------------------------------------------------------------------

    def _fraud(self, miner: int, claim: Claim, what: str) -> MinerFraud:
        name = self._keys.miners[miner]
        return MinerFraud(
            name.uid,
            name.hotkey,
            what,
            step=self.step,
            segment=miner,
            proof=encode_claim(claim),
        )

    def _disputed(self, miner: int, what: str, reject: bytes = b"") -> ResultDisputed:
        name = self._keys.miners[miner]
        return ResultDisputed(
            name.uid,
            name.hotkey,
            self._rank + 1,
            what,
            step=self.step,
            segment=miner,
            reject=reject,
            own=True,
        )
