"""The subnet as the services see it: who is registered, where they listen, what they have staked
and earned.

Knows how to read it from any chain and to tell an operator how to register; knows nothing of which
kind of chain that is.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mapreduce.chain import is_embedded
from mapreduce.chain.seam import reading
from mapreduce.errors import ConfigError, NotRegistered

if TYPE_CHECKING:
    import bittensor as bt

RETRIES: Final = 3
"""How often the SDK submits again what lost a race for its nonce."""


@dataclass(frozen=True, slots=True)
class Neuron:
    """A registered hotkey. `ip` and `port` are None where it serves nothing.

    `stake_tao` is the stake that counts on the subnet, in its own token: alpha, plus TAO on root by
    weight.
    """

    uid: int
    hotkey: str
    coldkey: str
    ip: str | None
    port: int | None
    stake_tao: float
    validator_permit: bool
    incentive: float = 0.0
    """Its share of what miners earned in the last epoch; all of them sum to 1, or to 0."""
    dividends: float = 0.0
    """Its share of what validators earned in the last epoch."""
    last_update: int = 0
    """The block at which it last set weights, or was registered; 0: never."""
    registered_at_block: int = 0


@dataclass(frozen=True, slots=True)
class Metagraph:
    """A subnet at one block; `neurons` are in order of uid."""

    netuid: int
    block: int
    neurons: tuple[Neuron, ...]
    _by_hotkey: dict[str, Neuron] = field(init=False, repr=False, compare=False)
    _by_uid: dict[int, Neuron] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_hotkey", {n.hotkey: n for n in self.neurons})
        object.__setattr__(self, "_by_uid", {n.uid: n for n in self.neurons})

    def by_hotkey(self, hotkey: str) -> Neuron | None:
        """The neuron registered under a hotkey."""
        return self._by_hotkey.get(hotkey)

    def by_uid(self, uid: int) -> Neuron | None:
        """The neuron that holds a uid."""
        return self._by_uid.get(uid)


async def fetch_metagraph(client: bt.Client, netuid: int) -> Metagraph:
    """Read a subnet, in one call to the chain.

    Raises:
        ConfigError: there is no such subnet.
        ChainUnavailable: no answer.
    """
    with reading(client, f"reading netuid {netuid}"):
        found = await client.subnets.metagraph(netuid, commitments=False)
    if found is None:
        raise _no_subnet(client, netuid)
    neurons = []
    for neuron in found.neurons:
        ip, port = parse_endpoint(neuron.axon)
        neurons.append(
            Neuron(
                uid=neuron.uid,
                hotkey=neuron.hotkey,
                coldkey=neuron.coldkey,
                ip=ip,
                port=port,
                stake_tao=neuron.total_stake.amount,
                validator_permit=neuron.validator_permit,
                incentive=neuron.incentive,
                dividends=neuron.dividends,
                last_update=neuron.last_update,
                registered_at_block=neuron.block_at_registration,
            )
        )
    return Metagraph(netuid, found.block, tuple(neurons))


def parse_endpoint(axon: str | None) -> tuple[str | None, int | None]:
    """Address and port of `1.2.3.4:80` or `[2001:db8::1]:80`; (None, None) for anything else.

    What other neurons publish is theirs to get wrong: it must not fail the reader.
    """
    host, _, port = (axon or "").rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        address = ipaddress.ip_address(host)
        number = int(port)
    except ValueError:
        return None, None
    return (str(address), number) if 0 < number < 2**16 else (None, None)


async def require_registered(client: bt.Client, netuid: int, hotkey: str, command_hint: str) -> int:
    """The hotkey's uid.

    Args:
        client: an open client.
        netuid: the subnet.
        hotkey: its ss58 address.
        command_hint: what registers it, as `register_command` words it.

    Raises:
        NotRegistered: it has none; the message ends with the command.
        ConfigError: there is no such subnet.
        ChainUnavailable: no answer.
    """
    with reading(client, f"looking up {hotkey} on netuid {netuid}"):
        uid = await client.neurons.uid(hotkey, netuid)
        if uid is not None:
            return int(uid)
        if not await client.query(("SubtensorModule", "NetworksAdded"), [netuid]):
            raise _no_subnet(client, netuid)
    raise NotRegistered(
        f"the hotkey {hotkey} is not registered on netuid {netuid}; "
        f"register it with `{command_hint}`"
    )


def register_command(
    network: str,
    netuid: int,
    wallet: str,
    hotkey: str,
    *,
    wallet_path: str | None = None,
    endpoint: str | None = None,
) -> str:
    """The command with which an operator registers a hotkey on that network."""
    if is_embedded(network):
        command = (
            f"python -m mapreduce.chain register --subtensor.network {network} --netuid {netuid} "
            f"--wallet.name {wallet} --wallet.hotkey {hotkey}"
        )
        return command + (f" --wallet.path {wallet_path}" if wallet_path else "")
    command = (
        f"btcli subnets register --network {endpoint or network} --netuid {netuid} "
        f"--wallet {wallet} --wallet-hotkey {hotkey}"
    )
    return command + (f" --wallet-path {wallet_path}" if wallet_path else "")


def _no_subnet(client: bt.Client, netuid: int) -> ConfigError:
    return ConfigError(f"netuid = {netuid}: there is no such subnet on {client.endpoint}")
