"""Fraud proofs: a few signed statements, and at most K + 1 blocks, from which anyone can see who
lied.

Knows how a proof is written, read and checked; knows no file, network or key. A proof needs
nobody's word: whoever has it, recomputes. There is one way to write each, and every byte is bound
by a signature or a hash, so nothing in it can be changed without making it worthless. The one
exception is a `Delegation`, which says whose session key lied and may be left out: whoever keeps a
ledger goes by the delegation that came with the join.

| kind | shows |
|---|---|
| F1 wrong sum | a certificate, the blocks that went in, and the wrong one that came out |
| F2 broken receipt | a receipt for bytes that the same miner's certificate does not name |
| F3 two certificates | two different ones of a miner for the same segment of the same step |
| F4 two uploads | two different ones of a peer for the same segment of the same step |
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mapreduce.core.hash_tree import block_bytes, block_count, path_bytes, root_from
from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.core.reduce import ReduceOp, reduce_reference
from mapreduce.errors import BadMessage, UnsupportedTensor
from mapreduce.wire.keys import JobKeys, MinerName, Verify
from mapreduce.wire.messages import MAX_MESSAGE_BYTES, Grant, decode_message
from mapreduce.wire.statements import (
    SIGNATURE_BYTES,
    Certificate,
    Receipt,
    Upload,
    grant_digest,
    grant_statement,
    session_key_statement,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_PROOF_BYTES = 8 << 20  # 257 blocks with their paths, two certificates, one grant
MAX_STATEMENT_BYTES = 64 << 10
_MAGIC = b"mapreduce proof 1\n"
_LENGTH = struct.Struct("<I")
_BLOCK = struct.Struct("<Q")


class ProofKind(enum.IntEnum):
    """What a proof shows; see the module."""

    WRONG_SUM = 1
    BROKEN_RECEIPT = 2
    TWO_CERTIFICATES = 3
    TWO_UPLOADS = 4

    @property
    def label(self) -> str:
        return f"F{self.value} {self.name.lower().replace('_', ' ')}"


class ProofInvalid(BadMessage):
    """This proves nothing; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A statement and the signature under it."""

    statement: bytes
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """One block and what leads from it to the root of its segment."""

    data: bytes
    path: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """A hotkey's signature for a session key, which a validator got with the join."""

    hotkey: str
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A proof without its grant. `openings` are the contributors' in rank order, then the
    output's."""

    kind: ProofKind
    statements: tuple[Signed, ...]
    block: int = 0
    openings: tuple[Opening, ...] = ()
    delegation: Delegation | None = None


