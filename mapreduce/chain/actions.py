"""What an operator does once: register a hotkey, stake on it. Knows the SDK's intents and their
failures; knows nothing of which kind of chain carries them out.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

import bittensor as bt

from mapreduce.chain.metagraph import RETRIES, fetch_metagraph
from mapreduce.chain.seam import require_success, writing
from mapreduce.errors import Refused

if TYPE_CHECKING:
    from mapreduce.chain.wallets import Keys

# The SDK itself does not retry what it shields.
_ATTEMPTS: Final = 8
# Outcomes that say "somebody else was faster", not "you may not".
_LOST_RACES: Final = ("Stale", "Future", "AncientBirthBlock", "Usurped")


async def register_hotkey(client: bt.Client, wallet: Keys, netuid: int) -> int:
    """Register the wallet's hotkey, paid by its coldkey; returns the uid.

    Raises:
        Refused: the chain refuses, or the hotkey is registered already (the message names its uid).
        ConfigError: there is no such subnet.
        ChainUnavailable: no answer.
    """
    hotkey = wallet.hotkey.ss58_address
    what = f"registering {hotkey} on netuid {netuid}"
    neuron = (await fetch_metagraph(client, netuid)).by_hotkey(hotkey)
    if neuron is not None:
        raise Refused(
            f"the hotkey {hotkey} is already registered on netuid {netuid} as uid {neuron.uid}",
            code=bt.ErrorCode.ALREADY_EXISTS.value,
        )
    with writing(client, what):
        for _ in range(_ATTEMPTS):
            result = await _burned_register(client, wallet, netuid)
            if result.error is None or result.error.name not in _LOST_RACES:
                break
            await asyncio.sleep(random.uniform(0.1, 1.0) * await client.block_time())
        await _require_success(client, wallet, result, what)
        uid = await client.neurons.uid(hotkey, netuid)
    if uid is None:  # evicted again by a flood of registrations
        raise Refused(f"{what}: registered, but the uid went to another hotkey", code="not_found")
    return int(uid)


async def _burned_register(client: bt.Client, wallet: Keys, netuid: int) -> bt.ExtrinsicResult:
    hotkey = wallet.hotkey.ss58_address
    # Keys instead of the wallet: unlocking a coldkey takes seconds, and it is unlocked already.
    try:
        intent = bt.BurnedRegister(netuid=netuid, hotkey_ss58=hotkey)
        return await client.execute(intent, wallet.coldkey)
    except bt.ChainError as error:
        # A local node older than the shield has no key to encrypt to; the SDK offers no plain way.
        if "NextKey" not in error.message:
            raise
        call = bt.calls.SubtensorModule.burned_register(netuid=netuid, hotkey=hotkey)
        return await client.submit_call(call, wallet.coldkey)


async def add_stake(client: bt.Client, wallet: Keys, netuid: int, tao: float) -> None:
    """Stake TAO of the coldkey on the hotkey.

    Raises:
        Refused: the chain refuses: too little money, a hotkey it does not know, ...
        ConfigError: there is no such subnet.
        ChainUnavailable: no answer.
    """
    hotkey = wallet.hotkey.ss58_address
    await fetch_metagraph(client, netuid)  # for the error that names an unknown netuid
    what = f"staking {tao:g} TAO on {hotkey}, netuid {netuid}"
    with writing(client, what):
        intent = bt.AddStake(hotkey_ss58=hotkey, netuid=netuid, amount_tao=bt.tao(tao))
        result = await client.execute(intent, wallet.coldkey, retries=RETRIES)
        await _require_success(client, wallet, result, what)


async def _require_success(
    client: bt.Client, wallet: Keys, result: bt.ExtrinsicResult, what: str
) -> None:
    """As the seam's, but where money is missing it says how much there is."""
    if result.error is not None and result.error.code is bt.ErrorCode.INSUFFICIENT_BALANCE:
        coldkey = wallet.coldkey.ss58_address
        held = await client.balances.get(coldkey)
        raise Refused(
            f"{what}: insufficient balance ({result.error.name}): the coldkey {coldkey} holds "
            f"{held.tao:g} TAO",
            code=result.error.code.value,
        )
    require_success(result, what)
