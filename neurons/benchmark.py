"""Runs a benchmark bot: `python3 neurons/benchmark.py --help`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapreduce.config import bot_config, run_cli
from mapreduce.services.process import run_neuron

if TYPE_CHECKING:
    from mapreduce.config import PeerConfig


async def serve(config: PeerConfig) -> None:
    # Imported late: --help, a mistyped flag and a supervisor need no bittensor and no aiohttp.
    from mapreduce.services.bot import run_bot

    await run_bot(config)


def main() -> int:
    return run_neuron(bot_config(), "bot", serve)


if __name__ == "__main__":
    run_cli(main)
