"""A subnet in one event loop: real servers on loopback, real keys, no chain.

`async with Fleet(miners=3) as fleet:` gives N miners and a coordinator; peers join it with
`fleet.open_jobs(...)`. The directory, which says who is registered, is the only fake.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from bittensor.sp_core import CRYPTO_SR25519, Keypair

from mapreduce import __version__
from mapreduce.chain.metagraph import Metagraph, Neuron
from mapreduce.core.dtypes import dtype_from_numpy
from mapreduce.core.reduce import ReduceOp
from mapreduce.core.scoring import ScoringConfig
from mapreduce.net.auth import Verifier, new_session_key, sign_request
from mapreduce.net.client import Remote, make_http_session
from mapreduce.net.listener import listen
from mapreduce.net.server import VERSION_HEADER, make_app, start_server
from mapreduce.services.auditor import Auditor
from mapreduce.services.benchmarks import BenchmarkLimits, Benchmarks
from mapreduce.services.bot import Bot
from mapreduce.services.coordinator import Coordinator, Limits
from mapreduce.services.dial import DialBack
from mapreduce.services.grants import MAX_GRANT_AHEAD_S, sign_grant
from mapreduce.services.joining import open_job
from mapreduce.services.miner import Miner
from mapreduce.services.organic import Organic
from mapreduce.services.recruiter import Recruiter
from mapreduce.services.rounds import Rounds
from mapreduce.store.database import Database
from mapreduce.store.history import History
from mapreduce.store.ledger import Ledger
from mapreduce.wire.bodies import TensorSpec
from mapreduce.wire.messages import Grant, MinerAddress, SignedGrant, encode_message
from mapreduce.wire.peer_step import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiohttp import web

    from mapreduce.services.peer_job import PeerJob

NETUID = 10
DEADLINE_S = 20.0
KIB = 1024


def new_hotkey() -> Keypair:
    return Keypair.create_from_seed(os.urandom(32), crypto_type=CRYPTO_SR25519)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a coroutine as a test of its own loop, within a deadline."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), DEADLINE_S))

    return run


async def until(condition: Callable[[], object], what: str, within_s: float = 5.0) -> None:
    """Polls until the condition holds; fails naming what did not happen."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        await asyncio.sleep(0.01)


class Directory:
    """Who is registered where, as a test says it is."""

    def __init__(self) -> None:
        self.neurons: list[Neuron] = []

    def add(self, hotkey: str, port: int | None = None, *, permit: bool = False) -> int:
        uid = len(self.neurons)
        ip = None if port is None else "127.0.0.1"
        self.neurons.append(Neuron(uid, hotkey, hotkey, ip, port, 0.0, permit))
        return uid

    async def metagraph(self, max_age_s: float = 0.0) -> Metagraph:
        return Metagraph(NETUID, 1, tuple(self.neurons))

    async def is_validator(self, hotkey: str) -> bool:
        return any(n.hotkey == hotkey and n.validator_permit for n in self.neurons)


class MinerNode:
    """A miner and its server."""

    def __init__(
        self, key: Keypair, uid: int, miner: Miner, runner: web.AppRunner, port: int
    ) -> None:
        self.key = key
        self.uid = uid
        self.miner = miner
        self.runner = runner
        self.remote = Remote(f"miner uid {uid}", key.ss58_address, "127.0.0.1", port)
        self.address = MinerAddress(uid=uid, hotkey=key.ss58_address, ip="127.0.0.1", port=port)


