"""Parties that lie, for tests: miners and peers that differ from the shipped ones in one thing.

`FAULTS` names every lie, who tells it, and the verdict that it must end in. None of this is
reachable from the shipped programs: a liar is started from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A lie: `by` a miner or a peer; `proof` is what convicts it, F1 to F4, or None; `ledger` is
    where it is kept if nothing can be proven, None if nobody is to blame at all. `error` is what
    honest ranks get from the collective, at the latest from the next one."""

    by: Literal["miner", "peer"]
    proof: Literal["F1", "F2", "F3", "F4"] | None = None
    ledger: Literal["unavailable", "unattributed"] | None = None
    errors: tuple[str, ...] = ()


FAULTS = {
    # Miners.
    "wrong_block": Fault(by="miner", proof="F1", errors=("MinerFraud",)),
    "one_ulp": Fault(by="miner", proof="F1", errors=("MinerFraud",)),
    "peer_left_out": Fault(by="miner", proof="F1", errors=("MinerFraud",)),
    "stale_result": Fault(by="miner", proof="F1", errors=("MinerFraud",)),
    "other_input": Fault(by="miner", proof="F2", errors=("MinerFraud",)),
    "two_certificates": Fault(by="miner", proof="F3", errors=("MinerFraud",)),
    "two_faced": Fault(
        by="miner", proof="F3", errors=("MinerFraud", "CertificateConflict", "StepInDoubt")
    ),
    "wrong_root": Fault(by="miner", ledger="unattributed", errors=("ResultDisputed",)),
    "false_reject": Fault(by="miner", ledger="unattributed", errors=("ResultDisputed",)),
    "truncated": Fault(by="miner", errors=("MinerLost",)),
    "withheld_commit": Fault(by="miner", errors=("MinerLost", "StepInDoubt")),
    # Peers.
    "two_uploads": Fault(by="peer", proof="F4", errors=("PeerFraud",)),
    "lying_input": Fault(by="peer", ledger="unattributed", errors=("ResultDisputed",)),
    "false_accusation": Fault(by="peer", ledger="unattributed", errors=("ResultDisputed",)),
    "withheld_nonce": Fault(by="peer", errors=("PeerLost",)),
    "withheld_opening": Fault(by="peer", ledger="unavailable"),
}
