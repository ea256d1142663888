"""What a miner signs and whose signatures it checks: statements in, bodies of frames out.

Knows which statement must fit which. Does not know the order of a step, nor who has to be told
(`miner_session.py`). A BadFrame raised here is a violation by the rank whose frame it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapreduce.core.challenge import nonce_hash
from mapreduce.core.hash_tree import DIGEST_BYTES
from mapreduce.errors import BadFrame
from mapreduce.wire.bodies import (
    VERSION_PREFIX,
    Abort,
    Ack,
    Commit,
    Open,
    split_signature,
    with_signature,
)
from mapreduce.wire.proofs import ProofKind, Signed, contradiction, encode_claim
from mapreduce.wire.statements import (
    Receipt,
    Reject,
    Upload,
    commit_statement,
    open_statement,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mapreduce.wire.keys import JobKeys
    from mapreduce.wire.miner_step import MinerStep
    from mapreduce.wire.statements import Place


class MinerTrust:
    """One miner of a job; `sign` signs with its hotkey."""

    def __init__(self, keys: JobKeys, segment: int, sign: Callable[[bytes], bytes]) -> None:
        self._keys = keys
        self._segment = segment
        self._sign = sign

    def _place(self, step: int) -> Place:
        return self._keys.place(step, self._segment)

    def _upload(
        self, kind: type[Upload | Receipt | Reject], step: MinerStep, rank: int, root: bytes
    ) -> bytes:
        opened = step.opens[rank]
        assert opened is not None
        return kind(
            place=self._place(step.number),
            rank=rank,
            nbytes=step.inputs[rank].nbytes,
            root=root,
            nonce_hash=opened.nonce_hash,
        ).statement()

    def opened(self, step: int, rank: int, body: memoryview) -> Open:
        """How the rank enters the step."""
        content, signature = split_signature("OPEN", body, None)
        content = VERSION_PREFIX + content
        statement = open_statement(self._place(step), rank, content)
        if not self._keys.signed_by_rank(rank, statement, signature):
            raise BadFrame("OPEN that is not signed")
        return Open.decode(memoryview(content))

    def upload(self, step: MinerStep, rank: int, body: memoryview) -> tuple[Signed, bytes]:
        """What the rank says it sent: its statement and the root in it."""
        claimed, signature = split_signature("CLOSE", body, DIGEST_BYTES)
        statement = self._upload(Upload, step, rank, claimed)
        if not self._keys.signed_by_rank(rank, statement, signature):
            raise BadFrame("CLOSE that is not signed for what was sent")
        return Signed(statement=statement, signature=signature), claimed

    def two_uploads(self, first: Signed, second: Signed) -> bytes:
        """The proof that a rank has lied, if it has."""
        if first.statement == second.statement:
            raise BadFrame("CLOSE of a segment that is closed")
        return encode_claim(contradiction(ProofKind.TWO_UPLOADS, first, second))

    def receipt_body(self, step: MinerStep, rank: int) -> bytes:
        root = step.inputs[rank].root()
        return with_signature(VERSION_PREFIX, self._sign(self._upload(Receipt, step, rank, root)))

    def reject(self, step: MinerStep, rank: int) -> tuple[bytes, bytes]:
        """The body of the REJECT, and the same as anyone can check it: statement, signature."""
        root = step.inputs[rank].root()
        statement = self._upload(Reject, step, rank, root)
        signature = self._sign(statement)
        return with_signature(VERSION_PREFIX + root, signature), statement + signature

    def rejected(self, abort: Abort, step: int) -> bool:
        """Whether a dispute shows the signed reject that it is about."""
        ranks, miners = range(len(self._keys.session_keys)), range(len(self._keys.miners))
        if abort.rank not in ranks or abort.miner not in miners:
            return False
        assert abort.rank is not None
        assert abort.miner is not None
        return self._keys.rejected(abort.proof, step, abort.miner, abort.rank)

    def certificate_body(self, step: MinerStep) -> bytes:
        certificate = step.certificate(self._place(step.number))
        signature = self._sign(certificate.statement())
        return with_signature(VERSION_PREFIX + certificate.content(), signature)

    def check_ack(self, step: MinerStep, rank: int, ack: Ack) -> None:
        """It must be signed, and show the nonce that the rank's OPEN was committed to."""
        statement = ack.statement(self._place(step.number), rank)
        if not self._keys.signed_by_rank(rank, statement, ack.signature):
            raise BadFrame("ACK that is not signed")
        opened = step.opens[rank]
        assert opened is not None
        if nonce_hash(ack.nonce) != opened.nonce_hash:
            raise BadFrame("ACK shows another nonce than OPEN was committed to")

    def commit_body(self, step: MinerStep) -> bytes:
        commit = Commit(acks=tuple(step.acked[rank] for rank in range(len(step.opens))))
        signature = self._sign(commit_statement(self._place(step.number), commit.echoes()))
        return with_signature(commit.encode(), signature)
