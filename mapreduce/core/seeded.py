"""Tensors that whoever knows the seed can make again, wherever they need them.

Knows bytes and float32; knows nothing of jobs. A benchmark's bots contribute such tensors, and each
of them can compute what the miners had to return.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from mapreduce.core.dtypes import DType
from mapreduce.core.reduce import ReduceOp, reduce_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED_BYTES = 32
PIECE_BYTES = 1 << 20  # made and compared at once: fits the caches
_CONTEXT = "mapreduce 1 benchmark data"
_WHICH = struct.Struct("<IQ")  # rank, step
# Sign, mantissa and three bits of the exponent are random: magnitudes from 2^-9 to 1/2, like those
# of gradients, that no sum can overflow and nothing can compress.
_RANDOM_BITS = np.uint32(0x83FFFFFF)
_EXPONENT = np.uint32(118 << 23)


class SeededTensor:
    """The float32 tensor that `rank` (index from 0) contributes to `step`.

    The bytes come from BLAKE3 as an extendable output function, so that a miner that has seen some
    of them cannot tell the others.
    """

    def __init__(self, seed: bytes, rank: int, step: int) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed of {len(seed)} bytes: {SEED_BYTES} are needed")
        self._stream = blake3(seed + _WHICH.pack(rank, step), derive_key_context=_CONTEXT)

    def read(self, begin: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The values in bytes `begin` to `begin + nbytes`, both multiples of 4."""
        values = np.frombuffer(
            bytearray(self._stream.digest(length=nbytes, seek=begin)), dtype="<u4"
        )
        values &= _RANDOM_BITS
        values += _EXPONENT
        return values.view(np.float32)

    def fill(self, memory: memoryview) -> None:
        """Writes the first bytes of the tensor, as many as fit."""
        for begin in range(0, len(memory), PIECE_BYTES):
            piece = memory[begin : begin + PIECE_BYTES]
            piece[:] = self.read(begin, len(piece)).view(np.uint8).data


def first_difference(
    result: memoryview, offset: int, inputs: Sequence[SeededTensor], op: ReduceOp
) -> int | None:
    """Where `result`, which begins at byte `offset` of the tensor, differs from what reducing
    `inputs`, in rank order, gives: the index in `result` of the first byte of the first wrong
    value. None if it is right, bit for bit."""
    for begin in range(0, len(result), PIECE_BYTES):
        piece = np.frombuffer(result[begin : begin + PIECE_BYTES], dtype=np.uint32)
        made = [tensor.read(offset + begin, piece.nbytes) for tensor in inputs]
        expected = reduce_reference(made, DType.FLOAT32, op).view(np.uint32)
        if not np.array_equal(piece, expected):
            return begin + 4 * int(np.argmax(piece != expected))
    return None
