"""Yuma consensus over the weights of a subnet's validators, as a pure function of plain lists.

Knows the formulas; knows nothing of storage, blocks to come or money. The source is subtensor's
`run_epoch.rs` (`epoch_mechanism`), described at https://docs.learnbittensor.org/yuma-consensus:

    S     stake of the active validators with a permit, normalised to sum 1
    W     their weights without self-weights (but the owner's) and without those set before the
          weighed neuron was registered; each row normalised to sum 1
    C_j   consensus: the largest weight that at least kappa of the stake gives to j, or exceeds
    I     incentive: sum over i of S_i min(W_ij, C_j), normalised to sum 1
    D_i   dividends: sum over j of B_ij I_j, normalised to sum 1

What is simpler here: the bonds B are S_i min(W_ij, C_j), normalised per miner, of this epoch
alone. The real chain keeps them as a moving average (and liquid alpha bends it), which pays
validators who found a miner early. Miners' incentive does not depend on that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """A subnet before its epoch: one entry per uid, and each validator's row of weights."""

    stakes: Sequence[float]
    permits: Sequence[bool]
    last_update: Sequence[int]
    """The block at which each uid last set weights."""
    registered_at: Sequence[int]
    weights: Mapping[int, Sequence[Sequence[int]]]
    """By validator: (uid, weight); only the proportions within a row count."""
    owner_uid: int | None
    block: int
    activity_cutoff_blocks: int
    """How long a validator counts after it last set weights."""
    kappa: float
    """The majority, as a fraction of the stake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the epoch decides, one entry per uid."""

    active: list[bool]
    consensus: list[float]
    incentive: list[float]
    dividends: list[float]
    emission: list[float]
    """Everybody's share: half for incentive, half for dividends; by stake where nobody judged."""


def count(ballot: Ballot) -> Verdict:
    """Turn weights into shares."""
    uids = len(ballot.stakes)
    active = np.array(
        [last + ballot.activity_cutoff_blocks >= ballot.block for last in ballot.last_update],
        dtype=bool,
    )
    permits = np.array(ballot.permits, dtype=bool)
    if ballot.owner_uid is not None:
        permits[ballot.owner_uid] = True
    all_stake = _normalised(np.array(ballot.stakes, dtype=np.float64))
    stake = _normalised(all_stake * active * permits)
    voters = [uid for uid in range(uids) if stake[uid] > 0]
    votes = _normalised(_votes(ballot, voters))
    voting_stake = stake[voters]
    consensus = _weighted_median(votes, voting_stake, ballot.kappa)
    support = voting_stake[:, None] * np.minimum(votes, consensus)
    incentive = _normalised(support.sum(axis=0))
    bonds = _normalised(support.T).T
    dividends = np.zeros(uids)
    dividends[voters] = _normalised(bonds @ incentive)
    emission = _normalised(incentive + dividends)
    if not emission.any():
        emission = stake if stake.any() else all_stake
    return Verdict(
        active=active.tolist(),
        consensus=consensus.tolist(),
        incentive=incentive.tolist(),
        dividends=dividends.tolist(),
        emission=emission.tolist(),
    )


def _votes(ballot: Ballot, voters: list[int]) -> Floats:
    """The weights that count: one row per voter, one column per uid."""
    votes = np.zeros((len(voters), len(ballot.stakes)))
    for row, voter in enumerate(voters):
        for uid, weight in ballot.weights.get(voter, ()):
            itself = uid == voter and voter != ballot.owner_uid
            # Weights set in the very block of a registration may mean the neuron before.
            outdated = ballot.last_update[voter] <= ballot.registered_at[uid]
            if not itself and not outdated:
                votes[row, uid] = weight
    return votes


def _weighted_median(votes: Floats, stake: Floats, kappa: float) -> Floats:
    """Per column the smallest weight up to which more than 1 - kappa of the stake voted."""
    if not len(votes):
        return np.zeros(votes.shape[1])
    order = np.argsort(votes, axis=0)
    reached = np.cumsum(stake[order], axis=0) > 1 - kappa
    reached[-1] = True  # rounding may leave the whole just below 1
    rows = np.take_along_axis(order, np.argmax(reached, axis=0)[None, :], axis=0)
    median: Floats = np.take_along_axis(votes, rows, axis=0)[0]
    return median


def _normalised(values: Floats) -> Floats:
    """Scaled so that it, or each of its rows, sums to 1; zeros stay zeros."""
    total = values.sum(axis=-1, keepdims=True)
    shares: Floats = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    return shares
