"""Data-parallel training of a small network on scikit-learn's bundled digits.

Each rank computes the gradient of its share of every global batch; `peer.all_reduce` averages them.
Run one process per rank:

    python examples/train_digits.py --rank 1 --count 2 --validator.uid 0 --subtensor.network local \
        --wallet.name NAME --wallet.hotkey HOTKEY

Without a peer, `train` does the same on whole batches in one process: the reference that the demo
compares the distributed run with.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from peer.peer import Peer

BATCH = 180  # of every step, over all ranks: a multiple of 1 to 6 ranks
STEPS = 60
LEARNING_RATE = 0.5
SEED = 7


def make_model() -> nn.Module:
    """A network of 64-32-10 units, the same on every rank."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def global_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of all steps, the same for everyone: (BATCH x 64 pixels, BATCH labels)."""
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.Generator().manual_seed(SEED)
    batches = []
    for _ in range(STEPS):
        chosen = torch.randperm(len(labels), generator=order)[:BATCH]
        batches.append((pixels[chosen], labels[chosen]))
    return batches


def train(
    peer: Peer | None = None, on_step: Callable[[int, float], None] | None = None
) -> list[float]:
    """Trains, with a peer on its rank's share of each batch; returns the global loss of every
    step."""
    rank, count = (peer.rank, peer.peer_count) if peer else (1, 1)
    model = make_model()
    parameters = list(model.parameters())
    if peer:
        with torch.no_grad():
            for parameter in parameters:
                peer.broadcast(parameter)  # rank 1's weights, in case seeds ever differ
    share = BATCH // count
    losses = []
    for step, (pixels, labels) in enumerate(global_batches()):
        mine = slice((rank - 1) * share, rank * share)
        loss = nn.functional.cross_entropy(model(pixels[mine]), labels[mine])
        model.zero_grad()
        loss.backward()
        # One bucket for all gradients, and the loss with them: one collective a step.
        gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
        bucket = torch.cat([*gradients, loss.detach().reshape(1)])
        if peer:
            peer.all_reduce(bucket)
        losses.append(float(bucket[-1]))
        begin = 0
        with torch.no_grad():
            for parameter in parameters:
                gradient = bucket[begin : begin + parameter.numel()].view_as(parameter)
                parameter.sub_(LEARNING_RATE * gradient)
                begin += parameter.numel()
        if on_step:
            on_step(step + 1, losses[-1])
    return losses


def main() -> None:
    import bittensor as bt

    from mapreduce.config import peer_config
    from peer.peer import Peer

    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rank", type=int, default=1, help="rank of this process, from 1")
    parser.add_argument("--count", type=int, default=1, help="number of ranks")
    config = peer_config(parser=parser)
    wallet = bt.Wallet(config.wallet.name, config.wallet.hotkey, config.wallet.path)
    place = (wallet, config.validator_uid, config.chain.netuid, config.chain.address)
    with Peer(config.args.rank, config.args.count, 1 << 20, *place) as peer:
        train(peer, lambda step, loss: print(f"step {step}: loss {loss:.4f}"))


if __name__ == "__main__":
    main()
