"""Epochs of the embedded chain: when one is due and what it does. Knows tempo and stake; knows
nothing of extrinsics.

No process drives the chain. Whoever touches it first after an epoch has fallen due runs it; epochs
missed while nobody looked run as one. A later part of an epoch (consensus over weights, emission)
is one more function in `_STEPS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mapreduce.chain.genesis import OWN_PALLET

if TYPE_CHECKING:
    from collections.abc import Callable

    from mapreduce.chain.state import State


def due(state: State, block: int) -> bool:
    """Whether some subnet's epoch waits; one lookup, asked before every access."""
    following = state.ledger.get(OWN_PALLET, "NextEpoch")
    return following is None or block >= int(following)


def run_due(state: State, block: int) -> None:
    """Run each epoch that has fallen due by `block`, inside the caller's write transaction."""
    upcoming = []
    for netuid in state.netuids():
        tempo = int(state.get("Tempo", netuid))
        if tempo == 0:
            continue  # a subnet without epochs, as on the real chain
        last = int(state.get("LastEpochBlock", netuid))
        if block >= last + tempo:
            last += (block - last) // tempo * tempo
            for step in _STEPS:
                step(state, netuid)
            state.put("LastEpochBlock", netuid, value=last)
            state.put("LastMechansimStepBlock", netuid, value=last)
            index = int(state.get("SubnetEpochIndex", netuid))
            state.put("SubnetEpochIndex", netuid, value=index + 1)
        upcoming.append(last + tempo)
    state.ledger.put(OWN_PALLET, "NextEpoch", [], min(upcoming, default=2**62))


def schedule(state: State) -> None:
    """Have the next access look at every subnet again, because one of them changed its epochs."""
    state.ledger.delete(OWN_PALLET, "NextEpoch", [])


def next_epoch_block(state: State, netuid: int) -> int | None:
    """The block at which the subnet's next epoch falls due; None for one that has no epochs."""
    if not state.subnet_exists(netuid):
        return None
    tempo = int(state.get("Tempo", netuid))
    return int(state.get("LastEpochBlock", netuid)) + tempo if tempo else None


def grant_permits(state: State, netuid: int) -> None:
    """Validator permits for the hotkeys with the most stake, `max_validators` at most."""
    seats = int(state.get("MaxAllowedValidators", netuid))
    stakes = state.stakes(netuid, [hotkey for _, hotkey in state.neurons(netuid)])
    ranking = sorted((-stake.total, uid) for uid, stake in enumerate(stakes) if stake.total > 0)
    permitted = {uid for _, uid in ranking[:seats]}
    state.put("ValidatorPermit", netuid, value=[uid in permitted for uid in range(len(stakes))])


_STEPS: Final[tuple[Callable[[State, int], None], ...]] = (grant_permits,)
