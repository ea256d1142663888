"""`python test/updates/neuron.py ROLE FLAGS...`: a neuron whose releases are installed in no time.

A release runs its own code, from its own tag, but with the packages of this environment: only pip
is left out. `TRY_READY_S` and `TRY_PROBATION_S` in the environment shorten what a release is given.
Knows the place where pip is called; knows nothing of what is tested.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from typing import TYPE_CHECKING

from mapreduce import releases
from mapreduce.config import run_cli
from mapreduce.services import supervisor

if TYPE_CHECKING:
    from pathlib import Path


async def make_environment(source: Path, venv: Path) -> None:
    """An interpreter at the place of a new environment's that finds a copy of the source first."""
    code = venv / "code"
    shutil.copytree(source, code)
    python = venv / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{code}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)


def main() -> int:
    role = sys.argv.pop(1)
    releases.make_environment = make_environment
    supervisor.READY_S = float(os.environ.get("TRY_READY_S", supervisor.READY_S))
    supervisor.PROBATION_S = float(os.environ.get("TRY_PROBATION_S", supervisor.PROBATION_S))
    code: int = importlib.import_module(f"neurons.{role}").main()
    return code


if __name__ == "__main__":
    run_cli(main)
