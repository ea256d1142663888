"""Which blocks of a segment are opened for an audit. Pure arithmetic on hashes and counts.

The choice follows from what the miner has certified and from nonces that every peer was committed
to before and showed only afterwards: one honest peer makes it unpredictable to the miner.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from blake3 import blake3

from mapreduce.core.hash_tree import DIGEST_BYTES, block_count
from mapreduce.core.partition import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

NONCE_BYTES = 32
MAX_SAMPLES = 64  # blocks of one segment
DEFAULT_BUDGET = 0.01  # audit bytes over the bytes that the segment moved
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

    The segment moves `contributors + readers` times its `nbytes`; a sample moves a block and its
    path for every contributor and one reader (trust.md, section 3).
    """
    siblings = max(0, block_count(nbytes) - 1).bit_length()
    sample_bytes = (contributors + 1) * (BLOCK_BYTES + DIGEST_BYTES * siblings)
    return budget * (contributors + readers) * nbytes / sample_bytes


def sample_count(nbytes: int, contributors: int, readers: int, budget: float) -> int:
    """How many blocks of a segment peers keep for an audit: what the budget pays for, at least one,
    at most `MAX_SAMPLES`; none of an empty segment or without a budget."""
    if budget <= 0:
        return 0
    most = min(MAX_SAMPLES, block_count(nbytes))
    return min(most, max(1, int(affordable_samples(nbytes, contributors, readers, budget))))


def challenge_seed(certificate: bytes, nonces: Sequence[bytes]) -> bytes:
    """The seed of the choice: hash of the certificate's digest and all nonces in rank order."""
    return blake3(certificate + b"".join(nonces), derive_key_context=_SEED_CONTEXT).digest()


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
