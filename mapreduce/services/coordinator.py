"""The coordinator of a validator: brings ranks together, finds them miners, grants jobs, takes
reports.

Knows the control routes that peers call. Does not know the data plane: a running job needs no
validator.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mapreduce import __version__
from mapreduce.core.challenge import DEFAULT_BUDGET
from mapreduce.errors import BadMessage, MapReduceError, Refused
from mapreduce.net.auth import verify_signature
from mapreduce.net.server import BODY, CALLER, json_response
from mapreduce.services.grants import read_grant, sign_grant
from mapreduce.services.lobby import Group, Lobby
from mapreduce.services.recruiter import Chosen, Recruiter, Wanted
from mapreduce.wire.messages import (
    Grant,
    GrantedJob,
    JobMember,
    JoinRequest,
    Report,
    ReportAnswer,
    SignedGrant,
    decode_message,
)
from mapreduce.wire.statements import session_key_statement
from mapreduce.wire.terms import Terms

if TYPE_CHECKING:
    from aiohttp import web
    from bittensor.sp_core import Keypair

    from mapreduce.services.auditor import Auditor
    from mapreduce.wire.messages import MinerAddress

GRANT_LIFETIME_S = 3600.0
DOUBT_GRACE_S = 600.0  # after the end of a grant, for ranks in doubt about its last step
MAX_REMEMBERED_JOBS = 4096
MAX_FAILED_STEPS = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What this validator grants: bytes, seconds that ranks wait for each other at most, and the
    share of a job's traffic that audits may add."""

    window_bytes: int
    frame_bytes: int
    join_timeout_s: float
    audit_budget: float = DEFAULT_BUDGET


@dataclass(slots=True)
class _Outcome:
    """What the ranks of a job have reported."""

    committed_step: int = 0
    failed_steps: set[int] = field(default_factory=set)


