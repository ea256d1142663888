"""Runs a miner: `python3 neurons/miner.py --help`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapreduce.config import miner_config, run_cli
from mapreduce.services.process import run_neuron

if TYPE_CHECKING:
    from mapreduce.config import MinerConfig


async def serve(config: MinerConfig) -> None:
    # Imported late: --help, a mistyped flag and a supervisor need no bittensor and no aiohttp.
    from mapreduce.services.miner import run_miner

    await run_miner(config)


def main() -> int:
    return run_neuron(miner_config(), "miner", serve)


if __name__ == "__main__":
    run_cli(main)
