"""Parties of different releases meet: who cannot work together learns why, and the others go on."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mapreduce import __version__
from mapreduce.core.versions import Version
from mapreduce.errors import JobRefused
from mapreduce.local import NETUID, LocalSubnet

if TYPE_CHECKING:
    from pathlib import Path

    from peer import Peer

OURS = Version.parse(__version__)
NEWER = f"{OURS.major + 1}.0.0"


def claims(version: str, module: str) -> tuple[str, ...]:
    """What Python runs as a program of another release: this one's code, under its name."""
    code = (
        f"import mapreduce; mapreduce.__version__ = {version!r}; "
        f"from {module} import main; from mapreduce.config import run_cli; run_cli(main)"
    )
    return ("-c", code)


class MixedSubnet(LocalSubnet):
    """Two miners, of which the second is of the next major release."""

    def program(self, role: str, name: str) -> tuple[str, ...]:
        """What Python runs as this neuron."""
        if name == "miner-2":
            return claims(NEWER, "neurons.miner")
        return super().program(role, name)


def sum_once(peer: Peer) -> float:
    tensor = np.full(1000, float(peer.rank), dtype=np.float32)
    return float(np.asarray(peer.all_reduce(tensor, op="sum"))[0])


def test_a_miner_of_another_major_release_is_passed_over_and_reads_why(tmp_path: Path) -> None:
    with MixedSubnet(miners=2, directory=tmp_path) as subnet:
        for _ in range(2):
            assert subnet.run(sum_once, 2, 4000) == [3.0, 3.0]  # by the other one
        with pytest.raises(JobRefused, match=f"this side {NEWER}") as refused:
            subnet.run(sum_once, 2, 4000, miner_count=2)
        reason = f"the caller speaks version {__version__}, this side {NEWER}"
        assert f"uid {subnet.miner_uids[1]}" in str(refused.value)
        assert reason in str(refused.value)
        log = (tmp_path / "miner-2.log").read_text()
        assert log.count("a caller is refused, and gives this neuron no work") == 1  # in an hour
        assert reason in log
        assert "update the caller" in log
        # And it learns the same where it asks for its score.
        asked = subprocess.run(
            [
                sys.executable,
                *claims(NEWER, "mapreduce.score"),
                *("--subtensor.network", subnet.network, "--netuid", str(NETUID)),
                *("--wallet.name", "miner-2", "--wallet.hotkey", "miner-2"),
                *("--wallet.path", str(tmp_path / "wallets")),
                *("--validator.uid", str(subnet.validator_uid)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert asked.returncode == 1
        assert f"the caller speaks version {NEWER}, this side {__version__}" in asked.stderr
        assert "update this side" in asked.stderr
        assert "Traceback" not in asked.stderr
