"""Whom to doubt over disputes that nobody can prove, by counting distinct counterparties.

Knows who disputed with whom in one window, and how many took part. Knows nothing of evidence, time
or scores, and a flag is no proof: it follows from many claims, each of which may be a lie.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# docs/trust.md, "Who is blamed": max(3, 20 %) distinct counterparties with disputes with < 2 others
MIN_ACCUSERS = 3
MIN_ACCUSERS_PERCENT = 20
MAX_OTHER_DISPUTES = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """Hotkeys in doubt after one window."""

    miners: frozenset[str]
    peers: frozenset[str]


def flagged(disputes: Iterable[tuple[str, str]], peer_count: int, miner_count: int) -> Flags:
    """Who is to be doubted after a window with these disputes, each (peer's owner, miner hotkey).

    A pair counts once, however often it disputed. The counts are those of the distinct peers and
    miners that were active in the window, in dispute or not.

    A party is flagged if enough distinct counterparties dispute with it: `MIN_ACCUSERS`, and
    `MIN_ACCUSERS_PERCENT` of all there were. One that disputes with more than `MAX_OTHER_DISPUTES`
    others as well is no accuser: the fault may be its own. So a single party can get nobody
    flagged but itself.
    """
    by_peer: defaultdict[str, set[str]] = defaultdict(set)
    by_miner: defaultdict[str, set[str]] = defaultdict(set)
    for peer, miner in disputes:
        by_peer[peer].add(miner)
        by_miner[miner].add(peer)
    return Flags(
        miners=_flagged_side(by_miner, by_peer, peer_count),
        peers=_flagged_side(by_peer, by_miner, miner_count),
    )


def _flagged_side(
    accused: dict[str, set[str]], others: dict[str, set[str]], other_count: int
) -> frozenset[str]:
    credible = {who for who, against in others.items() if len(against) <= 1 + MAX_OTHER_DISPUTES}
    return frozenset(
        who
        for who, accusers in accused.items()
        if (count := len(accusers & credible)) >= MIN_ACCUSERS
        and count * 100 >= MIN_ACCUSERS_PERCENT * other_count
    )
