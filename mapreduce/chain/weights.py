"""A validator's weights: when they may be set, setting them, reading them back.

Knows the SDK's intent, its two ways to fail and the limits that a subnet puts on weights; knows
nothing of how weights are found, nor of which kind of chain takes them.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import bittensor as bt
from bittensor.intents.weights import clip_to_max_weight

from mapreduce.chain.metagraph import RETRIES
from mapreduce.chain.seam import reading, require_success, writing
from mapreduce.errors import InvalidArgument, NotRegistered

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bittensor.sp_core import Keypair

SET_TIMEOUT_S: Final = 120.0
"""Ten blocks of finney: one attempt that is lost and retried still fits."""

_U16_MAX: Final = 2**16 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsClock:
    """What decides when a validator may set weights, read at one block."""

    netuid: int
    uid: int
    block: int
    last_update_block: int
    """When it last set weights, on most chains also when it was registered; 0: never."""
    rate_limit_blocks: int
    tempo_blocks: int
    blocks_to_epoch: int | None
    """None for a subnet that has no epochs."""
    permit: bool
    """Whether it may set weights for others; the subnet's owner always may."""
    commit_reveal: bool
    min_allowed: int
    """How many miners must get a weight above zero."""
    block_time_s: float

    @property
    def wait_blocks(self) -> int:
        """Blocks until the rate limit allows the next weights; 0: now."""
        if self.last_update_block == 0:
            return 0
        return max(0, self.last_update_block + self.rate_limit_blocks - self.block)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsSet:
    """Weights that the chain has accepted; with `commit_reveal` nobody can read them yet."""

    block: int
    extrinsic_id: str
    commit_reveal: bool


async def read_weights_clock(client: bt.Client, netuid: int, uid: int) -> WeightsClock:
    """Read when this validator may set weights.

    Raises:
        NotRegistered: nobody holds the uid, or there is no such subnet.
        ChainUnavailable: no answer.
    """
    storage = bt.storage.SubtensorModule
    with reading(client, f"reading when uid {uid} may set weights on netuid {netuid}"):
        view = await client.at()
        (last_updates, permits, hotkey, owner, rate_limit, tempo) = await asyncio.gather(
            view.query(storage.LastUpdate, [netuid]),
            view.query(storage.ValidatorPermit, [netuid]),
            view.query(storage.Keys, [netuid, uid]),
            view.query(storage.SubnetOwnerHotkey, [netuid]),
            view.query(storage.WeightsSetRateLimit, [netuid]),
            view.query(storage.Tempo, [netuid]),
        )
        (blocks_to_epoch, commit_reveal, min_allowed, block_time_s) = await asyncio.gather(
            view.epochs.blocks_until_next_epoch(netuid),
            view.query(storage.CommitRevealWeightsEnabled, [netuid]),
            view.query(storage.MinAllowedWeights, [netuid]),
            client.block_time(),
        )
    if uid >= len(last_updates or []):
        raise NotRegistered(f"no hotkey holds uid {uid} on netuid {netuid}")
    return WeightsClock(
        netuid=netuid,
        uid=uid,
        block=view.block,
        last_update_block=int(last_updates[uid]),
        rate_limit_blocks=int(rate_limit or 0),
        tempo_blocks=int(tempo),
        blocks_to_epoch=blocks_to_epoch,
        permit=bool(permits[uid]) or hotkey == owner,
        commit_reveal=bool(commit_reveal),
        min_allowed=int(min_allowed or 0),
        block_time_s=block_time_s,
    )


