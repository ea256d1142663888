"""Epochs of the embedded chain: when one is due and what it does. Knows tempo, stake and what
weights earn; knows nothing of extrinsics.

No process drives the chain. Whoever touches it first after an epoch has fallen due runs it; epochs
missed while nobody looked run as one, whose emission is that of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mapreduce.chain.consensus import Ballot, count
from mapreduce.chain.genesis import OWN_PALLET, RAO_PER_TAO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mapreduce.chain.state import State

# Per block one alpha, of which 18 % are the owner's cut (subtensor's defaults). Half of the rest
# goes to miners, half to validators. It is a figure to read and to prune by: no stake grows.
EMISSION_RAO_PER_BLOCK: Final = 82 * RAO_PER_TAO // 100

_U16_MAX: Final = 2**16 - 1


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
            share_emission(state, netuid, last)
            grant_permits(state, netuid)  # after the count: it is the old permits that voted
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


def share_emission(state: State, netuid: int, block: int) -> None:
    """Count the weights and write down what each neuron earns (columns `Incentive`, `Dividends`,
    `Emission`), with the consensus behind it and who is active."""
    tempo = int(state.get("Tempo", netuid))
    registered = state.ledger.scan("SubtensorModule", "BlockAtRegistration", [netuid])
    weights = state.ledger.scan("SubtensorModule", "Weights", [netuid])
    verdict = count(
        Ballot(
            stakes=_counting_stakes(state, netuid),
            permits=state.column("ValidatorPermit", netuid),
            last_update=state.column("LastUpdate", netuid),
            registered_at=[int(block) for _, block in registered],
            weights={int(keys[0]): row for keys, row in weights},
            owner_uid=state.owner_uid(netuid),
            block=block,
            # The runtime's own formula; the hyperparameter `activity_cutoff` is its older form.
            activity_cutoff_blocks=int(state.get("ActivityCutoffFactorMilli", netuid))
            * tempo
            // 1000,
            kappa=int(state.get("Kappa", netuid)) / _U16_MAX,
        )
    )
    state.put("Active", netuid, value=verdict.active)
    state.put("Consensus", netuid, value=_as_u16(verdict.consensus))
    state.put("Incentive", netuid, value=_as_u16(verdict.incentive))
    state.put("Dividends", netuid, value=_as_u16(verdict.dividends))
    emission_rao = EMISSION_RAO_PER_BLOCK * tempo
    state.put("Emission", netuid, value=[int(share * emission_rao) for share in verdict.emission])


def grant_permits(state: State, netuid: int) -> None:
    """Validator permits for the hotkeys with the most stake, `max_validators` at most, and for the
    subnet's owner."""
    seats = int(state.get("MaxAllowedValidators", netuid))
    stakes = _counting_stakes(state, netuid)
    ranking = sorted((-stake, uid) for uid, stake in enumerate(stakes) if stake > 0)
    permitted = {uid for _, uid in ranking[:seats]} | {state.owner_uid(netuid)}
    state.put("ValidatorPermit", netuid, value=[uid in permitted for uid in range(len(stakes))])


def _counting_stakes(state: State, netuid: int) -> list[int]:
    """The stake of each uid, 0 below the threshold; the owner's always counts."""
    threshold, owner = state.stake_threshold(), state.owner_uid(netuid)
    stakes = state.stakes(netuid, [hotkey for _, hotkey in state.neurons(netuid)])
    return [
        stake.total if stake.total >= threshold or uid == owner else 0
        for uid, stake in enumerate(stakes)
    ]


def _as_u16(shares: Sequence[float]) -> list[int]:
    """Fractions as the chain stores them: of 65535, rounded down."""
    return [int(share * _U16_MAX) for share in shares]