class Coordinator:
    """The routes that peers call on a validator."""

    def __init__(
        self,
        key: Keypair,
        netuid: int,
        recruiter: Recruiter,
        limits: Limits,
        auditor: Auditor,
    ) -> None:
        self.hotkey: str = key.ss58_address
        self._key = key
        self._netuid = netuid
        self._recruiter = recruiter
        self._chosen: dict[str, Chosen] = {}
        self._limits = limits
        self._auditor = auditor
        self._lobby = Lobby()
        self._grants: dict[Group, asyncio.Future[SignedGrant]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._outcomes: OrderedDict[str, _Outcome] = OrderedDict()

    @property
    def waiting_ranks(self) -> int:
        """How many ranks wait for others to join."""
        return self._lobby.waiting_ranks

    def choose(self, name: str, miners: list[MinerAddress]) -> Chosen:
        """The job that ranks join by this name is reduced by these miners, until `forget`."""
        chosen = self._chosen[name] = Chosen(miners)
        return chosen

    def forget(self, name: str) -> None:
        """Miners are no longer chosen for this name."""
        self._chosen.pop(name, None)

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/join", self._join)
        app.router.add_post("/v1/report", self._report)
        app.router.add_post("/v1/renew", self._renew)
        app.on_shutdown.append(self._shutdown)

    # Joining ------------------------------------------------------------------------------------

    async def _join(self, request: web.Request) -> web.Response:
        if request[CALLER].is_session_key:
            raise Refused("a job is joined with a hotkey", code="not_a_hotkey", status=403)
        wanted = decode_message(JoinRequest, request[BODY])
        hotkey = request[CALLER].address
        delegated = session_key_statement(self.hotkey, wanted.session_key)
        signature = bytes.fromhex(wanted.delegation)
        if not verify_signature(hotkey, delegated, signature, session_key=False):
            raise BadMessage("delegation: the hotkey has not signed for this session key")
        group = self._lobby.join(hotkey, wanted)
        granted = self._grants.get(group)
        if granted is None:
            granted = self._grants[group] = asyncio.get_running_loop().create_future()
        if group.complete:
            task = asyncio.create_task(self._grant(group, granted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        timeout_s = min(wanted.timeout_s, self._limits.join_timeout_s)
        try:
            # No deadline of ours once the group is complete: granting has its own.
            await asyncio.wait([granted], timeout=timeout_s)
            if not granted.done() and not group.complete:
                self._give_up(group, granted, timeout_s)
            return json_response(await asyncio.shield(granted))
        except asyncio.CancelledError:
            self._lobby.leave(group, wanted.rank)
            if not group.members:
                self._grants.pop(group, None)
            raise

    def _give_up(
        self, group: Group, granted: asyncio.Future[SignedGrant], timeout_s: float
    ) -> None:
        missing = group.missing
        self._lobby.dissolve(group)
        self._grants.pop(group, None)
        names = ", ".join(map(str, missing))
        self._settle(
            granted,
            Refused(
                f"{'rank' if len(missing) == 1 else 'ranks'} {names} of {group.first.peer_count} "
                f"did not join within {timeout_s:g} s",
                code="ranks_missing",
                status=408,
            ),
        )

    @staticmethod
    def _settle(granted: asyncio.Future[SignedGrant], error: MapReduceError) -> None:
        if not granted.done():
            granted.set_exception(error)
            granted.exception()  # the ranks may all have hung up: then nobody else retrieves it

    async def _grant(self, group: Group, granted: asyncio.Future[SignedGrant]) -> None:
        try:
            signed = await self._find_miners(group)
            self._auditor.granted(
                decode_message(Grant, signed.grant).job,
                GrantedJob(
                    signed=signed,
                    members=[
                        JobMember(hotkey=member.hotkey, delegation=member.delegation.hex())
                        for member in group.ranks
                    ],
                    audit=group.first.audit,
                ),
            )
            if not granted.done():
                granted.set_result(signed)
        except MapReduceError as error:
            _log.warning("no job granted", extra={"peers": group.key, "reason": str(error)})
            self._settle(granted, error)
        finally:
            self._grants.pop(group, None)
            # Whatever else went wrong, the ranks must not wait for ever.
            self._settle(granted, Refused("no job: see this log", code="internal", status=500))

    async def _find_miners(self, group: Group) -> SignedGrant:
        """A grant that all its miners have accepted. Raises Refused if they are too few."""
        first = group.first
        chosen = self._chosen.get(first.job)
        wanted = Wanted(
            peer_count=first.peer_count,
            miner_count=first.miner_count,
            miner_bytes=self._terms(group, 1).miner_bytes,
        )

        def make_grant(miners: list[MinerAddress]) -> tuple[str, SignedGrant]:
            grant = self._make_grant(group, miners)
            return grant.job, sign_grant(self._key, grant)

        job, signed, miners = await self._recruiter.recruit(wanted, make_grant, chosen)
        if chosen is not None:
            chosen.job = job
        _log.info(
            "job granted",
            extra={
                "job": job[:8],
                "peers": first.peer_count,
                "miners": [miner.uid for miner in miners],
            },
        )
        return signed

    def _terms(self, group: Group, miner_count: int) -> Terms:
        wanted = group.first
        try:
            return Terms(
                peer_count=wanted.peer_count,
                miner_count=miner_count,
                bandwidth=wanted.bandwidth,
                window_bytes=self._limits.window_bytes,
                frame_bytes=self._limits.frame_bytes,
            )
        except ValueError as error:
            raise BadMessage(str(error)) from None

    def _make_grant(self, group: Group, miners: list[MinerAddress]) -> Grant:
        now = time.time()
        terms = self._terms(group, len(miners))
        return Grant(
            version=__version__,
            job=os.urandom(16).hex(),
            netuid=self._netuid,
            validator=self.hotkey,
            created_at=now,
            expires_at=now + GRANT_LIFETIME_S,
            bandwidth=terms.bandwidth,
            window_bytes=terms.window_bytes,
            frame_bytes=terms.frame_bytes,
            session_keys=[member.session_key for member in group.ranks],
            miners=miners,
            audit_budget=self._limits.audit_budget,
        )

    # Running jobs -------------------------------------------------------------------------------

    def _own_grant(self, request: web.Request, signed: SignedGrant) -> tuple[Grant, int]:
        """A grant of ours that a peer shows, and the peer's rank. Needs no memory of the job."""
        grant = read_grant(signed, self.hotkey)
        if request[CALLER].address not in grant.session_keys:
            raise Refused("the job has no such peer", code="not_in_job", status=403)
        return grant, grant.session_keys.index(request[CALLER].address)

    async def _renew(self, request: web.Request) -> web.Response:
        grant, _ = self._own_grant(request, decode_message(SignedGrant, request[BODY]))
        if withheld := self._auditor.excluded(grant.job):
            raise Refused(
                f"the job ends: {'; '.join(withheld)}, three times", code="excluded", status=403
            )
        now = time.time()
        if grant.expires_at < now:
            raise Refused("the grant has expired; open a new job", code="expired", status=410)
        renewed = replace(grant, expires_at=now + GRANT_LIFETIME_S)
        return json_response(sign_grant(self._key, renewed))

    async def _report(self, request: web.Request) -> web.Response:
        report = decode_message(Report, request[BODY])
        grant, rank = self._own_grant(request, report.grant)
        if report.rank != rank:
            raise BadMessage(f"the report is of rank {report.rank + 1}, the caller {rank + 1}")
        if grant.expires_at + DOUBT_GRACE_S < time.time():
            raise Refused("the grant expired long ago", code="expired", status=410)
        self._auditor.lost(grant.job, rank, report.lost_miners)
        outcome = self._outcomes.setdefault(grant.job, _Outcome())
        self._outcomes.move_to_end(grant.job)
        while len(self._outcomes) > MAX_REMEMBERED_JOBS:
            self._outcomes.popitem(last=False)
        outcome.committed_step = max(outcome.committed_step, report.committed_step)
        if report.outcome == "failed":
            outcome.failed_steps.add(report.step)
            while len(outcome.failed_steps) > MAX_FAILED_STEPS:
                outcome.failed_steps.remove(min(outcome.failed_steps))
        _log.warning(
            "peer reports",
            extra={
                "job": grant.job[:8],
                "rank": rank + 1,
                "step": report.step,
                "outcome": report.outcome,
                "lost_miners": report.lost_miners,
                "reason": report.message,
            },
        )
        return json_response(
            ReportAnswer(
                committed_step=outcome.committed_step, failed_steps=sorted(outcome.failed_steps)
            )
        )

    async def _shutdown(self, _: web.Application) -> None:
        closing = Refused("the validator is shutting down", code="closing", status=503)
        for group, granted in tuple(self._grants.items()):
            self._lobby.dissolve(group)
            self._settle(granted, closing)
        for task in tuple(self._tasks):
            task.cancel()
