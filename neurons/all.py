"""Runs a validator that mines: `python3 neurons/all.py --help`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mapreduce.config import all_config, run_cli
from mapreduce.services.process import run_neuron

if TYPE_CHECKING:
    from mapreduce.config import ValidatorConfig


def main() -> int:
    validator, miner = all_config()
    warnings = tuple(dict.fromkeys((*validator.warnings, *miner.warnings)))

    async def serve(config: ValidatorConfig) -> None:
        # Imported late: --help, a mistyped flag and a supervisor need no bittensor and no aiohttp.
        from mapreduce.services.both import run_both

        await run_both(config, miner)

    return run_neuron(replace(validator, warnings=warnings), "all", serve)


if __name__ == "__main__":
    run_cli(main)