class Fleet:
    """N miners and a coordinator on free ports of loopback."""

    def __init__(
        self,
        miners: int = 2,
        *,
        max_jobs: int = 8,
        memory_limit_bytes: int = 1 << 30,
        window_bytes: int = 256 * KIB,
        frame_bytes: int = 64 * KIB,
        join_timeout_s: float = 10.0,
        audit_budget: float = 0.01,
    ) -> None:
        self.miner_count = miners
        self.directory = Directory()
        self.miners: list[MinerNode] = []
        self.validator_key = new_hotkey()
        self.peer_key = new_hotkey()
        self.limits = Limits(
            window_bytes=window_bytes,
            frame_bytes=frame_bytes,
            join_timeout_s=join_timeout_s,
            audit_budget=audit_budget,
        )
        self.jobs: list[PeerJob] = []
        self.bots: dict[str, asyncio.Task[None]] = {}
        self.not_ready: str | None = None
        self._max_jobs = max_jobs
        self._memory_limit_bytes = memory_limit_bytes
        self._runner: web.AppRunner | None = None
        self._files = tempfile.TemporaryDirectory()

    async def __aenter__(self) -> Self:
        self.http = make_http_session()
        self.database = Database.open(Path(self._files.name) / "state.sqlite")
        self.ledger, self.history = Ledger(self.database), History(self.database)
        self.directory.add(self.validator_key.ss58_address, permit=True)
        await self.start_coordinator()
        for _ in range(self.miner_count):
            await self.add_miner()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.gather(*(self.stop_bot(hotkey) for hotkey in self.bots))
        await asyncio.gather(*(job.close() for job in self.jobs))
        await self.stop_coordinator()
        await asyncio.gather(*(node.runner.cleanup() for node in self.miners))
        await self.http.close()
        self.database.close()
        self._files.cleanup()

    # Neurons ------------------------------------------------------------------------------------

    async def start_coordinator(self, port: int = 0) -> None:
        """A coordinator that remembers nothing, with this fleet's key."""
        key = self.validator_key
        config = ScoringConfig()
        self.organic = Organic(self.history, self.bots, config)
        self.auditor = Auditor(self.ledger, self.history, self.organic, config.ban_s)
        self.recruiter = Recruiter(key, self.directory, self.http, self.auditor.banned)
        self.coordinator = Coordinator(key, NETUID, self.recruiter, self.limits, self.auditor)
        self.benchmarks = Benchmarks(
            self.coordinator,
            BenchmarkLimits(
                bots=frozenset(self.bots),
                max_bytes_per_s=100e6,
                bytes_per_day=10**15,
                seconds=0.2,
            ),
            config,
        )
        self.rounds = Rounds(self.benchmarks, self.recruiter, self.directory, self.history, config)
        app = make_app(Verifier(key.ss58_address), lambda: self.not_ready)
        self.dial_back = DialBack(key, self.directory, self.http)
        for part in (self.coordinator, self.auditor, self.benchmarks, self.dial_back):
            part.add_routes(app)
        self._runner = await start_server(app, listen("127.0.0.1", port))
        self.validator = Remote(
            "validator uid 0", key.ss58_address, "127.0.0.1", self._runner.addresses[0][1]
        )

    async def stop_coordinator(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def add_miner(self, **options: int) -> MinerNode:
        key = new_hotkey()
        limits = {"max_jobs": self._max_jobs, "memory_limit_bytes": self._memory_limit_bytes}
        started_at = time.time() - MAX_GRANT_AHEAD_S  # it takes jobs at once
        miner = Miner(key, self.directory, started_at=started_at, **(limits | options))
        app = make_app(Verifier(key.ss58_address), lambda: None)
        miner.add_routes(app)
        runner = await start_server(app, listen("127.0.0.1", 0))
        port = runner.addresses[0][1]
        uid = self.directory.add(key.ss58_address, port)
        self.miners.append(MinerNode(key, uid, miner, runner, port))
        return self.miners[-1]

    async def add_bots(self, count: int) -> None:
        """Bots that know this fleet's validator; it has to be started again to know them."""
        for _ in range(count):
            key = new_hotkey()

            async def find() -> Remote:
                return self.validator

            task = asyncio.create_task(Bot(key, find, self.http, Path(self._files.name)).run())
            self.bots[key.ss58_address] = task
        port = self.validator.port
        await self.stop_coordinator()
        await self.start_coordinator(port)

    async def stop_bot(self, hotkey: str) -> None:
        self.bots[hotkey].cancel()
        await asyncio.wait([self.bots[hotkey]])

    def connections(self) -> list[object]:
        """What aiohttp's table of the first miner holds."""
        server = self.miners[0].runner.server
        assert server is not None
        return list(server.connections)

    # Jobs ---------------------------------------------------------------------------------------

    def open_job(self, rank: int, peer_count: int, **options: Any) -> Coroutine[Any, Any, PeerJob]:
        proofs = Path(self._files.name) / "proofs"
        options = {
            "bandwidth": 64 << 20,
            "join_timeout_s": 10.0,
            "proof_directory": proofs,
        } | options
        hotkey = options.pop("hotkey", self.peer_key)
        return open_job(hotkey, self.validator, rank=rank, peer_count=peer_count, **options)

    async def open_jobs(self, peer_count: int, **options: Any) -> list[PeerJob]:
        """One open job per rank; closed with the fleet."""
        jobs = await asyncio.gather(
            *(self.open_job(rank, peer_count, **options) for rank in range(peer_count))
        )
        self.jobs += jobs
        return list(jobs)

    def grant(self, sessions: list[Keypair], miners: list[MinerNode], **changes: Any) -> Grant:
        """A grant as this fleet's validator would make it."""
        now = time.time()
        fields: dict[str, Any] = {
            "version": __version__,
            "job": os.urandom(16).hex(),
            "netuid": NETUID,
            "validator": self.validator_key.ss58_address,
            "created_at": now,
            "expires_at": now + 60.0,
            "bandwidth": 64 << 20,
            "window_bytes": self.limits.window_bytes,
            "frame_bytes": self.limits.frame_bytes,
            "session_keys": [key.ss58_address for key in sessions],
            "miners": [node.address for node in miners],
            "audit_budget": 0.01,
        }
        return Grant(**(fields | changes))

    def sign(self, grant: Grant, key: Keypair | None = None) -> SignedGrant:
        return sign_grant(key or self.validator_key, grant)

    async def offer(self, peer_count: int = 1, miner: int = 0) -> tuple[str, list[Keypair]]:
        """Makes a miner accept a job; returns its id and the session keys of its ranks."""
        keys = [new_session_key() for _ in range(peer_count)]
        grant = self.grant(keys, [self.miners[miner]])
        status, answer = await self.request(
            self.validator_key, self.miners[miner].remote, "POST", "/v1/jobs", self.sign(grant)
        )
        assert status == 200, answer
        return grant.job, keys

    # Requests -----------------------------------------------------------------------------------

    async def request(
        self,
        key: Keypair | None,
        remote: Remote,
        method: str,
        path: str,
        message: object = None,
        *,
        headers: dict[str, str] | None = None,
        version: str = __version__,
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of one request; `message` may be bytes. `headers` replace the signed."""
        body = message if isinstance(message, bytes) else b""
        if message is not None and not isinstance(message, bytes):
            body = encode_message(message)
        signed: dict[str, str] = {}
        if key is not None:
            signed = sign_request(key, method=method, path=path, body=body, receiver=remote.hotkey)
        sent = {VERSION_HEADER: version} | signed | (headers or {})
        async with self.http.request(method, remote.url(path), data=body, headers=sent) as answer:
            return answer.status, json.loads(await answer.read())

    async def refusal(self, *args: Any, **kwargs: Any) -> tuple[int, str, str]:
        """Status, code and text of a request that is refused."""
        status, answer = await self.request(*args, **kwargs)
        assert status != 200, answer
        return status, answer["error"]["code"], answer["error"]["message"]


async def all_reduce(
    job: PeerJob, tensor: np.ndarray, op: ReduceOp = ReduceOp.SUM, **deadlines: Any
) -> np.ndarray:
    """One all-reduce as `Peer` would run it; returns the result."""
    result = np.zeros(tensor.nbytes, dtype=np.uint8)
    source = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    await job.collective(
        op,
        tensor=TensorSpec(dtype=dtype_from_numpy(tensor.dtype), shape=tensor.shape),
        source=source,
        allocate=lambda nbytes: Target(result[:nbytes].data),
        **({"enter_timeout_s": 10.0} | deadlines),
    )
    return result.view(tensor.dtype).reshape(tensor.shape)


async def all_reduce_everywhere(jobs: list[PeerJob], tensors: list[np.ndarray]) -> None:
    """One step of a sum; every rank must end with the same, exact bytes."""
    results = await asyncio.gather(
        *(all_reduce(job, tensor) for job, tensor in zip(jobs, tensors, strict=True))
    )
    expected = np.zeros_like(tensors[0])
    for tensor in tensors:
        expected += tensor
    for result in results:
        np.testing.assert_array_equal(result, expected)


def integers(rank: int, count: int) -> np.ndarray:
    """Float32 integers, different on every rank, whose sums are exact."""
    values = np.random.default_rng(rank).integers(-1000, 1000, count)
    return values.astype(np.float32)


def tensors(jobs: list[PeerJob], count: int) -> list[np.ndarray]:
    return [integers(job.rank, count) for job in jobs]


async def errors_of(jobs: list[PeerJob], count: int = 400_000) -> list[Any]:
    return await asyncio.gather(
        *(all_reduce(job, integers(job.rank, count)) for job in jobs), return_exceptions=True
    )
