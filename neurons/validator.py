"""Runs a validator: `python3 neurons/validator.py --help`."""

from __future__ import annotations

from mapreduce.config import run_cli, validator_config


def main() -> int:
    config = validator_config()
    # Imported late: --help and a mistyped flag need neither bittensor nor aiohttp.
    from mapreduce.services.neuron import run_neuron
    from mapreduce.services.validator import run_validator

    return run_neuron(config, "validator", run_validator)


if __name__ == "__main__":
    run_cli(main)
