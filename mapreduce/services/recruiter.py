"""Finds the miners of a job: asks who has room, offers, and replaces whoever refuses.

Knows the control routes of miners, the ban list and what the last scores say. Does not know who the
job is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mapreduce.errors import MapReduceError, Refused
from mapreduce.net.client import Remote, call
from mapreduce.wire.messages import Accepted, MinerAddress, MinerStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import aiohttp
    from bittensor.sp_core import Keypair

    from mapreduce.services.neuron import Directory
    from mapreduce.wire.messages import SignedGrant

STATUS_TIMEOUT_S = 3.0
OFFER_TIMEOUT_S = 5.0
OFFER_ROUNDS = 4
FRESH_METAGRAPH_S = 2.0
# What a miner says that works for others, or will in a minute.
NO_ROOM = frozenset({"too_many_jobs", "no_memory", "draining"})
_RANDOM = random.SystemRandom()
EXPLORATION = 0.05  # share of the choice that the scores do not decide: newcomers get work too


@dataclass(slots=True)
class Chosen:
    """The miners of a job that were chosen before its ranks join. `refused` says by hotkey why a
    miner is not in the grant, `busy` names those that had no room; `job` is that grant's, empty
    before."""

    miners: list[MinerAddress]
    refused: dict[str, str] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)
    job: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a job needs: `miner_count` None is one miner per peer, or as many as there are."""

    peer_count: int
    miner_count: int | None
    miner_bytes: int


