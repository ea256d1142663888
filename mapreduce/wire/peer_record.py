"""What a peer can tell its validator of the last steps: completions, certificates, samples.

Knows what to keep and for how long; knows no network and no time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from mapreduce.wire.openings import certificate_part, encode_openings
from mapreduce.wire.peer_step import Phase
from mapreduce.wire.samples import SampleStore
from mapreduce.wire.statements import NO_ROOT, Completion, SegmentOutcome

if TYPE_CHECKING:
    from mapreduce.wire.peer_step import Step
    from mapreduce.wire.peer_trust import Signatory
    from mapreduce.wire.proofs import Signed

MAX_QUEUED = 4096  # completions; the oldest go
MAX_FAILED_STEPS = 16  # whose certificates are kept


class PeerRecord:
    """One rank's record of its job. `completions` are those that nobody was told of yet."""

    def __init__(self, signatory: Signatory) -> None:
        self.completions: deque[Completion] = deque(maxlen=MAX_QUEUED)
        self._signatory = signatory
        self._samples = SampleStore()
        self._failed: dict[int, dict[int, Signed]] = {}  # certificates, by step and segment

    def step_over(self, step: Step) -> bool:
        """Takes note of a step that has ended; whether there is anything to tell of it."""
        if not step.segments or not step.trust.certificates:
            return False
        committed = step.phase is Phase.COMMITTED
        if committed and step.sample is not None:
            self._samples.add(step.sample)
        if not committed:
            self._keep_certificates(step)
        self.completions.append(self._completion(step, committed=committed))
        return True

    def told(self, completion: Completion) -> tuple[Completion, bytes]:
        """The completion as it is told now, and the rank's signature. Its sample may have had to
        make room by now; and nobody waits here, as a caller does while its step ends."""
        if completion.sampled is not None and not self._samples.promise(completion.step):
            completion = replace(completion, sampled=None)
        return completion, self._signatory.sign(completion.statement())

    def _keep_certificates(self, step: Step) -> None:
        self._failed[step.number] = step.trust.signed
        while len(self._failed) > MAX_FAILED_STEPS:
            del self._failed[min(self._failed)]

    def _completion(self, step: Step, *, committed: bool) -> Completion:
        sample = step.sample if committed else None
        certificates = step.trust.certificates
        digests = {segment: made.digest for segment, made in certificates.items()}
        return Completion(
            grant=self._signatory.keys.grant,
            step=step.number,
            rank=self._signatory.rank,
            outcome=Completion.COMMITTED if committed else Completion.FAILED,
            sampled=None if sample is None else sample.segment,
            segments=tuple(
                SegmentOutcome(
                    digests.get(segment.index, NO_ROOT),
                    segment.length,
                    step.segment_us[segment.index],
                )
                for segment in step.segments
            ),
        )

    def openings(self, step: int, segment: int) -> list[bytes]:
        """The bodies that open the step's sample, none if it is not kept."""
        sample = self._samples.get(step)
        if sample is None or sample.segment != segment:
            return []
        return encode_openings(step, segment, sample.evidence, sample.openings())

    def certificate(self, step: int, segment: int) -> list[bytes]:
        """The body that shows a certificate of a failed step, none if it is not kept."""
        signed = self._failed.get(step, {}).get(segment)
        return [] if signed is None else [certificate_part(step, segment, signed)]

    def drop(self, step: int) -> None:
        """The validator wants nothing of this step any more."""
        self._samples.drop(step)
