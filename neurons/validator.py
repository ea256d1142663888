"""Runs a validator: `python3 neurons/validator.py --help`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapreduce.config import run_cli, validator_config
from mapreduce.services.process import run_neuron

if TYPE_CHECKING:
    from mapreduce.config import ValidatorConfig


async def serve(config: ValidatorConfig) -> None:
    # Imported late: --help, a mistyped flag and a supervisor need no bittensor and no aiohttp.
    from mapreduce.services.validator import run_validator

    await run_validator(config)


def main() -> int:
    return run_neuron(validator_config(), "validator", serve)


if __name__ == "__main__":
    run_cli(main)
