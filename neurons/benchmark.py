"""Runs a benchmark bot: `python3 neurons/benchmark.py --help`."""

from __future__ import annotations

from mapreduce.config import bot_config, run_cli


def main() -> int:
    config = bot_config()
    # Imported late: --help and a mistyped flag need neither bittensor nor aiohttp.
    from mapreduce.services.bot import run_bot
    from mapreduce.services.neuron import run_neuron

    return run_neuron(config, "bot", run_bot)


if __name__ == "__main__":
    run_cli(main)
