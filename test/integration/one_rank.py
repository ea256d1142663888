"""One rank of a job in a process of its own, for tests that kill or interrupt it.

`python -m test.integration.one_rank NETWORK NETUID VALIDATOR_UID WALLETS RANK PEER_COUNT JOB`
"""

from __future__ import annotations

import sys

import torch

from mapreduce.chain.wallets import load_wallet
from peer import Peer


def main() -> None:
    network, netuid, uid, wallets, rank, peer_count, job = sys.argv[1:]
    wallet = load_wallet("local", "peer", wallets)
    place = (wallet, int(uid), int(netuid), network)
    with Peer(int(rank), int(peer_count), 1 << 20, *place, job=job, miner_count=1) as peer:
        print("joined", flush=True)
        peer.all_reduce(torch.ones(1000))
        print("done", flush=True)


if __name__ == "__main__":
    main()
