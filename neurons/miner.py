"""Runs a miner: `python3 neurons/miner.py --help`."""

from __future__ import annotations

from mapreduce.config import miner_config, run_cli


def main() -> int:
    config = miner_config()
    # Imported late: --help and a mistyped flag need neither bittensor nor aiohttp.
    from mapreduce.services.miner import run_miner
    from mapreduce.services.neuron import run_neuron

    return run_neuron(config, "miner", run_miner)


if __name__ == "__main__":
    run_cli(main)
