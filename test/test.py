"""Tries a running subnet: `python3 test/test.py --subtensor.network local --wallet.name NAME \
--wallet.hotkey HOTKEY --validator.uid UID`.

Opens a job with a few ranks (threads of this process), broadcasts and all-reduces, and compares
every byte with what it computes itself. Exit code 0 if all is equal. Uses bandwidth of real miners:
`--size` says how much.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import torch

from mapreduce.chain.wallets import load_wallet
from mapreduce.config import PeerConfig, peer_config, run_cli
from mapreduce.core.dtypes import DType
from mapreduce.core.reduce import ReduceOp, reduce_reference
from peer.peer import Peer

EPOCHS = 2


def contribution(rank: int, step: int, size: int) -> np.ndarray:
    return np.random.default_rng((rank, step)).random(size // 4, dtype=np.float32)


def run_rank(rank: int, config: PeerConfig, name: str) -> list[str]:
    """Runs one rank; returns a line per step. Raises AssertionError on a wrong byte."""
    count, size = config.args.count, config.args.size
    wallet = load_wallet(config.wallet.name, config.wallet.hotkey, config.wallet.path)
    place = (wallet, config.validator_uid, config.chain.netuid, config.chain.address)
    lines = []
    with Peer(rank, count, size, *place, job=name, miner_count=config.args.miners) as peer:
        if rank == 1:
            uids = ", ".join(str(miner.uid) for miner in peer.miners)
            print(f"{count} ranks and miners {uids}: {size / 1e6:.1f} MB a step", flush=True)
        for step in range(1 + EPOCHS):
            mine = torch.from_numpy(contribution(rank, step, size))
            if step == 0:
                result = peer.broadcast(mine if rank == 1 else None)
                expected = contribution(1, step, size)
            else:
                result = peer.all_reduce(mine)
                all_ranks = [contribution(r, step, size) for r in range(1, count + 1)]
                expected = reduce_reference(all_ranks, DType.FLOAT32, ReduceOp.AVG)
            report = peer.last_step
            assert report is not None
            if result.numpy().tobytes() != expected.tobytes():
                raise AssertionError(f"rank {rank}, step {report.step} ({report.op}): wrong bytes")
            lines.append(
                f"rank {rank}  step {report.step}  {report.op:<9} {report.seconds:7.2f} s  "
                f"{report.mbit_per_s_up:8.0f} Mbit/s up  {report.mbit_per_s_down:8.0f} down  exact"
            )
    return lines


def main() -> int:
    parser = ArgumentParser()
    parser.add_argument("--count", type=int, default=2, help="ranks (default 2)")
    parser.add_argument(
        "--miners", type=int, default=None, help="miners (default: the validator decides)"
    )
    parser.add_argument("--size", type=int, default=16 << 20, help="bytes of a tensor (16 MiB)")
    config = peer_config(
        parser=parser, prog="test.py", description="Tries a running subnet and checks every byte."
    )
    if config.args.count < 1 or config.args.size < 4:
        parser.error("--count must be at least 1 and --size at least 4")
    name = f"test-{os.urandom(8).hex()}"
    with ThreadPoolExecutor(config.args.count) as threads:
        ranks = [threads.submit(run_rank, r + 1, config, name) for r in range(config.args.count)]
        for failed in as_completed(ranks):
            failed.result()  # the first error, not the ones that follow from it
        for rank in ranks:
            print("\n".join(rank.result()))
    print("PASS  every byte on every rank is right")
    return 0


if __name__ == "__main__":
    try:
        run_cli(main)
    except AssertionError as error:
        print(f"FAIL  {error}", file=sys.stderr)
        sys.exit(1)
