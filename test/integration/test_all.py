"""`neurons/all.py`: one process, one hotkey, one port, both services."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mapreduce.local import LocalSubnet
from mapreduce.store.database import Database
from mapreduce.store.history import History
from test.integration.test_processes import eventually

if TYPE_CHECKING:
    from peer import Peer


class ValidatorThatMines(LocalSubnet):
    """Its validator is a miner as well."""

    def program(self, role: str, name: str) -> tuple[str, ...]:
        return ("-m", "neurons.all") if role == "validator" else super().program(role, name)


def sum_of_ranks(peer: Peer) -> tuple[list[int], list[float]]:
    tensor = np.full(100_000, peer.rank, dtype=np.float32)
    peer.all_reduce(tensor, op="sum")
    return [miner.uid for miner in peer.miners], np.unique(tensor).tolist()


def measured_uids(subnet: LocalSubnet) -> set[int | None]:
    with Database.open_read_only(subnet.state_path) as database:
        history = History(database)
        uids = {known.hotkey: known.uid for known in history.known().values()}
        rows = history.measurements(0.0)
    return {uids[row.hotkey] for row in rows if row.outcome == "measured" and row.hotkey in uids}


def test_a_validator_that_mines_reduces_and_is_measured_like_any_miner() -> None:
    flags = ("--scoring.window_s", "4", "--benchmark.seconds", "0.3")
    with ValidatorThatMines(
        1, bots=1, validator_flags=(*flags, "--max_bandwidth", "80000000")
    ) as s:
        both = {s.validator_uid, *s.miner_uids}
        for uids, values in s.run(sum_of_ranks, 2, bandwidth=1 << 20, miner_count=2):
            assert set(uids) == both
            assert values == [3.0]
        assert eventually(lambda: measured_uids(s) == both, 30.0)
        assert s.validator is not None
        assert s.validator.stop() == 0  # SIGTERM, in good order
