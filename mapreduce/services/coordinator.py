"""The coordinator of a validator: brings ranks together, finds them miners, grants jobs, takes
reports.

Knows the control routes that peers call. Does not know the data plane: a running job needs no
validator.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mapreduce import __version__
from mapreduce.core.challenge import DEFAULT_BUDGET
from mapreduce.errors import BadMessage, MapReduceError, Refused
from mapreduce.net.auth import verify_signature
from mapreduce.net.client import Remote, call
from mapreduce.net.server import BODY, CALLER, json_response
from mapreduce.services.grants import read_grant, sign_grant
from mapreduce.services.lobby import Group, Lobby
from mapreduce.wire.messages import (
    Accepted,
    Grant,
    GrantedJob,
    JobMember,
    JoinRequest,
    MinerAddress,
    MinerStatus,
    Report,
    ReportAnswer,
    SignedGrant,
    decode_message,
)
from mapreduce.wire.statements import session_key_statement
from mapreduce.wire.terms import Terms

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web
    from bittensor.sp_core import Keypair

    from mapreduce.services.auditor import Auditor
    from mapreduce.services.neuron import Directory

GRANT_LIFETIME_S = 3600.0
STATUS_TIMEOUT_S = 3.0
OFFER_TIMEOUT_S = 5.0
OFFER_ROUNDS = 4
FRESH_METAGRAPH_S = 2.0
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
        directory: Directory,
        http: aiohttp.ClientSession,
        limits: Limits,
        auditor: Auditor,
    ) -> None:
        self.hotkey: str = key.ss58_address
        self._key = key
        self._netuid = netuid
        self._directory = directory
        self._http = http
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
        """A grant that all its miners have accepted; whoever refuses is replaced."""
        wanted = group.first
        refused: dict[str, str] = {}
        for attempt in range(OFFER_ROUNDS):
            if attempt:
                await asyncio.sleep(random.uniform(0.05, 0.2))  # others may be offering too
            miners = await self._pick(group, refused)
            grant = self._make_grant(group, miners)
            signed = sign_grant(self._key, grant)
            answers = await asyncio.gather(*(self._offer(miner, signed) for miner in miners))
            if not any(answers):
                _log.info(
                    "job granted",
                    extra={
                        "job": grant.job[:8],
                        "peers": wanted.peer_count,
                        "miners": [miner.uid for miner in miners],
                    },
                )
                return signed
            for miner, reason in zip(miners, answers, strict=True):
                if reason is None:
                    await self._release(miner, grant.job)
                else:
                    refused[miner.hotkey] = f"uid {miner.uid}: {reason}"
        raise self._too_few(wanted.miner_count or 1, 0, list(refused.values()))

    @staticmethod
    def _too_few(needed: int, found: int, reasons: list[str]) -> Refused:
        why = f"; not available: {'; '.join(reasons[:8])}" if reasons else ""
        return Refused(
            f"{needed} miner{'s are' if needed > 1 else ' is'} needed, {found} can take the "
            f"job{why}",
            code="too_few_miners",
            status=503,
        )

    async def _pick(self, group: Group, refused: dict[str, str]) -> list[MinerAddress]:
        """The miners with the most room, as many as the job wants.

        Raises Refused if they are too few.
        """
        wanted = group.first
        metagraph = await self._directory.metagraph(FRESH_METAGRAPH_S)
        candidates = [
            MinerAddress(uid=n.uid, hotkey=n.hotkey, ip=n.ip, port=n.port)
            for n in metagraph.neurons
            if n.ip is not None and n.port and n.hotkey != self.hotkey and n.hotkey not in refused
        ]
        banned = self._auditor.banned()
        reasons = list(refused.values())
        reasons += [
            f"uid {miner.uid}: proven to have lied (proof {banned[miner.hotkey]})"
            for miner in candidates
            if miner.hotkey in banned
        ]
        candidates = [miner for miner in candidates if miner.hotkey not in banned]
        answers = await asyncio.gather(*(self._status(miner) for miner in candidates))
        needed_bytes = self._terms(group, 1).miner_bytes
        able: list[tuple[float, float, MinerAddress]] = []
        for miner, status in zip(candidates, answers, strict=True):
            if isinstance(status, str):
                reasons.append(f"uid {miner.uid}: {status}")
            elif status.jobs >= status.max_jobs:
                reasons.append(f"uid {miner.uid}: all {status.max_jobs} jobs are taken")
            elif status.memory_free_bytes < needed_bytes:
                reasons.append(
                    f"uid {miner.uid}: {status.memory_free_bytes / 2**20:.2f} MiB free of "
                    f"{needed_bytes / 2**20:.2f} needed"
                )
            else:
                load = status.jobs / status.max_jobs
                able.append((load, random.random(), miner))
        count = wanted.miner_count or min(wanted.peer_count, max(1, len(able)))
        if len(able) < count:
            raise self._too_few(count, len(able), reasons)
        able.sort(key=lambda entry: entry[:2])
        return [miner for _, _, miner in able[:count]]

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

    # Miners -------------------------------------------------------------------------------------

    @staticmethod
    def _remote(miner: MinerAddress) -> Remote:
        return Remote(f"miner uid {miner.uid}", miner.hotkey, miner.ip, miner.port)

    async def _status(self, miner: MinerAddress) -> MinerStatus | str:
        remote = self._remote(miner)
        try:
            return await call(
                self._http,
                self._key,
                remote,
                "GET",
                "/v1/status",
                None,
                MinerStatus,
                timeout_s=STATUS_TIMEOUT_S,
            )
        except MapReduceError as error:
            return str(error)

    async def _offer(self, miner: MinerAddress, signed: SignedGrant) -> str | None:
        """Why the miner refuses, None if it accepts."""
        remote = self._remote(miner)
        try:
            await call(
                self._http,
                self._key,
                remote,
                "POST",
                "/v1/jobs",
                signed,
                Accepted,
                timeout_s=OFFER_TIMEOUT_S,
            )
        except MapReduceError as error:
            return str(error)
        return None

    async def _release(self, miner: MinerAddress, job: str) -> None:
        with contextlib.suppress(MapReduceError):  # an unused reservation expires by itself
            await call(
                self._http,
                self._key,
                self._remote(miner),
                "DELETE",
                f"/v1/jobs/{job}",
                None,
                Accepted,
                timeout_s=OFFER_TIMEOUT_S,
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
