"""What a peer keeps of a step, for its validator to audit: the blocks that the challenge chose.

Knows blocks, memory bounds and what an audit needs; knows no network. The choice is made when the
step commits, so a peer copies out a few blocks and may then forget the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mapreduce.core.challenge import challenge, challenge_seed, challenged_segment
from mapreduce.core.hash_tree import DIGEST_BYTES, BlockTree, block_count
from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.core.reduce import ReduceOp
from mapreduce.wire.bodies import Commit
from mapreduce.wire.proofs import Opening, Signed

if TYPE_CHECKING:
    from mapreduce.wire.peer_step import Step

MAX_KEPT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What shows which blocks a step has to open: the certificate of the audited segment, and the
    acknowledgements that the miner of `commit_segment` has echoed."""

    certificate: Signed
    commit_segment: int
    echoes: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The audited segment of a committed step. `inputs` are the chosen blocks of this rank's
    contribution; `outputs` those of the result, empty unless this rank opens it."""

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
        return blocks + 2 * DIGEST_BYTES * block_count(self.nbytes)

    def openings(self) -> list[Opening]:
        """The chosen blocks with their paths: of the input, and behind them of the output."""
        opened = []
        for data, tree in ((self.inputs, self.input_tree), (self.outputs, self.output_tree)):
            if data:
                paths = tree.paths(self.blocks)
                opened += [Opening(data=d, path=p) for d, p in zip(data, paths, strict=True)]
        return opened


def take_sample(step: Step, budget: float) -> Sample | None:
    """What to keep of a step that has just been committed, while its memory is as it was.

    A broadcast needs no audit: every rank sees in the certificate that what came out is what went
    in, and the sender that it is what it sent.
    """
    trust = step.trust
    if budget <= 0 or step.op is ReduceOp.BROADCAST:
        return None
    source = min(trust.commits)
    acks = trust.commits[source]
    seed = challenge_seed(acks[0].step_digest, [ack.nonce for ack in acks])
    segment = challenged_segment(seed, sorted(trust.certificates))
    certificate = trust.certificates[segment]
    peer_count = len(certificate.entries)
    chosen = challenge(seed, certificate.nbytes, peer_count, len(trust.certificates), budget)
    if chosen is None:
        return None
    memory = step.input_memory(segment)
    assert step.target is not None
    assert memory is not None
    output = step.target.memory[step.segments[segment].offset :]
    return Sample(
        step=step.number,
        segment=segment,
        nbytes=certificate.nbytes,
        evidence=Evidence(
            certificate=trust.signed[segment],
            commit_segment=source,
            echoes=Commit(acks=acks).echoes(),
        ),
        blocks=chosen.blocks,
        inputs=_copy(memory, chosen.blocks, certificate.nbytes),
        outputs=_copy(output, chosen.blocks, certificate.nbytes)
        if chosen.opener == trust.signatory.rank
        else (),
        input_tree=trust.sent[segment],
        output_tree=trust.received[segment],
    )


def _copy(memory: memoryview, blocks: tuple[int, ...], nbytes: int) -> tuple[bytes, ...]:
    # copy: the caller gets its tensor back and may overwrite it
    return tuple(
        bytes(memory[at : min(at + BLOCK_BYTES, nbytes)])
        for at in (block * BLOCK_BYTES for block in blocks)
    )


class SampleStore:
    """The samples of the last steps, the newest first to be kept, within `max_bytes`; those that
    the validator was told of stay until they are dropped."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._samples: OrderedDict[int, Sample] = OrderedDict()
        self._promised: set[int] = set()
        self.kept_bytes = 0

    def add(self, sample: Sample) -> None:
        """Keeps the sample of a step; what no longer fits goes, the oldest first."""
        self._samples[sample.step] = sample
        self.kept_bytes += sample.kept_bytes
        while self.kept_bytes > self._max_bytes:
            self.drop(next(step for step in self._samples if step not in self._promised))

    def promise(self, step: int) -> bool:
        """Keeps the sample of a step until it is dropped; False if it has had to make room."""
        if step not in self._samples:
            return False
        self._promised.add(step)
        return True

    def get(self, step: int) -> Sample | None:
        """The sample of a step, None if none is kept."""
        return self._samples.get(step)

    def drop(self, step: int) -> None:
        """Forgets the step."""
        self._promised.discard(step)
        sample = self._samples.pop(step, None)
        if sample is not None:
            self.kept_bytes -= sample.kept_bytes