def contradiction(kind: ProofKind, first: Signed, second: Signed) -> Claim:
    """The claim that two statements of one party make; there is one order for them."""
    first, second = sorted((first, second), key=lambda signed: signed.statement)
    return Claim(kind=kind, statements=(first, second))


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a proof proves. `culprit` is a hotkey, or a session key where no delegation is known;
    `rank` is an index, None where a miner lied; `lines` say it to people."""

    kind: ProofKind
    culprit: str
    uid: int | None
    rank: int | None
    step: int
    segment: int
    what: str
    lines: tuple[str, ...]


# Bytes ------------------------------------------------------------------------------------------


def encode_claim(claim: Claim) -> bytes:
    """A claim as bytes, for receivers who know the grant."""
    parts = [bytes([claim.kind])]
    for signed in claim.statements:
        parts += [_LENGTH.pack(len(signed.statement)), signed.statement, signed.signature]
    if claim.kind is ProofKind.WRONG_SUM:
        parts.append(_BLOCK.pack(claim.block))
        parts += [opening.data + opening.path for opening in claim.openings]
    if claim.kind is ProofKind.TWO_UPLOADS:
        given = claim.delegation
        hotkey = b"" if given is None else given.hotkey.encode()
        parts += [bytes([len(hotkey)]), hotkey, b"" if given is None else given.signature]
    return b"".join(parts)


def encode_proof(grant: str, signature: str, claim: Claim) -> bytes:
    """A proof as it is filed: the grant as its validator signed it (`SignedGrant`), and the
    claim."""
    return _head(grant, signature) + encode_claim(claim)


def claim_of_job(data: bytes, grant: str, signature: str) -> Claim:
    """The claim in a proof of the job with this grant. Raises ProofInvalid: it is of another one,
    or its claim cannot be read."""
    head = _head(grant, signature)
    if not data.startswith(head):
        raise ProofInvalid("it is of another job")
    return decode_claim(data[len(head) :])


def _head(grant: str, signature: str) -> bytes:
    text = grant.encode()
    return _MAGIC + _LENGTH.pack(len(text)) + text + bytes.fromhex(signature)


class _Reader:
    """Takes bytes off the front; raises ProofInvalid where there are too few."""

    def __init__(self, data: bytes) -> None:
        if len(data) > MAX_PROOF_BYTES:
            raise ProofInvalid(f"a proof has at most {MAX_PROOF_BYTES} bytes, not {len(data)}")
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise ProofInvalid(f"it ends after {len(self._data)} bytes, in the middle")
        self._at += count
        return taken

    def sized(self, most: int) -> bytes:
        (size,) = _LENGTH.unpack(self.take(_LENGTH.size))
        if size > most:
            raise ProofInvalid(f"a part of {size} bytes: {most} are allowed")
        return self.take(size)

    def end(self) -> None:
        if self._at != len(self._data):
            raise ProofInvalid(f"{len(self._data) - self._at} bytes follow its end")


def decode_claim(data: bytes) -> Claim:
    """Raises ProofInvalid unless these are the bytes of a claim; proves nothing yet."""
    return _read_claim(_Reader(data))


def _read_claim(reader: _Reader) -> Claim:
    try:
        kind = ProofKind(reader.take(1)[0])
    except ValueError as error:
        raise ProofInvalid(str(error)) from None
    count = 1 if kind is ProofKind.WRONG_SUM else 2
    statements = tuple(
        Signed(statement=reader.sized(MAX_STATEMENT_BYTES), signature=reader.take(SIGNATURE_BYTES))
        for _ in range(count)
    )
    block, delegation = 0, None
    openings: tuple[Opening, ...] = ()
    if kind is ProofKind.WRONG_SUM:
        (block,) = _BLOCK.unpack(reader.take(_BLOCK.size))
        openings = _read_openings(reader, _certificate(statements[0].statement), block)
    if kind is ProofKind.TWO_UPLOADS and (size := reader.take(1)[0]):
        try:
            hotkey = reader.take(size).decode("ascii")
        except UnicodeDecodeError:
            raise ProofInvalid("its hotkey is no address") from None
        delegation = Delegation(hotkey=hotkey, signature=reader.take(SIGNATURE_BYTES))
    reader.end()
    return Claim(
        kind=kind, statements=statements, block=block, openings=openings, delegation=delegation
    )


def _certificate(statement: bytes) -> Certificate:
    try:
        return Certificate.from_statement(statement)
    except BadMessage as error:
        raise ProofInvalid(str(error)) from None


def _read_openings(reader: _Reader, said: Certificate, block: int) -> tuple[Opening, ...]:
    if said.op is ReduceOp.BROADCAST:
        return ()  # its two roots say it all
    if block >= block_count(said.nbytes):
        raise ProofInvalid(f"block {block} of a segment of {said.nbytes} bytes")
    size, path = block_bytes(said.nbytes, block), path_bytes(said.nbytes, block)
    return tuple(
        Opening(data=reader.take(size), path=reader.take(path))
        for _ in range(len(said.contributors) + 1)
    )


# Checking ---------------------------------------------------------------------------------------


def check_proof(data: bytes, verify: Verify) -> tuple[Grant, Finding]:
    """What a proof file proves, and in which job. Raises ProofInvalid: then it proves nothing."""
    reader = _Reader(data)
    if reader.take(len(_MAGIC)) != _MAGIC:
        raise ProofInvalid("this is no proof of this protocol")
    try:
        text = reader.sized(MAX_MESSAGE_BYTES).decode()
        grant = decode_message(Grant, text)
    except (UnicodeDecodeError, BadMessage) as error:
        raise ProofInvalid(f"its grant cannot be read: {error}") from None
    signature = reader.take(SIGNATURE_BYTES)
    if not verify(grant.validator, grant_statement(text), signature, session_key=False):
        raise ProofInvalid(f"its grant is not signed by {grant.validator}")
    claim = _read_claim(reader)
    return grant, check_claim(claim, keys_of(grant, text, verify))


def keys_of(grant: Grant, text: str, verify: Verify) -> JobKeys:
    """Who signs in the job of this grant, whose text was signed."""
    return JobKeys(
        grant=grant_digest(text),
        validator=grant.validator,
        session_keys=tuple(grant.session_keys),
        miners=tuple(MinerName(uid=miner.uid, hotkey=miner.hotkey) for miner in grant.miners),
        verify=verify,
    )


def check_claim(claim: Claim, keys: JobKeys) -> Finding:
    """What the claim proves in this job. Raises ProofInvalid: then it proves nothing."""
    match claim.kind:
        case ProofKind.WRONG_SUM:
            return _check_sum(claim, keys)
        case ProofKind.BROKEN_RECEIPT:
            return _check_receipt(claim, keys)
        case ProofKind.TWO_CERTIFICATES:
            return _check_certificates(claim, keys)
        case ProofKind.TWO_UPLOADS:
            return _check_uploads(claim, keys)


def _check_miner(signed: Signed, said: Certificate | Receipt, keys: JobKeys) -> None:
    place = said.place
    if place.grant != keys.grant or place.segment >= len(keys.miners):
        raise ProofInvalid("a statement is of another job")
    if not keys.signed_by_miner(place.segment, signed.statement, signed.signature):
        raise ProofInvalid(f"a statement is not signed by {keys.miners[place.segment]}")


def _check_sum(claim: Claim, keys: JobKeys) -> Finding:
    (signed,) = claim.statements
    said = _certificate(signed.statement)
    _check_miner(signed, said, keys)
    if len(said.entries) != len(keys.session_keys):
        raise ProofInvalid(f"a certificate of {len(said.entries)} ranks")
    if said.op is ReduceOp.BROADCAST:
        if said.root == said.entries[said.sender][0] or claim.block or claim.openings:
            raise ProofInvalid("the certificate of this broadcast contradicts nothing")
        return _finding(claim, said, keys, "a broadcast whose output is not its input")
    roots = [*(said.entries[rank][0] for rank in said.contributors), said.root]
    if len(claim.openings) != len(roots):
        raise ProofInvalid(f"{len(claim.openings)} blocks: {len(roots)} are needed")
    for number, (opening, root) in enumerate(zip(claim.openings, roots, strict=True)):
        try:
            opened = root_from(said.nbytes, claim.block, opening.data, opening.path)
        except ValueError as error:
            raise ProofInvalid(str(error)) from None
        if opened != root:
            who = "the output" if number == len(roots) - 1 else f"rank {number + 1}"
            raise ProofInvalid(f"the block of {who} is none of those that were certified")
    *inputs, output = (opening.data for opening in claim.openings)
    try:
        expected = reduce_block(inputs, said)
    except UnsupportedTensor as error:
        raise ProofInvalid(str(error)) from None
    if expected == output:
        raise ProofInvalid(f"block {claim.block} is the {said.op.label} of its inputs")
    return _finding(claim, said, keys, _difference(said, claim.block, expected, output))


def reduce_block(inputs: Sequence[bytes | memoryview], said: Certificate) -> bytes:
    """What the certified operation makes of these bytes, one per contributor in rank order."""
    storage = said.dtype.storage
    arrays = [np.frombuffer(data, dtype=storage) for data in inputs]
    return reduce_reference(arrays, said.dtype, said.op).tobytes()


def _difference(said: Certificate, block: int, expected: bytes, output: bytes) -> str:
    itemsize = said.dtype.itemsize
    wrong = [
        at
        for at in range(0, len(expected), itemsize)
        if expected[at : at + itemsize] != output[at : at + itemsize]
    ]
    first = wrong[0]
    begin = block * BLOCK_BYTES + first
    return (
        f"{len(wrong)} of {len(expected) // itemsize} elements of block {block} are wrong; bytes "
        f"{begin} to {begin + itemsize - 1} of the segment are "
        f"{output[first : first + itemsize].hex()}, the {said.op.label} of the {said.dtype.label} "
        f"inputs is {expected[first : first + itemsize].hex()}"
    )


def _check_receipt(claim: Claim, keys: JobKeys) -> Finding:
    first, second = claim.statements
    try:
        receipt = Receipt.from_statement(first.statement)
    except BadMessage as error:
        raise ProofInvalid(str(error)) from None
    said = _certificate(second.statement)
    _check_miner(first, receipt, keys)
    _check_miner(second, said, keys)
    if receipt.place != said.place or receipt.rank >= len(said.entries):
        raise ProofInvalid("receipt and certificate are of different places")
    if receipt.rank not in said.contributors:
        raise ProofInvalid(f"rank {receipt.rank + 1} contributes nothing that a receipt is for")
    entry = said.entries[receipt.rank]
    if (receipt.nbytes, receipt.root, receipt.nonce_hash) == (said.nbytes, *entry):
        raise ProofInvalid("the certificate says what the receipt says")
    what = (
        f"its receipt to rank {receipt.rank + 1} is for {receipt.nbytes} bytes with root "
        f"{receipt.root.hex()}, its certificate names {said.nbytes} bytes with root "
        f"{entry[0].hex()}"
    )
    return _finding(claim, said, keys, what)


def _check_certificates(claim: Claim, keys: JobKeys) -> Finding:
    first, second = claim.statements
    if not first.statement < second.statement:
        raise ProofInvalid("the two certificates are not different, or not in order")
    said, other = _certificate(first.statement), _certificate(second.statement)
    _check_miner(first, said, keys)
    _check_miner(second, other, keys)
    if said.place != other.place:
        raise ProofInvalid("the certificates are of different places")
    what = f"it has signed the roots {said.root.hex()} and {other.root.hex()} for one output"
    if said.root == other.root:
        what = "it has signed two certificates with different inputs for one output"
    return _finding(claim, said, keys, what)


def _check_uploads(claim: Claim, keys: JobKeys) -> Finding:
    first, second = claim.statements
    if not first.statement < second.statement:
        raise ProofInvalid("the two uploads are not different, or not in order")
    try:
        said, other = (Upload.from_statement(signed.statement) for signed in claim.statements)
    except BadMessage as error:
        raise ProofInvalid(str(error)) from None
    place, rank = said.place, said.rank
    if place != other.place or rank != other.rank or place.grant != keys.grant:
        raise ProofInvalid("the uploads are of different places")
    if place.segment >= len(keys.miners) or rank >= len(keys.session_keys):
        raise ProofInvalid("the uploads are of a place that the job does not have")
    for signed in claim.statements:
        if not keys.signed_by_rank(rank, signed.statement, signed.signature):
            raise ProofInvalid(f"an upload is not signed by rank {rank + 1}")
    culprit, given = keys.session_keys[rank], claim.delegation
    if given is not None:
        delegated = session_key_statement(keys.validator, culprit)
        if not keys.verify(given.hotkey, delegated, given.signature, session_key=False):
            raise ProofInvalid(f"{given.hotkey} has not signed for this session key")
        culprit = given.hotkey
    what = f"it has signed uploads with the roots {said.root.hex()} and {other.root.hex()}"
    return Finding(
        kind=claim.kind,
        culprit=culprit,
        uid=None,
        rank=rank,
        step=place.step,
        segment=place.segment,
        what=what,
        lines=(f"rank {rank + 1}, {'hotkey' if given else 'session key'} {culprit}", what),
    )


def _finding(claim: Claim, said: Certificate, keys: JobKeys, what: str) -> Finding:
    place = said.place
    miner = keys.miners[place.segment]
    return Finding(
        kind=claim.kind,
        culprit=miner.hotkey,
        uid=miner.uid,
        rank=None,
        step=place.step,
        segment=place.segment,
        what=what,
        lines=(f"miner uid {miner.uid}, hotkey {miner.hotkey}", what),
    )
