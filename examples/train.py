import logging
import time
from argparse import ArgumentParser

import bittensor as bt
import torch

from mapreduce.config import peer_config
from peer.peer import Peer

parser = ArgumentParser()
parser.add_argument("--validator.uid", type=int, default=0, help="Validator UID")
parser.add_argument("--netuid", type=int, default=10, help="Map Reduce Subnet NetUID")
parser.add_argument("--rank", type=int, default=1, help="Rank of the peer")
parser.add_argument("--count", type=int, default=1, help="Number of peers")

# size for testing, set to 100 MB
test_size = 100 * 1024 * 1024


def train(rank, peer_count, bandwidth, wallet, validator_uid, netuid, network):
    logging.info(f"Starting peer with rank {rank} netuid: {netuid}")
    # Initialize Peer instance
    peer = Peer(rank, peer_count, bandwidth, wallet, validator_uid, netuid, network)

    # Initialize process group with the fetched configuration
    peer.init_process_group()

    weights = None

    if rank == 1:  # if it is the first peer
        weights = torch.rand((int(test_size / 4), 1), dtype=torch.float32)
        peer.broadcast(weights)
    else:
        weights = peer.broadcast(weights)

    epoch = 2

    # Your training loop here
    logging.info(f"Peer {rank} is training...")
    for i in range(epoch):
        logging.info(f"Epoch: {i}")
        # Replace this with actual training code
        time.sleep(5)

        # After calculating gradients
        gradients = torch.ones((int(test_size / 4), 1), dtype=torch.float32)
        if rank == 1:
            gradients = torch.ones((int(test_size / 4), 1), dtype=torch.float32) * 3

        # All-reducing the gradients
        gradients = peer.all_reduce(gradients)

    peer.destroy_process_group()
    print(f"Peer {rank} has finished training.")


if __name__ == "__main__":
    config = peer_config(parser=parser)
    logging.basicConfig(level=logging.INFO)
    wallet = bt.Wallet(config.wallet.name, config.wallet.hotkey, config.wallet.path)
    train(
        config.args.rank,
        config.args.count,
        test_size,
        wallet,
        config.validator_uid,
        config.chain.netuid,
        config.chain.address,
    )
