"""What a peer keeps of a step, for its validator to audit: the blocks that the challenge chose.

Knows blocks, memory bounds and what an audit needs; knows no network. The choice is made when the
step commits, so a peer copies out a few blocks and may then forget the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mapreduce.core.challenge import challenge_seed, choose_blocks, sample_count
from mapreduce.core.hash_tree import BlockTree, block_count
from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.wire.bodies import Commit
from mapreduce.wire.proofs import Opening, Signed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mapreduce.wire.bodies import Ack
    from mapreduce.wire.peer_step import Step
    from mapreduce.wire.statements import Certificate

MAX_KEPT_BYTES = 64 << 20


def challenged_blocks(
    certificate: Certificate, acks: Sequence[Ack], budget: float
) -> tuple[int, ...]:
    """The blocks that an audit of this segment opens, ascending."""
    contributors, readers = len(certificate.contributors), certificate.readers
    count = sample_count(certificate.nbytes, contributors, readers, budget)
    seed = challenge_seed(certificate.digest, [ack.nonce for ack in acks])
    return choose_blocks(seed, block_count(certificate.nbytes), count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the parties signed about one segment: its certificate, and the acknowledgements that
    the miner of `commit_segment` has echoed (another one, if its own withheld them)."""

    certificate: Signed
    commit_segment: int
    echoes: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One segment of a committed step. `inputs` and `outputs` are the chosen blocks, empty where
    this rank had no input or got no output."""

    step: int
    segment: int
    nbytes: int
    evidence: Evidence
    blocks: tuple[int, ...]
    inputs: tuple[bytes, ...]
    outputs: tuple[bytes, ...]
    input_tree: BlockTree
    output_tree: BlockTree

    @property
    def kept_bytes(self) -> int:
        """Memory that it takes, the trees included."""
        blocks = sum(map(len, self.inputs)) + sum(map(len, self.outputs))
        return blocks + 32 * 2 * block_count(self.nbytes)

    def openings(self, *, output: bool) -> list[Opening]:
        """The chosen blocks with their paths, of the input or of the output."""
        data = self.outputs if output else self.inputs
        if not data:
            return []
        tree = self.output_tree if output else self.input_tree
        return [
            Opening(data=block, path=path)
            for block, path in zip(data, tree.paths(self.blocks), strict=True)
        ]


def take_samples(step: Step, budget: float) -> list[Sample]:
    """What to keep of a step that has just been committed, while its memory is as it was."""
    trust = step.trust
    if budget <= 0 or not trust.commits:
        return []
    samples = []
    for miner in step.involved:
        certificate = trust.certificates[miner]
        if not certificate.nbytes:
            continue
        # A miner that withholds its COMMIT is sampled all the same: nobody could know the other
        # segments' nonces either before every certificate was signed.
        source = miner if miner in trust.commits else min(trust.commits)
        acks = trust.commits[source]
        blocks = challenged_blocks(certificate, acks, budget)
        offset = step.segments[miner].offset
        output = None if step.target is None else step.target.memory[offset:]
        samples.append(
            Sample(
                step=step.number,
                segment=miner,
                nbytes=certificate.nbytes,
                evidence=Evidence(
                    certificate=Signed(
                        statement=certificate.statement(), signature=trust.signatures[miner]
                    ),
                    commit_segment=source,
                    echoes=Commit(acks=acks).echoes(),
                ),
                blocks=blocks,
                inputs=_copy(step.input_memory(miner), blocks, certificate.nbytes),
                outputs=_copy(output, blocks, certificate.nbytes),
                input_tree=trust.sent[miner],
                output_tree=trust.received[miner],
            )
        )
    return samples


def _copy(memory: memoryview | None, blocks: tuple[int, ...], nbytes: int) -> tuple[bytes, ...]:
    if memory is None:
        return ()
    # copy: the caller gets its tensor back and may overwrite it
    return tuple(
        bytes(memory[at : min(at + BLOCK_BYTES, nbytes)])
        for at in (block * BLOCK_BYTES for block in blocks)
    )


class SampleStore:
    """The samples of the last steps, newest kept first, within `max_bytes`."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._samples: OrderedDict[tuple[int, int], Sample] = OrderedDict()
        self.kept_bytes = 0

    def add(self, samples: Sequence[Sample]) -> None:
        """Keeps the samples of a step; what no longer fits goes, the oldest first."""
        for sample in samples:
            self._samples[sample.step, sample.segment] = sample
            self.kept_bytes += sample.kept_bytes
        while self.kept_bytes > self._max_bytes:
            _, oldest = self._samples.popitem(last=False)
            self.kept_bytes -= oldest.kept_bytes

    def get(self, step: int, segment: int) -> Sample | None:
        """The sample, None if it is not kept."""
        return self._samples.get((step, segment))

    def drop(self, step: int, segment: int | None = None) -> None:
        """Forgets one segment of a step, or all of them."""
        for key in [k for k in self._samples if k[0] == step and segment in (None, k[1])]:
            self.kept_bytes -= self._samples.pop(key).kept_bytes
