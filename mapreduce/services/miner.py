"""The miner: accepts jobs from validators and reduces what their peers stream.

Knows routes, admission and shutdown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # ships no types

from mapreduce import __version__
from mapreduce.config import available_memory_bytes
from mapreduce.core.reduce import check_subnormals
from mapreduce.errors import BadMessage, Refused
from mapreduce.net.auth import Verifier, signer
from mapreduce.net.server import BODY, CALLER, json_response, make_app
from mapreduce.net.stream import is_upgrade
from mapreduce.services.grants import MAX_GRANT_AHEAD_S, AcceptedGrants, read_grant
from mapreduce.services.miner_job import MinerJob
from mapreduce.services.neuron import Directory, Neuron
from mapreduce.services.speedtest import SpeedTests
from mapreduce.wire.messages import (
    Accepted,
    Grant,
    MinerStatus,
    SignedGrant,
    decode_message,
)

if TYPE_CHECKING:
    from aiohttp import web
    from bittensor.sp_core import Keypair

    from mapreduce.config import MinerConfig

_log = logging.getLogger(__name__)


class Miner:
    """The routes and the jobs of one miner. `directory` says who is a validator; `started_at`,
    seconds of the Unix epoch, is since when this miner knows what it has accepted."""

    def __init__(
        self,
        key: Keypair,
        directory: Directory,
        *,
        max_jobs: int,
        memory_limit_bytes: int,
        started_at: float,
    ) -> None:
        self.hotkey: str = key.ss58_address
        self.jobs: dict[str, MinerJob] = {}
        self.draining = False
        self._sign = signer(key)
        self._accepted = AcceptedGrants(started_at)
        self._directory = directory
        self._max_jobs = max_jobs
        self._memory_limit_bytes = memory_limit_bytes
        self._closing = False

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/v1/status", self._status)
        app.router.add_post("/v1/jobs", self._offer)
        app.router.add_delete("/v1/jobs/{job}", self._release)
        app.router.add_post("/v1/jobs/{job}/grant", self._renew)
        app.router.add_get("/v1/jobs/{job}/stream", self._stream)
        app.on_shutdown.append(self._shutdown)

    def under_way(self) -> str | None:
        """How many jobs this miner serves; None without any."""
        count = len(self.jobs)
        return f"{count} job{'s' if count > 1 else ''}" if count else None

    @property
    def memory_free_bytes(self) -> int:
        """What the limit leaves, or what the machine has left if that is less."""
        reserved = sum(job.terms.miner_bytes for job in self.jobs.values())
        return max(0, min(self._memory_limit_bytes - reserved, available_memory_bytes()))

    async def _require_validator(self, request: web.Request) -> str:
        address = request[CALLER].address
        if request[CALLER].is_session_key or not await self._directory.is_validator(address):
            raise Refused(
                f"{address} holds no validator permit on this subnet", code="no_permit", status=403
            )
        return address

    async def _status(self, request: web.Request) -> web.Response:
        await self._require_validator(request)
        status = MinerStatus(
            version=__version__,
            jobs=len(self.jobs),
            max_jobs=self._max_jobs,
            memory_free_bytes=self.memory_free_bytes,
            memory_limit_bytes=self._memory_limit_bytes,
            draining=self.draining,
        )
        return json_response(status)

    async def _offer(self, request: web.Request) -> web.Response:
        validator = await self._require_validator(request)
        signed = decode_message(SignedGrant, request[BODY])
        grant = self._read_grant(signed, validator)
        segments = [i for i, miner in enumerate(grant.miners) if miner.hotkey == self.hotkey]
        if len(segments) != 1:
            raise BadMessage(f"the grant names this miner {len(segments)} times")
        if grant.job in self.jobs:
            raise Refused(f"job {grant.job} is already accepted", code="duplicate_job")
        self._admit(grant)
        self._accepted.add(grant, time.time())
        job = MinerJob(signed, grant, segments[0], self._sign, self._ended)
        self.jobs[grant.job] = job
        _log.info(
            "job accepted",
            extra={
                "job": grant.job[:8],
                "peers": job.terms.peer_count,
                "segment": segments[0],
                "of": job.terms.miner_count,
                "bytes": job.terms.miner_bytes,
            },
        )
        return json_response(Accepted(job=grant.job))

    @staticmethod
    def _read_grant(signed: SignedGrant, validator: str) -> Grant:
        grant = read_grant(signed, validator)
        if grant.expires_at <= time.time():
            raise BadMessage("the grant has expired")
        return grant

    def _admit(self, grant: Grant) -> None:
        """Raises Refused, with the figures, if there is no room for the job."""
        needed = grant.terms.miner_bytes
        free = self.memory_free_bytes
        if self._closing:
            raise Refused("the miner is shutting down", code="closing", status=503)
        if self.draining:
            raise Refused(
                "the miner takes no jobs yet: it is starting, or will be updated",
                code="draining",
                status=503,
            )
        if len(self.jobs) >= self._max_jobs:
            raise Refused(
                f"all {self._max_jobs} jobs (--miner.max_jobs) are taken", code="too_many_jobs"
            )
        if needed > free:
            raise Refused(
                f"the job needs {needed / 2**20:.2f} MiB, {free / 2**20:.2f} MiB are free "
                "(--miner.memory_limit)",
                code="no_memory",
            )

    async def _release(self, request: web.Request) -> web.Response:
        validator = await self._require_validator(request)
        job = self._job(request)
        if job.grant.validator != validator:
            raise Refused("the job is another validator's", code="not_yours", status=403)
        job.close("the validator released the job")
        return json_response(Accepted(job=job.grant.job))

    async def _renew(self, request: web.Request) -> web.Response:
        job = self._job(request)
        self._rank(request, job)
        signed = decode_message(SignedGrant, request[BODY])
        grant = self._read_grant(signed, job.grant.validator)
        if grant.job != job.grant.job:
            raise BadMessage("the renewed grant is another job's")
        job.renew(grant)
        return json_response(Accepted(job=grant.job))

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        rank = self._rank(request, job)
        if not is_upgrade(request):
            raise Refused("a stream needs Upgrade: mapreduce/1", code="not_an_upgrade", status=426)
        await job.serve(request, rank)
        raise AssertionError("serve ends with an exception")

    def _job(self, request: web.Request) -> MinerJob:
        job = self.jobs.get(request.match_info["job"])
        if job is None:
            raise Refused("this miner has no such job", code="no_such_job", status=404)
        return job

    @staticmethod
    def _rank(request: web.Request, job: MinerJob) -> int:
        rank = job.rank_of(request[CALLER].address)
        if rank is None:
            raise Refused("the job has no such peer", code="not_in_job", status=403)
        return rank

    def _ended(self, job: MinerJob) -> None:
        self.jobs.pop(job.grant.job, None)
        _log.info(
            "job ended",
            extra={
                "job": job.grant.job[:8],
                "steps": job.session.committed_steps,
                "bytes": job.session.reduced_bytes,
            },
        )

    async def _shutdown(self, _: web.Application) -> None:
        self._closing = True
        for job in tuple(self.jobs.values()):
            job.close("the miner is shutting down")


async def add_miner(neuron: Neuron, config: MinerConfig, app: web.Application) -> None:
    """A miner's routes on `app`. Raises LocalError if this machine cannot reduce exactly."""
    check_subnormals()
    started_at = psutil.Process().create_time()
    miner = Miner(
        neuron.key,
        neuron.directory,
        max_jobs=config.max_jobs,
        memory_limit_bytes=config.memory_limit_bytes,
        started_at=started_at,
    )
    # No job could be accepted before; most of it has passed with imports and the chain.
    await asyncio.sleep(max(0.0, started_at + MAX_GRANT_AHEAD_S - time.time()))
    miner.add_routes(app)
    neuron.duties.append(miner)
    SpeedTests(
        miner._require_validator,
        lambda: len(miner.jobs),
        enabled=config.speedtest,
        mini=config.speedtest_mini,
    ).add_routes(app)


async def run_miner(config: MinerConfig) -> None:
    """Serves as a miner until it is told to stop.

    Raises LocalError or Unavailable if it cannot start.
    """
    async with Neuron.open(config.chain, config.wallet, "miner") as neuron:
        uid = await neuron.require_uid()
        app = make_app(Verifier(neuron.hotkey), neuron.not_ready)
        await add_miner(neuron, config, app)
        await neuron.serve(app, config.axon, uid)
