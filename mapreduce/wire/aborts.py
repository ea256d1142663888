"""Why a step failed: from an error to the ABORT that tells others, and back.

Knows both vocabularies; believes no accusation that it cannot check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapreduce.errors import (
    BadMessage,
    CollectiveMismatch,
    IntegrityError,
    MapReduceError,
    MinerFraud,
    MinerLost,
    PeerFraud,
    PeerLost,
    ResultDisputed,
    ShapeMismatch,
    StepAborted,
)
from mapreduce.wire.bodies import Abort
from mapreduce.wire.proofs import check_claim, decode_claim

if TYPE_CHECKING:
    from mapreduce.wire.keys import JobKeys
    from mapreduce.wire.proofs import Finding


def abort_of(error: IntegrityError, rank: int) -> Abort:
    """What tells the other ranks of an error at the rank with this index."""
    code = "fraud" if error.proof else "dispute"
    shown = error.reject if isinstance(error, ResultDisputed) else error.proof
    return Abort(code=code, message=error.what, rank=rank, miner=error.segment, proof=shown)


def error_of(abort: Abort, step: int, keys: JobKeys) -> MapReduceError:
    """What an ABORT of a step means to the caller of the collective."""
    known = abort.rank in range(len(keys.session_keys))
    rank = abort.rank + 1 if known and abort.rank is not None else None
    names = keys.miners
    miner = abort.miner if abort.miner in range(len(names)) else None
    if abort.code == "mismatch" and abort.differences:
        differences = {
            name: {index + 1: text for index, text in by_rank.items()}
            for name, by_rank in abort.differences.items()
        }
        kind = ShapeMismatch if "shape" in differences else CollectiveMismatch
        return kind(step, differences)
    if abort.code == "peer_lost" and rank is not None:
        return PeerLost(rank, abort.message, step)
    if abort.code == "miner_lost" and miner is not None:
        name = names[miner]
        reason = f"rank {rank} says: {abort.message}"
        return MinerLost(name.uid, name.hotkey, miner, reason)
    if abort.code == "dispute" and miner is not None and rank is not None:
        name = names[miner]
        signed = keys.rejected(abort.proof, step, miner, rank - 1)
        return ResultDisputed(
            name.uid,
            name.hotkey,
            rank,
            abort.message,
            step=step,
            segment=miner,
            reject=abort.proof if signed else b"",
        )
    if abort.code == "fraud":
        return _proven(abort, step, rank, keys)
    return StepAborted(step, rank, abort.message)


def _proven(abort: Abort, step: int, rank: int | None, keys: JobKeys) -> MapReduceError:
    try:
        found = check_claim(decode_claim(abort.proof), keys)
    except BadMessage as error:
        return StepAborted(step, rank, f"it shows a proof that proves nothing: {error}")
    return fraud_of(found, abort.proof)


def fraud_of(found: Finding, proof: bytes) -> IntegrityError:
    """The error that a proof makes."""
    where = {"step": found.step, "segment": found.segment}
    if found.rank is not None:
        return PeerFraud(found.rank + 1, found.what, **where, proof=proof)
    assert found.uid is not None
    return MinerFraud(found.uid, found.culprit, found.what, **where, proof=proof)