async def set_weights(
    client: bt.Client,
    key: Keypair,
    netuid: int,
    weights: Mapping[int, float],
    *,
    version_key: int,
    timeout_s: float = SET_TIMEOUT_S,
) -> WeightsSet:
    """Set a validator's weights, in the open or committed, as the subnet demands.

    Args:
        client: an open client.
        key: the validator's hotkey.
        netuid: the subnet.
        weights: by uid, relative to one another; a zero is the same as none.
        version_key: what the subnet's `weights_version` is compared with.
        timeout_s: how long to wait for inclusion in a block.

    Raises:
        InvalidArgument: a weight is negative or not finite, a uid is none, or nothing is above 0.
        Refused: the chain refuses, before or after signing; `code` is the chain's `ErrorCode`.
        ChainUnavailable: no answer in time. The weights may still be set later: read the clock
            before trying again.
    """
    what = f"setting weights on netuid {netuid}"
    intent = _intent(netuid, weights, version_key)
    with writing(client, what):
        try:
            async with asyncio.timeout(timeout_s):
                result = await client.execute(
                    intent,
                    key,
                    policy=_policy(netuid),
                    retries=RETRIES,
                    wait_for_inclusion=True,
                    # Weights that a fork undoes are simply set again; finality takes a minute.
                    wait_for_finalization=False,
                )
        except TimeoutError as error:
            raise TimeoutError(
                f"not in a block within {timeout_s:g} s, but it may be yet"
            ) from error
        require_success(result, what)
        extrinsic_id = result.extrinsic_id or ""
        block = int(extrinsic_id.partition("-")[0]) if extrinsic_id else await client.block()
    return WeightsSet(
        block=block, extrinsic_id=extrinsic_id, commit_reveal="reveal_round" in result.data
    )


async def plan_weights(
    client: bt.Client,
    key: Keypair,
    netuid: int,
    weights: Mapping[int, float],
    *,
    version_key: int,
) -> dict[int, int]:
    """What `set_weights` would set, as the u16 per uid that the chain stores; nothing is submitted.

    Raises:
        InvalidArgument: as `set_weights`.
        Refused: the chain would refuse, as far as the SDK finds out before it signs: not
            registered, too soon, too few weights.
        ChainUnavailable: no answer.
    """
    intent = _intent(netuid, weights, version_key)
    with writing(client, f"planning weights on netuid {netuid}"):
        plan = await client.plan(intent, key, policy=_policy(netuid))
        if not plan.ok:
            raise bt.PolicyError(plan.violations)
        # A committed call is encrypted and a composed one opaque, so the SDK's own steps run again.
        limit = await client.query(("SubtensorModule", "MaxWeightsLimit"), [netuid])
        uids, shares = list(intent.uids), list(intent.weights)
        if int(limit) < _U16_MAX:
            shares = clip_to_max_weight(shares, int(limit) / _U16_MAX)
        return dict(zip(*bt.intents.normalize(uids, shares), strict=True))


async def read_weights(client: bt.Client, netuid: int, uid: int) -> dict[int, float]:
    """The weights that the chain holds for a validator, summing to 1; empty for none.

    Where weights are committed first, these are the last ones revealed.

    Raises:
        ChainUnavailable: no answer.
    """
    with reading(client, f"reading the weights of uid {uid} on netuid {netuid}"):
        row = await client.query(("SubtensorModule", "Weights"), [netuid, uid])
    stored = {int(dest): int(weight) for dest, weight in row or [] if weight}
    total = sum(stored.values())
    return {dest: weight / total for dest, weight in stored.items()}


def _intent(netuid: int, weights: Mapping[int, float], version_key: int) -> bt.SetWeights:
    for uid, weight in weights.items():
        if not 0 <= uid <= _U16_MAX:
            raise InvalidArgument(f"weights: {uid!r} is no uid")
        if not math.isfinite(weight) or weight < 0:
            raise InvalidArgument(f"weights: uid {uid} has {weight!r}; allowed is 0 or more")
    positive = {int(uid): float(weight) for uid, weight in weights.items() if weight > 0}
    if not positive:
        raise InvalidArgument("weights: none is above 0; setting them would say nothing")
    return bt.SetWeights(netuid=netuid, weights=positive, version_key=version_key)


def _policy(netuid: int) -> bt.Policy:
    """A validator's hotkey sets weights and spends nothing, whatever a later SDK would do."""
    return bt.Policy(max_spend_tao=0, allowed_netuids=[netuid])
