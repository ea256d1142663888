"""The chain and the wallets of a local subnet: an embedded chain with every neuron registered.

Knows what the chain must hold before the first neuron starts; knows nothing of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NETUID: Final = 10
WALLET: Final = "local"
CHAIN_FILE: Final = "chain.sqlite"
WALLETS: Final = "wallets"
VALIDATOR_STAKE_TAO: Final = 1000.0
PERMIT_SLACK_S: Final = 10.0  # beyond the epoch that grants it


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainTerms:
    """How the chain of a local subnet is made; the arguments of `create_chain`."""

    block_time_s: float
    strict: bool
    tempo: int

    @property
    def permit_timeout_s(self) -> float:
        """In what time the validator must have its permit: a strict chain grants it at epochs."""
        return (self.tempo + 1) * self.block_time_s + PERMIT_SLACK_S


def network_of(directory: Path) -> str:
    """What to give as `--subtensor.network`."""
    return f"embedded:{directory / CHAIN_FILE}"


async def prepare_chain(
    directory: Path, terms: ChainTerms, neurons: Mapping[str, str], others: Sequence[str]
) -> tuple[list[int], list[str]]:
    """Makes the chain, a registered hotkey per entry of `neurons` (its name, and that of its
    wallet) and a hotkey per name of `others`, who are not registered.

    The first neuron is the validator: it is staked on, and before the first epoch, so that a strict
    chain gives it its permit there.

    Returns the uids, and the hotkeys of the others.
    """
    # Imported late: they load the SDK, which importing `mapreduce.local` must not.
    from mapreduce.chain import open_chain
    from mapreduce.chain.actions import add_stake, register_hotkey
    from mapreduce.chain.embedded import create_chain
    from mapreduce.chain.wallets import create_wallet

    wallets = str(directory / WALLETS)
    create_chain(
        directory / CHAIN_FILE,
        block_time_s=terms.block_time_s,
        strict=terms.strict,
        tempo=terms.tempo,
    )
    strangers = [create_wallet(wallets, WALLET, name).hotkey.ss58_address for name in others]
    uids: list[int] = []
    async with open_chain(network_of(directory)) as client:
        for name, wallet_name in neurons.items():
            wallet = create_wallet(wallets, wallet_name, name)
            uids.append(await register_hotkey(client, wallet, NETUID))
            if len(uids) == 1:
                await add_stake(client, wallet, NETUID, VALIDATOR_STAKE_TAO)
    return uids, strangers
