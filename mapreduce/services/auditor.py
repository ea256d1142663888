"""The auditor of a validator: takes completions, openings and proofs of its jobs' peers, and keeps
the verdicts.

Knows routes, the ledger and what a verdict is called there. Does not know how a verdict is reached
(`wire/audit.py`), nor what it costs in score.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web
from blake3 import blake3

from mapreduce.core.attribution import Flags, flagged
from mapreduce.errors import BadMessage, Refused
from mapreduce.net.server import BODY, CALLER, json_response
from mapreduce.services.grants import job_keys
from mapreduce.wire.audit import JobAudit, Proven, Verdict, Withheld
from mapreduce.wire.messages import (
    Accepted,
    AuditAnswer,
    CompletionBatch,
    Grant,
    GrantedJob,
    WantedOpenings,
    decode_message,
    encode_message,
)
from mapreduce.wire.proofs import (
    Claim,
    Delegation,
    Finding,
    ProofKind,
    check_claim,
    decode_claim,
    encode_proof,
)
from mapreduce.wire.statements import Completion

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from mapreduce.services.organic import Organic
    from mapreduce.store.history import History, Known
    from mapreduce.store.ledger import Ledger

MAX_LIVE_AUDITS = 64
DISPUTE_WINDOW_S = 86400.0
MAX_DISPUTES = 64  # that one rank of a job can have kept: only distinct pairs count anyway

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    """A job as its audit goes on."""

    granted: GrantedJob
    grant: Grant
    audit: JobAudit
    proofs: list[str] = field(default_factory=list)
    unkept: deque[Verdict] = field(default_factory=deque)
    disputes: Counter[int] = field(default_factory=Counter)  # by the rank that reported them


class Auditor:
    """The routes that peers report to, over one ledger; what real jobs tell of their miners goes to
    `organic`, and the `history` says who belongs together."""

    def __init__(
        self,
        ledger: Ledger,
        history: History,
        organic: Organic,
        ban_s: float,
    ) -> None:
        self._ledger = ledger
        self._history = history
        self._organic = organic
        self._ban_s = ban_s
        self._addresses: dict[str, str | None] = {}  # by proof
        self._jobs: OrderedDict[str, _Job] = OrderedDict()

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/jobs/{job}/completions", self._completions)
        app.router.add_post("/v1/jobs/{job}/openings", self._openings)
        app.router.add_post("/v1/jobs/{job}/proofs", self._accused)
        app.router.add_get("/v1/jobs/{job}/proofs/{proof}", self._proof)

    # For the coordinator ------------------------------------------------------------------------

    def granted(self, job: str, granted: GrantedJob) -> None:
        """A job begins. Raises LocalError if it cannot be kept: then it must not begin."""
        self._ledger.add_job(job, encode_message(granted).decode(), time.time())

    def banned(self) -> dict[str, str]:
        """Hotkeys of miners that were proven to lie in the last days, with a proof's id, and those
        that share a coldkey or an address with one: a new key is no way out."""
        proven = self._ledger.banned(time.time(), self._ban_s)
        if not proven:
            return proven
        addresses = {hotkey: self._served_at(hotkey, proof) for hotkey, proof in proven.items()}
        return spread(proven, addresses, self._history.known().values())

    def _served_at(self, hotkey: str, proof: str) -> str | None:
        """Where the miner lied, as the grant says: it can publish any address afterwards, to take
        somebody else down with it."""
        if proof not in self._addresses:
            entry = self._ledger.proof_entry(proof)
            live = None if entry is None else self._job(entry.job)
            miners = [] if live is None else live.grant.miners
            self._addresses[proof] = next((m.ip for m in miners if m.hotkey == hotkey), None)
        return self._addresses[proof]

    def excluded(self, job: str) -> list[str]:
        """What ranks of the job have not shown though they must be able to, in words."""
        return sorted({entry.what for entry in self._ledger.unavailable(job=job)})

    def prune(self, now: float) -> None:
        """Lets go of what is too old to matter."""
        self._ledger.prune(now, self._ban_s)

    def lost(self, job: str, rank: int, uids: list[int]) -> None:
        """A rank (index) has lost these miners."""
        live = self._job(job)
        if live is not None and uids:
            self._organic.lost(live.granted, live.grant, rank, uids)

    def flags(self) -> Flags:
        """Whom the disputes of the last day speak against, without a proof: owners of peers, and
        hotkeys of miners."""
        owner = self._organic.owner
        disputed = self._ledger.disputed(time.time() - DISPUTE_WINDOW_S)
        disputes = [(owner(peer), miner) for peer, miner in disputed]
        peers, miners = {peer for peer, _ in disputes}, {miner for _, miner in disputes}
        for live in self._jobs.values():
            peers.update(owner(member.hotkey) for member in live.granted.members)
            miners.update(miner.hotkey for miner in live.grant.miners)
        return flagged(disputes, len(peers), len(miners))

    # Routes -------------------------------------------------------------------------------------

    def _job(self, name: str) -> _Job | None:
        """A job that this validator has granted."""
        job = self._jobs.get(name)
        if job is None:
            kept = self._ledger.job(name)
            if kept is None:
                return None
            granted = decode_message(GrantedJob, kept)
            grant = decode_message(Grant, granted.signed.grant)
            budget = grant.audit_budget if granted.audit else 0.0
            audit = JobAudit(job_keys(granted.signed, grant), budget)
            job = self._jobs[name] = _Job(granted, grant, audit)
            job.proofs = [entry.id for entry in self._ledger.proofs(job=name)]
        self._jobs.move_to_end(name)
        while len(self._jobs) > MAX_LIVE_AUDITS:
            self._jobs.popitem(last=False)
        return job

    def _caller(self, request: web.Request) -> tuple[_Job, int]:
        """The job of the path, and the rank of who calls."""
        job = self._job(request.match_info["job"])
        if job is None:
            raise Refused("no such job of this validator", code="no_such_job", status=404)
        if request[CALLER].address not in job.grant.session_keys:
            raise Refused("the job has no such peer", code="not_in_job", status=403)
        return job, job.grant.session_keys.index(request[CALLER].address)

    async def _completions(self, request: web.Request) -> web.Response:
        job, rank = self._caller(request)
        batch = decode_message(CompletionBatch, request[BODY])
        if batch.rank != rank:
            raise BadMessage(f"the report is of rank {batch.rank + 1}, the caller {rank + 1}")
        for given in batch.completions:
            completion = Completion.from_content(bytes.fromhex(given.content))
            job.audit.completed(rank, completion, bytes.fromhex(given.signature))
            self._organic.completed(job.granted, job.grant, completion)
        for dispute in batch.disputes:
            job.audit.check_dispute(rank, dispute)
            job.disputes[rank] += 1
            if job.disputes[rank] > MAX_DISPUTES:
                continue
            peer = job.granted.members[dispute.rank].hotkey
            miner = job.grant.miners[dispute.segment]
            _log.warning(
                "a peer and a miner contradict each other",
                extra={
                    "job": job.grant.job[:8],
                    "step": dispute.step,
                    "rank": dispute.rank + 1,
                    "uid": miner.uid,
                    "what": dispute.what,
                },
            )
            self._ledger.add_dispute(
                peer=peer,
                miner=miner.hotkey,
                job=job.grant.job,
                step=dispute.step,
                segment=dispute.segment,
                what=dispute.what,
                now=time.time(),
            )
        if batch.disputes:
            flags = self.flags()
            if flags.miners or flags.peers:
                _log.warning(
                    "disputes speak against",
                    extra={"miners": sorted(flags.miners), "peers": sorted(flags.peers)},
                )
        wants, verdicts = job.audit.wants(rank)
        self._keep(job, verdicts)
        return json_response(
            AuditAnswer(
                wants=[
                    WantedOpenings(step=w.step, segment=w.segment, openings=w.openings)
                    for w in wants
                ],
                proofs=job.proofs[:64],
                pending=job.audit.pending(rank),
            )
        )

    async def _openings(self, request: web.Request) -> web.Response:
        job, rank = self._caller(request)
        before = job.audit.audited_steps
        self._keep(job, job.audit.opened(rank, request[BODY]))
        if job.audit.audited_steps > before:
            _log.debug(
                "a step is audited",
                extra={
                    "job": job.grant.job[:8],
                    "audited": job.audit.audited_steps,
                    "completed": job.audit.completed_steps,
                },
            )
        return json_response(Accepted(job=job.grant.job))

    async def _accused(self, request: web.Request) -> web.Response:
        """A peer shows a claim that it could check itself."""
        job, _ = self._caller(request)
        claim = decode_claim(request[BODY])
        check_claim(claim, job.audit.keys)
        self._keep(job, [Proven(claim)])
        return json_response(Accepted(job=job.grant.job))

    async def _proof(self, request: web.Request) -> web.Response:
        job, _ = self._caller(request)
        name = request.match_info["proof"]
        data = self._ledger.proof(name) if name in job.proofs else None
        if data is None:
            raise Refused("the job has no such proof", code="no_such_proof", status=404)
        return web.Response(body=data, content_type="application/octet-stream")

    # Verdicts -----------------------------------------------------------------------------------

    def _keep(self, job: _Job, verdicts: Iterable[Verdict]) -> None:
        """Keeps the verdicts, and any that could not be kept before. Raises LocalError if that
        fails: they are tried again with the next request."""
        job.unkept.extend(verdicts)
        while job.unkept:
            verdict = job.unkept[0]
            if isinstance(verdict, Withheld):
                self._withheld(job, verdict)
            else:
                self._proven(job, verdict.claim)
            job.unkept.popleft()

    def _withheld(self, job: _Job, verdict: Withheld) -> None:
        hotkey = job.granted.members[verdict.rank].hotkey
        _log.warning(
            "a peer does not open what it has acknowledged",
            extra={"job": job.grant.job[:8], "rank": verdict.rank + 1, "hotkey": hotkey},
        )
        self._ledger.add_unavailable(
            role="peer",
            hotkey=hotkey,
            job=job.grant.job,
            step=verdict.step,
            segment=verdict.segment,
            what=f"rank {verdict.rank + 1} withheld its openings",
            now=time.time(),
        )

    def _proven(self, job: _Job, claim: Claim) -> None:
        finding = check_claim(claim, job.audit.keys)
        claim = self._delegated(job, claim, finding)
        finding = check_claim(claim, job.audit.keys)
        signed = job.granted.signed
        data = encode_proof(signed.grant, signed.signature, claim)
        proof_id = blake3(data).hexdigest()[:32]
        if proof_id in job.proofs:
            return
        self._ledger.add_proof(
            proof_id,
            kind=finding.kind.label,
            role="miner" if finding.rank is None else "peer",
            culprit=finding.culprit,
            job=job.grant.job,
            step=finding.step,
            segment=finding.segment,
            data=data,
            now=time.time(),
        )
        job.proofs.append(proof_id)
        _log.error(
            "a lie is proven",
            extra={
                "proof": proof_id,
                "kind": finding.kind.label,
                "who": finding.lines[0],
                "job": job.grant.job[:8],
                "step": finding.step,
                "what": finding.what,
            },
        )

    @staticmethod
    def _delegated(job: _Job, claim: Claim, finding: Finding) -> Claim:
        """The same claim, against the hotkey behind a session key."""
        if claim.kind is not ProofKind.TWO_UPLOADS:
            return claim
        assert finding.rank is not None
        member = job.granted.members[finding.rank]
        given = Delegation(hotkey=member.hotkey, signature=bytes.fromhex(member.delegation))
        return Claim(kind=claim.kind, statements=claim.statements, delegation=given)


def spread(
    proven: Mapping[str, str], addresses: Mapping[str, str | None], known: Collection[Known]
) -> dict[str, str]:
    """`proven` (hotkey to proof), and every hotkey of the same coldkey, or at one of the
    `addresses` where the proven ones served. A loopback address tells nothing: a whole fleet may
    share it."""
    guilty: dict[str, str] = {}
    for neuron in known:
        if neuron.hotkey in proven:
            guilty[neuron.coldkey] = proven[neuron.hotkey]
    for hotkey, ip in addresses.items():
        if ip is not None and not ipaddress.ip_address(ip).is_loopback:
            guilty[ip] = proven[hotkey]
    banned = dict(proven)
    for neuron in known:
        proof = guilty.get(neuron.coldkey) or guilty.get(neuron.ip or "")
        if proof is not None:
            banned.setdefault(neuron.hotkey, proof)
    return banned
