"""Which segment of a step is audited, which of its blocks, and who opens the output. Pure
arithmetic on hashes and counts.

The choice follows from what all miners have certified and from nonces that every peer was committed
to before and showed only afterwards: one honest peer makes it unpredictable to the miners.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from mapreduce.core.hash_tree import DIGEST_BYTES, block_count
from mapreduce.core.partition import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

NONCE_BYTES = 32
MAX_SAMPLES = 64  # blocks of one segment
DEFAULT_BUDGET = 0.01  # audit bytes over the bytes that the segment moved
STATEMENT_BYTES = 320  # completion, certificate and headers of one rank
STATEMENT_BYTES_PER_RANK = 196  # its entry in the certificate, its acknowledgement
_NONCE_CONTEXT = "mapreduce 1 nonce"
_SEED_CONTEXT = "mapreduce 1 challenge"
_DRAW_CONTEXT = "mapreduce 1 draw"
_DRAW = struct.Struct("<Q")
_RANGE = 1 << 64


def nonce_hash(nonce: bytes) -> bytes:
    """What commits a peer to its nonce."""
    return blake3(nonce, derive_key_context=_NONCE_CONTEXT).digest()


def affordable_samples(nbytes: int, contributors: int, readers: int, budget: float) -> float:
    """Blocks that `budget` (a share of the segment's traffic) pays for, before rounding.

    The segment moves `contributors + readers` times its `nbytes`. An audit moves, for every
    contributor, what was signed about the step, and for each sample a block and its path from every
    contributor and one reader (trust.md, section 3).
    """
    siblings = max(0, block_count(nbytes) - 1).bit_length()
    sample_bytes = (contributors + 1) * (BLOCK_BYTES + DIGEST_BYTES * siblings)
    signed_bytes = contributors * (STATEMENT_BYTES + contributors * STATEMENT_BYTES_PER_RANK)
    return (budget * (contributors + readers) * nbytes - signed_bytes) / sample_bytes


def sample_count(nbytes: int, contributors: int, readers: int, budget: float) -> int:
    """How many blocks of a segment peers keep for an audit: what the budget pays for, at least one,
    at most `MAX_SAMPLES`; none of an empty segment or without a budget."""
    if budget <= 0:
        return 0
    most = min(MAX_SAMPLES, block_count(nbytes))
    return min(most, max(1, int(affordable_samples(nbytes, contributors, readers, budget))))


def challenge_seed(step_digest: bytes, nonces: Sequence[bytes]) -> bytes:
    """The seed of a step's choices: hash of what binds its certificates, 32 bytes, and of all
    nonces in rank order, 32 bytes each."""
    return blake3(step_digest + b"".join(nonces), derive_key_context=_SEED_CONTEXT).digest()


def challenged_segment(seed: bytes, segments: Sequence[int]) -> int:
    """Which of these segments is audited in this step."""
    return segments[choose_blocks(_derive(seed, "segment"), len(segments), 1)[0]]


@dataclass(frozen=True, slots=True)
class Challenge:
    """What is opened of the audited segment: `blocks` of every contributor's input, and of the
    output by the rank `opener`."""

    blocks: tuple[int, ...]
    opener: int


def challenge(
    seed: bytes, nbytes: int, peer_count: int, segment_count: int, budget: float
) -> Challenge | None:
    """What a reduction's audited segment of `nbytes` has to show, one of `segment_count`.

    Where not even one block fits the budget the step is audited with the probability that makes it
    fit in the long run; None if this one is not.
    """
    count = sample_count(nbytes, peer_count, peer_count, budget)
    if not count:
        return None
    share = affordable_samples(nbytes, peer_count, peer_count, budget) * segment_count
    (draw,) = _DRAW.unpack_from(_derive(seed, "whether"))
    if draw >= share * _RANGE:
        return None
    (opener,) = choose_blocks(_derive(seed, "opener"), peer_count, 1)
    return Challenge(choose_blocks(_derive(seed, "blocks"), block_count(nbytes), count), opener)


def _derive(seed: bytes, what: str) -> bytes:
    return blake3(seed + what.encode(), derive_key_context=_SEED_CONTEXT).digest()


def choose_blocks(seed: bytes, blocks: int, count: int) -> tuple[int, ...]:
    """`count` different numbers below `blocks`, in ascending order, each set equally likely."""
    if count >= blocks:
        return tuple(range(blocks))
    limit = _RANGE - _RANGE % blocks  # above it a remainder would favour small numbers
    chosen: set[int] = set()
    draw = 0
    while len(chosen) < count:
        digest = blake3(seed + _DRAW.pack(draw), derive_key_context=_DRAW_CONTEXT).digest()
        draw += 1
        for at in range(0, DIGEST_BYTES, _DRAW.size):
            (value,) = _DRAW.unpack_from(digest, at)
            if value < limit and len(chosen) < count:
                chosen.add(value % blocks)
    return tuple(sorted(chosen))