class Recruiter:
    """Miners of one subnet, as a validator's `key` may ask them. `banned` gives the hotkeys that
    get no job, with the id of a proof; `mines`: the validator's own hotkey serves as a miner too.
    `weights` by hotkey, from the last scores, say who is chosen how often."""

    def __init__(
        self,
        key: Keypair,
        directory: Directory,
        http: aiohttp.ClientSession,
        banned: Callable[[], Mapping[str, str]],
        *,
        mines: bool = False,
    ) -> None:
        self.weights: Mapping[str, float] = {}
        self._key = key
        self._directory = directory
        self._http = http
        self.banned = banned
        self._mines = mines

    async def served(self, max_age_s: float = FRESH_METAGRAPH_S) -> list[MinerAddress]:
        """Everybody who has published an axon and may be a miner, as the chain said lately."""
        metagraph = await self._directory.metagraph(max_age_s)
        own = self._key.ss58_address
        return [
            MinerAddress(uid=n.uid, hotkey=n.hotkey, ip=n.ip, port=n.port)
            for n in metagraph.neurons
            if n.ip is not None and n.port and (self._mines or n.hotkey != own)
        ]

    async def status(self, miner: MinerAddress) -> MinerStatus | MapReduceError:
        """What a miner has room for, or why it does not say."""
        try:
            return await call(
                self._http,
                self._key,
                _remote(miner),
                "GET",
                "/v1/status",
                None,
                MinerStatus,
                timeout_s=STATUS_TIMEOUT_S,
            )
        except MapReduceError as error:
            return error

    async def recruit(
        self,
        wanted: Wanted,
        make_grant: Callable[[list[MinerAddress]], tuple[str, SignedGrant]],
        chosen: Chosen | None = None,
    ) -> tuple[str, SignedGrant, list[MinerAddress]]:
        """A job's id and grant, and its miners, who have all accepted it: whoever refuses is
        replaced, or left out where the miners are `chosen`. Raises Refused if they are too few."""
        refused = {} if chosen is None else chosen.refused
        # Of chosen miners each may refuse in turn, and none of the others shall suffer.
        rounds = OFFER_ROUNDS if chosen is None else max(OFFER_ROUNDS, len(chosen.miners))
        for attempt in range(rounds):
            if attempt:
                await asyncio.sleep(random.uniform(0.05, 0.2))  # others may be offering too
            if chosen is None:
                miners = await self._pick(wanted, refused)
            else:
                miners = [miner for miner in chosen.miners if miner.hotkey not in refused]
            if not miners:
                break
            job, signed = make_grant(miners)
            answers = await asyncio.gather(*(self._offer(miner, signed) for miner in miners))
            if not any(answers):
                return job, signed, miners
            accepted = [m for m, reason in zip(miners, answers, strict=True) if reason is None]
            await asyncio.gather(*(self._release(miner, job) for miner in accepted))
            for miner, reason in zip(miners, answers, strict=True):
                if reason is None:
                    continue
                refused[miner.hotkey] = f"uid {miner.uid}: {reason}"
                if chosen is not None and getattr(reason, "code", "") in NO_ROOM:
                    chosen.busy.add(miner.hotkey)
        raise _too_few(wanted.miner_count or 1, 0, list(refused.values()))

    async def _pick(self, wanted: Wanted, refused: Mapping[str, str]) -> list[MinerAddress]:
        """As many miners with room as the job wants, by chance. Raises Refused if they are too
        few."""
        try:
            return await self._pick_from(await self.served(), wanted, refused)
        except Refused:
            served = await self.served(max_age_s=0.0)  # some may just have come
        return await self._pick_from(served, wanted, refused)

    async def _pick_from(
        self, served: list[MinerAddress], wanted: Wanted, refused: Mapping[str, str]
    ) -> list[MinerAddress]:
        banned = self.banned()
        candidates = [miner for miner in served if miner.hotkey not in refused]
        reasons = list(refused.values())
        reasons += [
            f"uid {miner.uid}: proven to have lied (proof {banned[miner.hotkey]})"
            for miner in candidates
            if miner.hotkey in banned
        ]
        candidates = [miner for miner in candidates if miner.hotkey not in banned]
        statuses = await asyncio.gather(*(self.status(miner) for miner in candidates))
        able: list[tuple[MinerAddress, MinerStatus]] = []
        for miner, status in zip(candidates, statuses, strict=True):
            reason = _unable(status, wanted.miner_bytes)
            if reason is None:
                assert isinstance(status, MinerStatus)
                able.append((miner, status))
            else:
                reasons.append(f"uid {miner.uid}: {reason}")
        count = wanted.miner_count or min(wanted.peer_count, max(1, len(able)))
        if len(able) < count:
            raise _too_few(count, len(able), reasons)
        # The keys of Efraimidis and Spirakis (2006) draw without replacement, each miner in
        # proportion to its weight: nobody can arrange to meet a certain peer.
        chances = self._chances([miner for miner, _ in able])
        keys = {
            miner.hotkey: _RANDOM.expovariate(chance / (1 + status.jobs))
            for (miner, status), chance in zip(able, chances, strict=True)
        }
        return sorted((miner for miner, _ in able), key=lambda miner: keys[miner.hotkey])[:count]

    def _chances(self, able: list[MinerAddress]) -> list[float]:
        """How often each of these miners is chosen, relative to the others."""
        weights = [self.weights.get(miner.hotkey, 0.0) for miner in able]
        total = sum(weights)
        if not total > 0:
            return [1.0] * len(able)
        return [(1 - EXPLORATION) * w / total + EXPLORATION / len(able) for w in weights]

    async def _offer(self, miner: MinerAddress, signed: SignedGrant) -> MapReduceError | None:
        """Why the miner refuses, None if it accepts."""
        try:
            await call(
                self._http,
                self._key,
                _remote(miner),
                "POST",
                "/v1/jobs",
                signed,
                Accepted,
                timeout_s=OFFER_TIMEOUT_S,
            )
        except MapReduceError as error:
            return error
        return None

    async def _release(self, miner: MinerAddress, job: str) -> None:
        with contextlib.suppress(MapReduceError):  # an unused reservation expires by itself
            await call(
                self._http,
                self._key,
                _remote(miner),
                "DELETE",
                f"/v1/jobs/{job}",
                None,
                Accepted,
                timeout_s=OFFER_TIMEOUT_S,
            )


def _remote(miner: MinerAddress) -> Remote:
    return Remote(f"miner uid {miner.uid}", miner.hotkey, miner.ip, miner.port)


def _unable(status: MinerStatus | MapReduceError, needed_bytes: int) -> str | None:
    """Why a miner cannot take a job, None if it can."""
    if isinstance(status, MapReduceError):
        return str(status)
    if status.draining:
        return "it takes no jobs yet: it is starting, or will be updated"
    if status.jobs >= status.max_jobs:
        return f"all {status.max_jobs} jobs are taken"
    if status.memory_free_bytes < needed_bytes:
        free, needed = status.memory_free_bytes / 2**20, needed_bytes / 2**20
        return f"{free:.2f} MiB free of {needed:.2f} needed"
    return None


def _too_few(needed: int, found: int, reasons: list[str]) -> Refused:
    why = f"; not available: {'; '.join(reasons[:8])}" if reasons else ""
    return Refused(
        f"{needed} miner{'s are' if needed > 1 else ' is'} needed, {found} can take the job{why}",
        code="too_few_miners",
        status=503,
    )
