"""The newest block, and a connection made anew. Knows the SDK's client; knows nothing of how long
one waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapreduce.chain.seam import reading

if TYPE_CHECKING:
    import bittensor as bt


async def read_block(client: bt.Client) -> int:
    """The newest block. Raises ChainUnavailable."""
    with reading(client, "asking for the newest block"):
        return int(await client.block())


async def read_block_time(client: bt.Client) -> float:
    """Seconds from block to block. Raises ChainUnavailable."""
    with reading(client, "asking for the block time"):
        return float(await client.block_time())


async def connect(client: bt.Client) -> None:
    """Opens the connection, unless it is open. Raises ChainUnavailable."""
    with reading(client, "connecting"):
        await client.connect()


async def disconnect(client: bt.Client) -> None:
    """Closes the connection, so that `connect` makes a new one. What others ask meanwhile ends as
    without an answer. Raises ChainUnavailable.

    The SDK mends broken connections itself, but gives up for good after some attempts, and believes
    in one on which a node answers with an old block for ever.
    """
    with reading(client, "disconnecting"):
        await client.close()
