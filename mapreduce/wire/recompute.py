"""The proof that one who knows all inputs can make: this block of the result is not their sum.

Knows trees, certificates and tensors from seeds. Does not know who asks, or what becomes of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mapreduce.core.hash_tree import BlockTree, block_bytes
from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.core.seeded import PIECE_BYTES
from mapreduce.wire.proofs import Claim, Opening, ProofKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mapreduce.core.seeded import SeededTensor
    from mapreduce.wire.peer_step import Step


def prove_wrong_sum(
    step: Step, miner: int, wrong: int, result: memoryview, inputs: Sequence[SeededTensor]
) -> Claim:
    """The claim that byte `wrong` of this miner's segment, which came as `result`, is not what the
    ranks' `inputs` give. `step` is committed; it is a claim only, and proves nothing if a rank has
    sent something else."""
    segment = step.segments[miner]
    block = wrong // BLOCK_BYTES
    size = block_bytes(segment.length, block)
    openings = []
    for tensor in inputs:
        tree = BlockTree()
        for begin in range(0, segment.length, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, segment.length - begin)
            tree.add(tensor.read(segment.offset + begin, nbytes).view(np.uint8).data)
        data = tensor.read(segment.offset + block * BLOCK_BYTES, size).tobytes()
        openings.append(Opening(data=data, path=tree.paths((block,))[0]))
    begin = block * BLOCK_BYTES
    path = step.trust.received[miner].paths((block,))[0]
    openings.append(Opening(data=bytes(result[begin : begin + size]), path=path))
    return Claim(
        kind=ProofKind.WRONG_SUM,
        statements=(step.trust.signed[miner],),
        block=block,
        openings=tuple(openings),
    )
