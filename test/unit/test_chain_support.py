"""What the chain's tests share: an isolated environment, keys, a clock to set, an open client."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bittensor as bt
import pytest
from bittensor.sp_core import Keypair

from mapreduce.chain.embedded import EMBEDDED_URL, EmbeddedSubstrate, create_chain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NETUID = 10


@dataclass(frozen=True)
class Keys:
    """A wallet without files, in the shape that the SDK accepts as one."""

    coldkey: Keypair
    hotkey: Keypair

    @property
    def coldkeypub(self) -> Keypair:
        return self.coldkey


def keys(name: str, hotkey: str = "hot") -> Keys:
    """The same keys for the same names, every time."""
    return Keys(
        Keypair.create_from_uri(f"//{name}"), Keypair.create_from_uri(f"//{name}//{hotkey}")
    )


class FakeClock:
    """Unix time that passes only when told to."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def blocks(self, count: int, block_time_s: float = 12.0) -> None:
        """Let that many blocks pass."""
        self.now_s += count * block_time_s


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches the SDK, and nothing of the test reaches the machine."""
    for name in [name for name in os.environ if name.startswith(("BT_", "BTCLI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BTCLI_TOKEN_SYMBOLS_CACHE", str(tmp_path / "symbols.json"))


@contextlib.asynccontextmanager
async def opened(path: Path, clock: FakeClock | None = None) -> AsyncIterator[bt.Client]:
    """A real client on the chain in that file."""
    substrate = EmbeddedSubstrate(path) if clock is None else EmbeddedSubstrate(path, clock=clock)
    async with bt.Client(EMBEDDED_URL, substrate=substrate) as client:
        yield client


def created(path: Path, clock: FakeClock, **parameters: Any) -> Path:
    """A chain with 12 s blocks on a clock of its own."""
    create_chain(path, block_time_s=12.0, clock=clock, **parameters)
    return path


async def register(client: bt.Client, wallet: Keys, netuid: int = NETUID) -> bt.ExtrinsicResult:
    """Register without the shield, which has tests of its own."""
    call = bt.calls.SubtensorModule.burned_register(
        netuid=netuid, hotkey=wallet.hotkey.ss58_address
    )
    return await client.submit_call(call, wallet.coldkey)


async def stake(client: bt.Client, wallet: Keys, tao: float) -> bt.ExtrinsicResult:
    """Stake on the wallet's own hotkey."""
    intent = bt.AddStake(
        hotkey_ss58=wallet.hotkey.ss58_address, netuid=NETUID, amount_tao=bt.tao(tao)
    )
    return await client.execute(intent, wallet.coldkey)


async def serve(client: bt.Client, wallet: Keys, ip: str, port: int = 8091) -> bt.ExtrinsicResult:
    """Publish an axon."""
    return await client.execute(bt.ServeAxon(netuid=NETUID, ip=ip, port=port), wallet.hotkey)


async def permits(client: bt.Client) -> list[bool]:
    """The validator permit of each uid."""
    metagraph = await client.subnets.metagraph(NETUID, commitments=False)
    assert metagraph is not None
    return [neuron.validator_permit for neuron in metagraph.neurons]


def error_name(result: bt.ExtrinsicResult) -> str | None:
    """The chain's name for why a call failed; None for one that did not."""
    return None if result.error is None else result.error.name
