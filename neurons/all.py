"""Runs a validator that mines: `python3 neurons/all.py --help`."""

from __future__ import annotations

from dataclasses import replace

from mapreduce.config import all_config, run_cli


def main() -> int:
    validator, miner = all_config()
    # Imported late: --help and a mistyped flag need neither bittensor nor aiohttp.
    from mapreduce.services.both import run_both
    from mapreduce.services.neuron import run_neuron

    warnings = tuple(dict.fromkeys((*validator.warnings, *miner.warnings)))
    config = replace(validator, warnings=warnings)
    return run_neuron(config, "all", lambda config: run_both(config, miner))


if __name__ == "__main__":
    run_cli(main)
