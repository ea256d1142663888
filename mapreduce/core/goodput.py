"""A miner's speed from what bots and peers have timed: goodput of a benchmark, rates of a real job.

Knows bytes, and seconds that peers and bots have measured. Knows nothing of a miner's own clock, of
sockets, or of what the figures are worth (`scoring.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from numpy.typing import NDArray

    from mapreduce.core.scoring_config import ScoringConfig

    Floats = NDArray[np.float64]

Peer = TypeVar("Peer", bound="Hashable")
Miner = TypeVar("Miner", bound="Hashable")

_SHORT_BINS: Final = 10
_SHORT_WARM_UP: Final = 2  # bins: the share of a slot of 10 s that is dropped
_UPPER: Final = 0.75  # quantile: a quarter of the miners cannot feign more of it
_POLISHES: Final = 10  # rounds; tables of a job settle in two to four
_TINY: Final = 1e-9  # below what a float of seconds or of a logarithm means


def slot_goodput(steps: Sequence[tuple[float, float]], config: ScoringConfig) -> float | None:
    """Bytes per second of one miner in one benchmark job; None if that was too little to tell.

    The median over seconds, without the first ones and the last partial one, as FlashFlow measures
    relays (arXiv 2004.09583). The steps are laid end to end, so that waiting between them, which is
    no miner's fault, does not count.

    Args:
        steps: In order, verified bytes in and out, summed over the bots, and the seconds for which
            the miner was busy with them.
    """
    timed = np.array([(nbytes, seconds) for nbytes, seconds in steps if seconds > 0], dtype=float)
    if not timed.size:
        return None
    carried, elapsed = np.concatenate((np.zeros((1, 2)), np.cumsum(timed, axis=0))).T
    busy_s = float(elapsed[-1])
    if busy_s < config.slot_least_s:
        return None
    if busy_s < config.slot_short_s:
        bin_s = busy_s / _SHORT_BINS
        dropped_s = _SHORT_WARM_UP * bin_s
    else:
        bin_s, dropped_s = 1.0, config.slot_warm_up_s
    bins = math.floor((busy_s - dropped_s) / bin_s + _TINY)
    if bins < 1:
        return None
    edges = dropped_s + bin_s * np.arange(bins + 1)
    return float(np.median(np.diff(np.interp(edges, elapsed, carried)))) / bin_s


def relative_rates(
    rates: Mapping[tuple[Peer, Miner], float],
    known_goodput: Mapping[Miner, float],
    config: ScoringConfig,
) -> dict[Miner, float]:
    """How fast each miner of a real job was, over what its known goodput promises; at most 1.

    Fits log(rate) = peer + miner by median polish (Tukey, Exploratory Data Analysis, 1977), so that
    slow peers blame no miner. A miner is held to its known goodput, times the upper quartile of
    what the job's miners reach of theirs; but to no more than the upper quartile of their rates,
    since where the peers are the bottleneck all fast miners are equally fast. Both are at most what
    an honest miner reaches. Empty for a job with too few peers or miners to tell them apart; a
    miner without a known goodput is left out.

    Args:
        rates: Bytes per second between a peer and a miner, as the peer timed them.
        known_goodput: What the bots measured.
    """
    timed = {pair: rate for pair, rate in rates.items() if rate > 0}
    peers = list(dict.fromkeys(peer for peer, _ in timed))
    miners = list(dict.fromkeys(miner for _, miner in timed))
    known = {miner: known_goodput[miner] for miner in miners if known_goodput.get(miner, 0) > 0}
    if len(peers) < config.organic_peers or len(miners) < config.organic_miners or not known:
        return {}
    table = np.full((len(peers), len(miners)), np.nan)
    rows, columns = {p: i for i, p in enumerate(peers)}, {m: i for i, m in enumerate(miners)}
    for (peer, miner), rate in timed.items():
        table[rows[peer], columns[miner]] = math.log(rate)
    effects = np.exp(_miner_effects(table))
    shares = [effects[columns[miner]] / goodput for miner, goodput in known.items()]
    reached = float(np.quantile(shares, _UPPER))
    most = float(np.quantile(effects, _UPPER))
    ratios = {}
    for miner, goodput in known.items():
        ratio = float(effects[columns[miner]]) / min(reached * goodput, most)
        ratios[miner] = min(1.0, max(config.organic_ratio_min, ratio))
    return ratios


def _miner_effects(table: Floats) -> Floats:
    """Median polish of peers x miners; NaN where a pair was not timed."""
    middle = np.nanmedian if np.isnan(table).any() else np.median  # 20 times as fast
    left = table.copy()
    effects = np.zeros(table.shape[1])
    for _ in range(_POLISHES):
        left -= middle(left, axis=1, keepdims=True)
        change = middle(left, axis=0)
        left -= change
        effects += change
        if np.abs(change).max() < _TINY:
            break
    return effects
