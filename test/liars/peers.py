"""Lying peers: the shipped session, or record, with one thing changed.

`install(fault)` makes every `Peer` of this process tell the lie.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from mapreduce.errors import MapReduceError, ResultDisputed
from mapreduce.wire.aborts import abort_of
from mapreduce.wire.bodies import VERSION_PREFIX, with_signature
from mapreduce.wire.frames import Kind
from mapreduce.wire.peer_record import PeerRecord
from mapreduce.wire.peer_session import PeerSession
from mapreduce.wire.peer_step import Phase
from mapreduce.wire.proofs import Claim, ProofKind, Signed, encode_claim
from mapreduce.wire.statements import Upload

if TYPE_CHECKING:
    from mapreduce.wire.peer_step import Step
    from mapreduce.wire.peer_trust import StepTrust


def peer_session(fault: str) -> type[PeerSession]:
    """The session class that tells this lie; the shipped one for lies of the record."""
    return {
        "two_uploads": _TwoUploads,
        "lying_input": _LyingInput,
        "false_accusation": _FalseAccusation,
        "withheld_nonce": _WithheldNonce,
    }.get(fault, PeerSession)


def peer_record(fault: str) -> type[PeerRecord]:
    """The record class that tells this lie; the shipped one for lies of the session."""
    return _WithheldOpening if fault == "withheld_opening" else PeerRecord


def forged_proof(keys_signature: bytes = bytes(64)) -> bytes:
    """What an accuser without a proof has to show: two certificates that nobody signed."""
    return encode_claim(
        Claim(
            kind=ProofKind.TWO_UPLOADS,
            statements=(
                Signed(statement=b"a", signature=keys_signature),
                Signed(statement=b"b", signature=keys_signature),
            ),
        )
    )


def _other_close(trust: StepTrust, miner: int) -> bytes:
    """A CLOSE that is signed for other bytes than were sent."""
    root = bytes(32)
    statement = trust._upload(Upload, miner, root)
    return with_signature(VERSION_PREFIX + root, trust.signatory.sign(statement))


class _LyingInput(PeerSession):
    """Signs for other bytes than it sends."""

    def _close_if_sent(self, step: Step, miner: int) -> None:
        trust = step.trust
        trust._closed.add(miner)
        trust.close_body = lambda m: _other_close(trust, m)  # type: ignore[method-assign]
        trust.sent[miner].root = lambda: bytes(32)  # type: ignore[method-assign]  # it insists
        super()._close_if_sent(step, miner)


class _TwoUploads(PeerSession):
    """Signs for what it has sent, and for something else."""

    def _close_if_sent(self, step: Step, miner: int) -> None:
        super()._close_if_sent(step, miner)
        upload = step.uploads[miner]
        if upload.sent == upload.length:
            self._send(miner, Kind.CLOSE, _other_close(step.trust, miner))


class _FalseAccusation(PeerSession):
    """Says of the first miner that its result is not what it certified."""

    def _acknowledge_if_complete(self, step: Step) -> None:
        if step.phase is Phase.RUNNING and step.complete:
            miner = step.involved[0]
            name = self.signatory.keys.miners[miner]
            error = ResultDisputed(
                name.uid,
                name.hotkey,
                self.rank + 1,
                "it is all wrong",
                step=step.number,
                segment=miner,
                own=True,
            )
            self._fail(step, error, abort_of(error, self.rank))


class _WithheldNonce(PeerSession):
    """Acknowledges without the nonce that it was committed to."""

    def _acknowledge_if_complete(self, step: Step) -> None:
        if step.phase is Phase.RUNNING and step.complete:
            step.trust._nonces = [bytes(32)] * len(step.trust._nonces)
        super()._acknowledge_if_complete(step)


class _WithheldOpening(PeerRecord):
    """Shows the validator nothing."""

    def openings(self, step: int, segment: int) -> list[bytes]:
        return []

    def drop(self, step: int) -> None:
        pass


def install(fault: str) -> None:
    """Makes the peers of this process tell the lie."""
    from mapreduce.services import peer_audit, peer_job

    peer_job.PeerSession = peer_session(fault)  # type: ignore[misc]
    peer_audit.PeerRecord = peer_record(fault)  # type: ignore[misc]
    if fault == "false_accusation":
        accuse = peer_audit.PeerAudit.accuse

        async def accuse_with_nothing(self, error):  # type: ignore[no-untyped-def]
            await self.known_fraud(0.5)  # the dispute itself
            with contextlib.suppress(MapReduceError, asyncio.TimeoutError):
                await self._call("POST", f"/v1/jobs/{self._job}/proofs", forged_proof(), object)
            return await accuse(self, error)

        peer_audit.PeerAudit.accuse = accuse_with_nothing  # type: ignore[method-assign]
