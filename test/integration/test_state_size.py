"""How large a validator's state grows; `python -m bench.state` shows the rest, at full length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.state import TARGET_BYTES, fill_and_measure

if TYPE_CHECKING:
    from pathlib import Path

MINERS, ROUNDS = 256, 10_000
# Both are past the 140 windows that are kept raw: from there on a file grows by its days alone.
SHORT, LONG = 200, 500


@pytest.mark.slow
def test_the_state_of_10_000_rounds_stays_below_its_bound(tmp_path: Path) -> None:
    sizes = []
    for rounds in (SHORT, LONG):
        directory = tmp_path / str(rounds)
        directory.mkdir()
        sizes.append(fill_and_measure(directory, MINERS, rounds, seed=1).file_bytes)
    per_round = (sizes[1] - sizes[0]) / (LONG - SHORT)
    assert per_round > 0
    assert sizes[1] + (ROUNDS - LONG) * per_round < TARGET_BYTES
