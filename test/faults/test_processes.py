"""Every lie once more with real processes: what a training script gets, what the validator's file
says afterwards, and what anyone can check offline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mapreduce.errors import InvalidArgument, MapReduceError, MinerFraud
from mapreduce.local import LocalSubnet
from mapreduce.net.auth import verify_signature
from mapreduce.store.ledger import Ledger
from mapreduce.verify import main as verify
from mapreduce.wire.proofs import check_proof
from test.liars import FAULTS

if TYPE_CHECKING:
    from peer import Peer

PEERS = MINERS = 2
COUNT = 160_000  # floats: two segments of 20 blocks
STEPS = 40
WITHIN_S = 12.0
FAST = ("one_ulp", "two_faced", "false_accusation", "two_uploads")


def reduce_until_it_fails(peer: Peer) -> dict[str, Any]:
    """All-reduces, as a training would, until an error or the end; what the script then knows."""
    started = time.monotonic()
    for step in range(1, STEPS + 1):
        tensor = np.full(COUNT, peer.rank * step, dtype=np.float32)
        try:
            peer.all_reduce(tensor, op="sum", timeout=30)
        except MapReduceError as error:
            return {
                "step": step,
                "error": type(error).__name__,
                "text": str(error),
                "hotkey": getattr(error, "hotkey", None),
                "proof": getattr(error, "proof_path", None),
                "intact": bool((tensor == peer.rank * step).all()),
            }
        if time.monotonic() - started > WITHIN_S:
            break
        time.sleep(0.3)
    return {"step": step, "error": None}


def check(fault: str, directory: Path) -> None:
    """One liar, the second miner or the second rank; the verdict of `FAULTS`, and nobody else."""
    expected = FAULTS[fault]
    name = f"{expected.by}-2"
    with LocalSubnet(
        MINERS,
        directory=directory,
        validator_flags=("--validator.audit_budget", "1"),
        faults={name: fault},
    ) as subnet:
        ranks = subnet.run(
            reduce_until_it_fails, PEERS, miner_count=MINERS, proof_directory=directory / "proofs"
        )
        liar = subnet.wallet(name if expected.by == "miner" else "peer").hotkey.ss58_address
        state = subnet.state_path
    honest = ranks if expected.by == "miner" else ranks[:1]
    for rank in honest:
        if rank["error"] is None:
            assert not expected.errors, rank
        else:
            assert rank["error"] in expected.errors, rank
            assert rank["intact"]
    with Ledger.open(state) as ledger:
        proven, data = ledger.proofs(), [ledger.proof(entry.id) for entry in ledger.proofs()]
        unavailable, disputes = ledger.unavailable(), ledger.disputes()
    assert {(entry.culprit, entry.kind[:2]) for entry in proven} == (
        {(liar, expected.proof)} if expected.proof else set()
    )
    for proof in data:
        assert proof is not None
        assert check_proof(proof, verify_signature)[1].culprit == liar
    assert {entry.hotkey for entry in unavailable} == (
        {liar} if expected.ledger == "unavailable" else set()
    )
    assert bool(disputes) == (expected.ledger == "unattributed"), disputes
    assert all(liar in (entry.peer, entry.miner) for entry in disputes)
    if expected.proof and expected.by == "miner":
        paths = [rank["proof"] for rank in honest if rank["proof"]]
        assert paths, ranks  # who raised MinerFraud has the file
        for path in paths:
            assert check_proof(Path(path).read_bytes(), verify_signature)[1].culprit == liar


@pytest.mark.parametrize("fault", FAST)
def test_a_lie_of_a_real_process_ends_in_its_verdict(fault: str, tmp_path: Path) -> None:
    check(fault, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("run", range(3))
@pytest.mark.parametrize("fault", FAULTS)
def test_every_lie_of_a_real_process_three_times(fault: str, run: int, tmp_path: Path) -> None:
    check(fault, tmp_path)


def reduce_once(peer: Peer) -> None:
    peer.all_reduce(np.full(COUNT, peer.rank, dtype=np.float32), op="sum")


def test_a_lie_in_the_last_step_is_heard_when_the_job_is_left(tmp_path: Path) -> None:
    with (
        LocalSubnet(
            1,
            directory=tmp_path,
            validator_flags=("--validator.audit_budget", "1"),
            faults={"miner-1": "wrong_block"},
        ) as subnet,
        pytest.raises(MinerFraud, match="in step 1, segment 0: 4096 of 4096 elements") as caught,
    ):
        subnet.run(reduce_once, PEERS, proof_directory=tmp_path / "proofs")
    assert caught.value.proof_path is not None
    assert verify([caught.value.proof_path]) == 0  # as anyone may: python -m mapreduce.verify


def reduce_strided(peer: Peer) -> bool:
    for _ in range(3):
        tensor = np.full((COUNT, 2), peer.rank, dtype=np.float32)[:, ::2]  # goes through a copy
        peer.all_reduce(tensor, op="sum")
    return bool((tensor == 3).all())


def test_a_tensor_that_goes_through_a_copy_is_sampled_as_it_went_in(tmp_path: Path) -> None:
    flags = ("--validator.audit_budget", "1")
    with LocalSubnet(1, directory=tmp_path, validator_flags=flags) as subnet:
        assert subnet.run(reduce_strided, PEERS) == [True, True]
        state = subnet.state_path
    with Ledger.open(state) as ledger:
        assert not ledger.proofs()
        assert not ledger.unavailable()
    assert "does not take" not in (tmp_path / "validator.log").read_text()


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"miner-9": "one_ulp"}, "no 'miner-9'"),
        ({"validator": "one_ulp"}, "no 'validator'"),
        ({"miner-1": "lying_input"}, "a miner cannot do 'lying_input'; it can do false_reject"),
        ({"peer-1": "fly"}, "a peer cannot do 'fly'"),
    ],
)
def test_faults_that_do_not_exist_are_refused(faults: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        LocalSubnet(2, faults=faults)
