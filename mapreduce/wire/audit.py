"""The audit of one job, sans-IO: what its ranks report and open in, verdicts out.

Knows what a rank has to open, checks it, adds the blocks up and says who lied. Does not know HTTP,
storage or time. Nothing that one rank says without the other party's signature blames anyone else.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mapreduce.core.challenge import Challenge, challenge, challenge_seed, challenged_segment
from mapreduce.core.hash_tree import root_from
from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import BadMessage, UnsupportedTensor
from mapreduce.wire.bodies import Ack, acks_from
from mapreduce.wire.openings import Part, split_openings
from mapreduce.wire.proofs import Claim, Opening, ProofKind, Signed, contradiction, reduce_block
from mapreduce.wire.statements import (
    NO_ROOT,
    Certificate,
    Completion,
    step_digest,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mapreduce.wire.keys import JobKeys
    from mapreduce.wire.messages import Dispute

MAX_ASKS = 3  # then a rank that does not open is given up on
MAX_WANTS = 256  # in one answer, openings first
MAX_OPEN_STEPS = 1024  # of one job; then the oldest audit ends without a verdict
MAX_HELD_BYTES = 128 << 20  # of one job's openings; likewise


@dataclass(frozen=True, slots=True)
class Want:
    """What the validator asks of a rank: the openings of a step's sample, or only the certificate
    of a segment."""

    step: int
    segment: int
    openings: bool


@dataclass(frozen=True, slots=True)
class Proven:
    """Somebody lied, and this shows it."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Withheld:
    """A rank (index) has not shown what it must be able to show: it may be gone, nobody is proven
    wrong."""

    rank: int
    step: int
    segment: int


Verdict = Proven | Withheld


@dataclass(slots=True)
class _Challenged:
    """What one seed of a step makes its ranks open, and what they have opened so far: the blocks of
    their input, and of the output behind them."""

    said: Certificate
    signed: Signed
    challenge: Challenge
    opened: dict[int, list[Opening]] = field(default_factory=dict)


@dataclass(slots=True)
class _Step:
    """What is known of one step, which the rank `told_by` told of first.

    Ranks go by the COMMIT of the lowest segment. One that did not get it, or that has signed a
    second nonce for it, comes to another seed: then not all open the same blocks, and the step ends
    without a verdict.
    """

    told_by: int
    completions: dict[int, Completion] = field(default_factory=dict)
    certificates: dict[tuple[int, int], Signed] = field(default_factory=dict)  # rank, segment
    asked: dict[tuple[int, int], int] = field(default_factory=dict)
    challenged: dict[bytes, _Challenged] = field(default_factory=dict)  # by seed
    goes_by: dict[int, bytes] = field(default_factory=dict)  # rank -> seed
    done: set[int] = field(default_factory=set)  # ranks that need open no more
    judged: bool = False

    @property
    def held_bytes(self) -> int:
        return sum(
            len(opening.data)
            for challenged in self.challenged.values()
            for opened in challenged.opened.values()
            for opening in opened
        )


