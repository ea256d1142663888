"""How a peer comes into a job: asks its validator, checks the grant, opens the streams.

Knows what a validator's refusals mean to a peer; what a job then does is in `peer_job.py`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from mapreduce.chain.metagraph import fetch_metagraph
from mapreduce.chain.seam import connected
from mapreduce.errors import (
    BadMessage,
    ConfigError,
    JobRefused,
    MapReduceError,
    Refused,
    Unavailable,
    ValidatorUnreachable,
    VersionMismatch,
)
from mapreduce.net.auth import new_session_key, signer
from mapreduce.net.client import Remote, call, make_http_session
from mapreduce.services.grants import read_grant
from mapreduce.services.peer_job import PROOF_DIRECTORY, PeerJob
from mapreduce.wire.messages import JoinRequest, SignedGrant
from mapreduce.wire.statements import session_key_statement

if TYPE_CHECKING:
    from pathlib import Path

    import aiohttp
    from bittensor.sp_core import Keypair

    from mapreduce.net.pacing import Pacer

GRANTING_S = 30.0  # finding miners comes on top of waiting for ranks
AGAIN_S = 0.5


async def find_validator(
    network: str, netuid: int, uid: int, *, endpoint: str | None = None
) -> Remote:
    """Where the validator with this uid listens, as the chain says.

    Raises as `find_neuron` does, with ValidatorUnreachable if it has not served an axon.
    """
    try:
        return await find_neuron("validator", network, netuid, uid, endpoint=endpoint)
    except NotServed as error:
        raise ValidatorUnreachable(str(error)) from None


class NotServed(Unavailable):
    """A neuron has no axon on the chain."""


async def find_neuron(
    role: str, network: str, netuid: int, uid: int, *, endpoint: str | None = None
) -> Remote:
    """Where the neuron with this uid listens, as the chain says; `role` is what messages call it.

    Raises:
        ConfigError: an unknown network, netuid or uid.
        ChainUnavailable: the chain does not answer.
        NotServed: it has not served an axon.
    """
    async with connected(network, endpoint) as client:
        metagraph = await fetch_metagraph(client, netuid)
    neuron = metagraph.by_uid(uid)
    if neuron is None:
        raise ConfigError(
            f"{role}_uid = {uid}: netuid {netuid} has no such uid (it has {len(metagraph.neurons)})"
        )
    if neuron.ip is None or neuron.port is None:
        raise NotServed(
            f"{role} uid {neuron.uid} ({neuron.hotkey}) has not served an axon: "
            "it is not running, or never was"
        )
    return Remote(f"{role} uid {neuron.uid}", neuron.hotkey, neuron.ip, neuron.port)


async def open_job(
    hotkey: Keypair,
    validator: Remote,
    *,
    rank: int,
    peer_count: int,
    bandwidth: int,
    miner_count: int | None = None,
    job: str = "",
    audit: bool = True,
    proof_directory: Path = PROOF_DIRECTORY,
    join_timeout_s: float = 60.0,
    pacer: Pacer | None = None,
) -> PeerJob:
    """Joins a job as `rank` (index from 0) and opens its streams. `audit`: the validator may see
    samples of the data; proofs of lies go to files in `proof_directory`; `pacer` bounds the rate at
    which this peer uploads.

    Raises:
        ValidatorUnreachable: nobody answers at the validator's axon.
        JobRefused: ranks are missing, taken or disagree, or there are too few miners.
        VersionMismatch: the validator or a miner speaks another major version.
        Unavailable: a miner cannot be reached.
    """
    key = new_session_key()
    request = JoinRequest(
        rank=rank,
        peer_count=peer_count,
        bandwidth=bandwidth,
        miner_count=miner_count,
        session_key=key.ss58_address,
        delegation=signer(hotkey)(session_key_statement(validator.hotkey, key.ss58_address)).hex(),
        audit=audit,
        job=job,
        timeout_s=join_timeout_s,
    )
    http = make_http_session()
    try:
        signed = await _join(http, hotkey, validator, request)
        grant = read_grant(signed, validator.hotkey)
        if rank >= len(grant.session_keys) or grant.session_keys[rank] != key.ss58_address:
            raise BadMessage("the grant does not name this peer at its rank", who=str(validator))
        peer_job = PeerJob(
            http,
            validator,
            key,
            signed,
            grant,
            rank,
            audit=audit,
            proof_directory=proof_directory,
            pacer=pacer,
        )
        try:
            await peer_job.connect()
        except BaseExceptionGroup as errors:
            await peer_job.close("could not reach every miner")
            first = next((e for e in errors.exceptions if isinstance(e, MapReduceError)), None)
            if first is None:
                raise
            raise first from None
        return peer_job
    except BaseException:
        await http.close()
        raise


async def _join(
    http: aiohttp.ClientSession, hotkey: Keypair, validator: Remote, request: JoinRequest
) -> SignedGrant:
    """The grant. A validator that is just being started again is waited for, within the request's
    time. Raises as `open_job` does."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + request.timeout_s
    closing = False
    while True:
        left_s = max(deadline - loop.time(), AGAIN_S)
        wanted = replace(request, timeout_s=min(left_s, request.timeout_s))
        try:
            return await call(
                http,
                hotkey,
                validator,
                "POST",
                "/v1/join",
                wanted,
                SignedGrant,
                timeout_s=left_s + GRANTING_S,
            )
        except VersionMismatch:
            raise
        except Refused as error:
            if error.code != "closing" or loop.time() >= deadline:
                raise JobRefused(str(error), code=error.code, status=error.status) from None
            closing = True
        except Unavailable as error:
            if not closing or loop.time() >= deadline:
                raise ValidatorUnreachable(str(error)) from None
        await asyncio.sleep(AGAIN_S)
