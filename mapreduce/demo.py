"""`make demo`: the user guide on a subnet of this machine, checked against local references.

One validator, four miners and three peers, all separate processes. Knows what to show and what must
be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mapreduce import __version__
from mapreduce.config import run_cli
from mapreduce.errors import LocalError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peer import Peer

PEERS = 3
MINERS = 4
TENSOR_BYTES = 100 * 1024 * 1024  # the user guide's test_size
MIN_BYTES = 64 * 1024  # the training's gradients must fit into the job too
EPOCHS = 2
LOSS_TOLERANCE = 1e-4  # relative: float32 sums in another order, over 60 steps of training


def tensor_of(rank: int, step: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What a rank contributes to a step: `nbytes` of float32 that anyone can compute again."""
    rng = np.random.default_rng((rank, step))
    return rng.random(nbytes // 4, dtype=np.float32) - np.float32(0.5)


def digest(data: memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def run_rank(peer: Peer) -> dict[str, Any]:
    """The user guide and the training, as one rank sees them."""
    import torch

    from examples.train_digits import train

    nbytes = peer.bandwidth
    steps: list[dict[str, Any]] = []
    digests: list[str] = []

    def note(tensor: torch.Tensor) -> None:
        report = peer.last_step
        assert report is not None
        steps.append(report.as_dict())
        digests.append(digest(tensor.numpy().data))
        if peer.rank == 1:
            print(
                f"  step {report.step}: {report.op} of {report.tensor_bytes / 1e6:.1f} MB "
                f"in {report.seconds:.2f} s",
                flush=True,
            )

    weights = torch.from_numpy(tensor_of(1, 0, nbytes)) if peer.rank == 1 else None
    weights = peer.broadcast(weights)
    note(weights)
    for epoch in range(1, EPOCHS + 1):
        gradients = torch.from_numpy(tensor_of(peer.rank, epoch, nbytes))
        gradients = peer.all_reduce(gradients)
        note(gradients)

    def progress(step: int, loss: float) -> None:
        if peer.rank == 1 and step % 15 == 0:
            print(f"  training step {step}: loss {loss:.4f}", flush=True)

    losses = train(peer, progress)
    return {
        "rank": peer.rank,
        "miners": [miner.uid for miner in peer.miners],
        "steps": steps,
        "digests": digests,
        "losses": losses,
    }


def reference_digests(peer_count: int, nbytes: int) -> list[str]:
    """What every rank must hold after each step of the user guide, without any network."""
    from mapreduce.core.dtypes import DType
    from mapreduce.core.reduce import ReduceOp, reduce_reference

    expected = [digest(tensor_of(1, 0, nbytes).data)]
    for epoch in range(1, EPOCHS + 1):
        tensors = [tensor_of(rank, epoch, nbytes) for rank in range(1, peer_count + 1)]
        expected.append(digest(reduce_reference(tensors, DType.FLOAT32, ReduceOp.AVG).data))
    return expected


def verdicts(
    ranks: list[dict[str, Any]], expected: list[str], losses: list[float]
) -> dict[str, bool]:
    """The two claims of the demo, each in its parts."""
    return {
        "identical_bytes_on_all_peers": all(r["digests"] == ranks[0]["digests"] for r in ranks),
        "equal_to_local_reference": all(r["digests"] == expected for r in ranks),
        "identical_losses_on_all_peers": all(r["losses"] == ranks[0]["losses"] for r in ranks),
        "losses_equal_single_process": len(losses) == len(ranks[0]["losses"])
        and all(
            math.isclose(ours, theirs, rel_tol=LOSS_TOLERANCE)
            for ours, theirs in zip(ranks[0]["losses"], losses, strict=True)
        ),
        "training_learns": ranks[0]["losses"][-1] < ranks[0]["losses"][0] / 2,
    }


def table(ranks: list[dict[str, Any]]) -> list[str]:
    """One line per step and rank."""
    lines = [
        f"{'step':>4}  {'op':<9} {'MB':>7}  {'rank':>4}  {'seconds':>7}  {'Mbit/s up':>9}  "
        f"{'down':>9}"
    ]
    for index in range(len(ranks[0]["steps"])):
        for entry in ranks:
            step = entry["steps"][index]
            lines.append(
                f"{step['step']:>4}  {step['op']:<9} {step['tensor_bytes'] / 1e6:>7.1f}  "
                f"{entry['rank']:>4}  {step['seconds']:>7.2f}  {step['mbit_per_s_up']:>9.0f}  "
                f"{step['mbit_per_s_down']:>9.0f}"
            )
    return lines


def run_demo(peer_count: int, miner_count: int, nbytes: int) -> dict[str, Any]:
    """Runs everything and returns what `--json` writes."""
    from examples.train_digits import train
    from mapreduce.local import LocalSubnet

    started = time.monotonic()
    print(f"starting 1 validator and {miner_count} miners on an embedded chain", flush=True)
    with LocalSubnet(miners=miner_count) as subnet:
        print(f"starting {peer_count} peers; each tensor has {nbytes / 1e6:.1f} MB", flush=True)
        ranks = subnet.run(run_rank, peer_count, nbytes, miner_count=miner_count)
    print("computing the references in this process", flush=True)
    losses = train()
    checked = verdicts(ranks, reference_digests(peer_count, nbytes), losses)
    slowest = [
        max(entry["steps"][index]["seconds"] for entry in ranks)
        for index in range(len(ranks[0]["steps"]))
    ]
    return {
        "version": __version__,
        "peers": peer_count,
        "miners": miner_count,
        "tensor_bytes": nbytes,
        "seconds_per_step": slowest,
        "ranks": ranks,
        "single_process_losses": losses,
        "verdicts": checked,
        "passed": all(checked.values()),
        "seconds": time.monotonic() - started,
    }


def show(outcome: dict[str, Any]) -> None:
    """Prints the table and the two verdicts."""
    print()
    print("\n".join(table(outcome["ranks"])))
    losses, checked = outcome["ranks"][0]["losses"], outcome["verdicts"]
    same = checked["identical_bytes_on_all_peers"] and checked["equal_to_local_reference"]
    learned = (
        checked["identical_losses_on_all_peers"]
        and checked["losses_equal_single_process"]
        and checked["training_learns"]
    )
    print()
    print(
        f"{'PASS' if same else 'FAIL'}  every peer holds identical bytes, equal to the reference "
        "computed locally"
    )
    print(
        f"{'PASS' if learned else 'FAIL'}  digits: the distributed loss curve ({losses[0]:.4f} to "
        f"{losses[-1]:.4f} in {len(losses)} steps) equals single-process training"
    )
    for name, value in checked.items():
        if not value:
            print(f"      failed: {name.replace('_', ' ')}")
    print(f"{outcome['seconds']:.0f} s in all")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mapreduce.demo",
        description="Runs a subnet of real processes on this machine, the user guide on it, and a "
        "small training; compares everything with references. Exit code 1 if anything differs.",
    )
    parser.add_argument("--json", metavar="PATH", type=Path, help="also write the outcome as JSON")
    parser.add_argument(
        "--peers", type=int, default=PEERS, help="ranks, 1 to 6 (default %(default)s)"
    )
    parser.add_argument(
        "--bytes", type=int, default=TENSOR_BYTES, help="of each tensor (default %(default)s)"
    )
    parser.add_argument("--miners", type=int, default=MINERS, help="miners (default %(default)s)")
    options = parser.parse_args(argv)
    if options.peers not in range(1, 7):
        parser.error(f"--peers {options.peers}: 1 to 6")
    if options.bytes < MIN_BYTES:
        parser.error(f"--bytes {options.bytes}: {MIN_BYTES} or more")
    if options.miners < 1:
        parser.error(f"--miners {options.miners}: 1 or more")
    root = Path(__file__).resolve().parents[1]
    if not (root / "examples" / "train_digits.py").exists():
        raise LocalError(
            "the demo trains examples/train_digits.py, which the installed package does not "
            "contain: run it in a checkout of the repository"
        )
    sys.path.insert(0, str(root))
    outcome = run_demo(options.peers, options.miners, options.bytes)
    show(outcome)
    if options.json is not None:
        options.json.write_text(json.dumps(outcome, indent=2) + "\n")
        print(f"written to {options.json}")
    return 0 if outcome["passed"] else 1


if __name__ == "__main__":
    run_cli(main)