class JobAudit:
    """One job. `budget` is what its grant allows; 0 where its owner wants no samples taken."""

    def __init__(self, keys: JobKeys, budget: float) -> None:
        self.keys = keys
        self.completed_steps = 0  # that all ranks told of, and have nothing left to show of
        self.audited_steps = 0  # with a verdict, good or bad
        self._budget = budget
        self._ranks = len(keys.session_keys)
        self._steps: OrderedDict[int, _Step] = OrderedDict()
        self._withheld: set[int] = set()
        self._progress: set[int] = set()  # ranks that have opened a sample since they were asked

    @property
    def withheld(self) -> frozenset[int]:
        """Ranks that were asked `MAX_ASKS` times for something and did not show it."""
        return frozenset(self._withheld)

    # Completions ----------------------------------------------------------------------------------

    def completed(self, rank: int, completion: Completion, signature: bytes) -> None:
        """A rank tells how a step ended. Raises BadMessage if it is not the rank's, or not of this
        job; the same one may come twice."""
        fits = completion.grant == self.keys.grant and completion.rank == rank
        if not fits or len(completion.segments) != len(self.keys.miners):
            raise BadMessage("the completion is of another job or rank")
        if not self.keys.signed_by_rank(rank, completion.statement(), signature):
            raise BadMessage("the completion is not signed by its rank")
        step = self._steps.setdefault(completion.step, _Step(told_by=rank))
        step.completions.setdefault(rank, completion)
        self._forget_if_over(completion.step)
        if len(self._steps) > MAX_OPEN_STEPS:
            busiest = self._busiest()
            self._forget_oldest(lambda step: step.told_by == busiest)

    def _forget_if_over(self, number: int) -> None:
        """Most steps end so: all ranks agree, and the sample, if there was one, is judged."""
        step = self._steps[number]
        told = step.completions.values()
        over = (
            len(told) == self._ranks
            and all(said.outcome == Completion.COMMITTED for said in told)
            and not self._conflicts(step)
            and (step.judged or not any(self._sampled(said) for said in told))
        )
        if over:
            self.completed_steps += 1
            del self._steps[number]

    def _busiest(self) -> int:
        """The rank that told of most steps first: who tells of steps that never were makes room
        among its own."""
        return Counter(step.told_by for step in self._steps.values()).most_common(1)[0][0]

    def _forget_oldest(self, which: Callable[[_Step], bool]) -> None:
        number = next((n for n, step in self._steps.items() if which(step)), None)
        if number is not None:
            del self._steps[number]

    def wants(self, rank: int) -> tuple[list[Want], list[Verdict]]:
        """What to ask the rank for now, and what follows from having asked in vain before."""
        wants: list[Want] = []
        verdicts: list[Verdict] = []
        # Who gets on, however slowly, is not asked in vain.
        in_vain = rank not in self._progress
        self._progress.discard(rank)
        due = [w for n, step in self._steps.items() for w in self._wants_of(step, n, rank)]
        for want in sorted(due, key=lambda want: not want.openings)[:MAX_WANTS]:
            step = self._steps[want.step]
            asked = step.asked.get((rank, want.segment), 0)
            if asked < MAX_ASKS:
                step.asked[rank, want.segment] = asked + (in_vain or not asked)
                wants.append(want)
            elif want.openings and in_vain:
                self._withheld.add(rank)
                step.done.add(rank)
                verdicts.append(Withheld(rank, want.step, want.segment))
        return wants, verdicts

    def pending(self, rank: int) -> bool:
        """Whether a verdict on a step that this rank told of is still to come."""
        return any(
            self._sampled(said) and not step.judged
            for step in self._steps.values()
            if (said := step.completions.get(rank)) is not None
        )

    def _sampled(self, said: Completion) -> bool:
        committed = said.outcome == Completion.COMMITTED
        return committed and said.sampled is not None and self._budget > 0

    def _wants_of(self, step: _Step, number: int, rank: int) -> list[Want]:
        said = step.completions.get(rank)
        if said is None:
            return []
        failed = said.outcome == Completion.FAILED  # only then are certificates kept
        wants = [
            Want(number, segment, openings=False)
            for segment in (self._conflicts(step) if failed else ())
            if (rank, segment) not in step.certificates
            and said.segments[segment].certificate != NO_ROOT
        ]
        if self._sampled(said) and rank not in step.done:
            assert said.sampled is not None
            wants.append(Want(number, said.sampled, openings=True))
        return wants

    @staticmethod
    def _conflicts(step: _Step) -> list[int]:
        """Segments of which the ranks hold different certificates."""
        said = [completion.segments for completion in step.completions.values()]
        return [
            segment
            for segment, outcomes in enumerate(zip(*said, strict=True))
            if len({o.certificate for o in outcomes} - {NO_ROOT}) > 1
        ]

    def check_dispute(self, reporter: int, dispute: Dispute) -> None:
        """Raises BadMessage unless the reporter (a rank) may say so: of itself, or because the
        miner has signed that it rejects what the other rank sent."""
        if dispute.segment >= len(self.keys.miners) or dispute.rank >= self._ranks:
            raise BadMessage("the job has no such rank or segment")
        if dispute.rank == reporter:
            return
        reject = bytes.fromhex(dispute.reject)
        if not self.keys.rejected(reject, dispute.step, dispute.segment, dispute.rank):
            raise BadMessage(f"{self.keys.miners[dispute.segment]} has not signed this reject")

    # Openings -------------------------------------------------------------------------------------

    def opened(self, rank: int, body: bytes) -> list[Verdict]:
        """A rank shows what it was asked for. Raises BadMessage if it does not fit: then it counts
        as not shown."""
        part = Part.decode(body)
        step = self._steps.get(part.step)
        if step is None or rank in step.done or rank not in step.completions:
            return []  # a repetition, or too late
        verdicts: list[Verdict] = []
        if part.certificate is not None:
            said = self._certificate(part, step, rank)
            verdicts += self._compare(step, said, part.certificate)
            step.certificates[rank, part.segment] = part.certificate
            if not part.echoes:
                return verdicts
            self._evidence(step, rank, part, said)
        verdicts += self._take(step, rank, part)
        if part.step in self._steps:
            self._forget_if_over(part.step)
        return verdicts

    def _certificate(self, part: Part, step: _Step, rank: int) -> Certificate:
        assert part.certificate is not None
        said = Certificate.from_statement(part.certificate.statement)
        if said.place != self.keys.place(part.step, part.segment):
            raise BadMessage("the certificate is of another place")
        if part.segment >= len(self.keys.miners) or len(said.entries) != self._ranks:
            raise BadMessage("the certificate is of a place that the job does not have")
        if not self.keys.signed_by_miner(
            part.segment, part.certificate.statement, part.certificate.signature
        ):
            raise BadMessage(f"the certificate is not signed by {self.keys.miners[part.segment]}")
        if step.completions[rank].segments[part.segment].certificate != said.digest:
            raise BadMessage("the certificate is not the one of the rank's completion")
        return said

    def _compare(self, step: _Step, said: Certificate, signed: Signed) -> list[Verdict]:
        """Two different certificates of one place prove that the miner lied."""
        for (_, segment), other in step.certificates.items():
            if segment == said.place.segment and other.statement != signed.statement:
                return [Proven(contradiction(ProofKind.TWO_CERTIFICATES, other, signed))]
        return []

    def _evidence(self, step: _Step, rank: int, part: Part, said: Certificate) -> None:
        """Which blocks this step has to open follows from what all ranks signed."""
        certified = {
            segment: outcome.certificate
            for segment, outcome in enumerate(step.completions[rank].segments)
            if outcome.certificate != NO_ROOT
        }
        digest = step_digest(certified)
        nonces = [ack.nonce for ack in self._acks(part, digest)]
        seed = challenge_seed(digest, nonces)
        segments = sorted(certified)
        if challenged_segment(seed, segments) != part.segment or said.op is ReduceOp.BROADCAST:
            raise BadMessage(f"segment {part.segment} is not the one to open")
        chosen = challenge(seed, said.nbytes, self._ranks, len(segments), self._budget)
        if chosen is None:
            raise BadMessage("this step has nothing to open")
        assert part.certificate is not None
        made = _Challenged(said, part.certificate, chosen)
        step.goes_by[rank] = seed
        challenged = step.challenged.setdefault(seed, made)
        challenged.opened[rank] = []  # a rank whose last attempt broke off begins again

    def _acks(self, part: Part, digest: bytes) -> tuple[Ack, ...]:
        try:
            acks = acks_from(part.echoes)
        except struct.error:
            raise BadMessage(f"echoes of {len(part.echoes)} bytes") from None
        if len(acks) != self._ranks:
            raise BadMessage(f"{len(acks)} acknowledgements of {self._ranks} ranks")
        place = self.keys.place(part.step, part.commit_segment)
        for rank, ack in enumerate(acks):
            statement = ack.statement(place, rank)
            signed = self.keys.signed_by_rank(rank, statement, ack.signature)
            if ack.step_digest != digest or not signed:
                raise BadMessage(f"rank {rank + 1} has not acknowledged these certificates")
        return acks

    def _take(self, step: _Step, rank: int, part: Part) -> list[Verdict]:
        """The next openings of a rank, each checked against the root that it belongs to."""
        challenged = step.challenged.get(step.goes_by.get(rank, b""))
        if challenged is None or part.first != len(challenged.opened[rank]):
            raise BadMessage(f"opening {part.first} is not the next one")
        said, chosen = challenged.said, challenged.challenge
        opened = challenged.opened[rank]
        roots = [said.entries[rank][0]] + ([said.root] if rank == chosen.opener else [])
        numbers = chosen.blocks * len(roots)
        count = len(chosen.blocks)
        for opening in split_openings(part.blocks, said.nbytes, numbers[len(opened) :]):
            at = len(opened)
            try:
                root = root_from(said.nbytes, numbers[at], opening.data, opening.path)
            except ValueError as error:
                raise BadMessage(str(error)) from None
            if root != roots[at // count]:
                raise BadMessage(f"block {numbers[at]} does not open the certified root")
            opened.append(opening)
        while sum(each.held_bytes for each in self._steps.values()) > MAX_HELD_BYTES:
            self._forget_oldest(lambda each: each.held_bytes > 0)
        if len(opened) < len(numbers):
            return []
        step.done.add(rank)
        self._progress.add(rank)
        return self._judge(step, challenged)

    def _judge(self, step: _Step, challenged: _Challenged) -> list[Verdict]:
        """Once everything is here: is the output the reduction of the inputs?"""
        said, chosen = challenged.said, challenged.challenge
        count = len(chosen.blocks)
        ranks = range(self._ranks)
        complete = all(len(challenged.opened.get(rank, ())) >= count for rank in ranks)
        output = challenged.opened.get(chosen.opener, [])[count:]
        if not complete or len(output) < count:
            return []
        self.audited_steps += 1
        step.judged = True
        inputs = [challenged.opened[rank] for rank in ranks]
        step.challenged = {}
        for at, block in enumerate(chosen.blocks):
            openings = (*(opened[at] for opened in inputs), output[at])
            *given, result = (opening.data for opening in openings)
            try:
                right = reduce_block(given, said) == result
            except UnsupportedTensor as error:
                raise BadMessage(str(error)) from None
            if not right:
                claim = Claim(
                    kind=ProofKind.WRONG_SUM,
                    statements=(challenged.signed,),
                    block=block,
                    openings=openings,
                )
                return [Proven(claim)]
        return []
