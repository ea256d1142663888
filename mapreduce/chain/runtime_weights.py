"""The calls with which a validator judges miners: weights in the open, or committed under a
timelock.

Knows the checks of the real pallet, in its order and with its names (subtensor, `do_set_weights`
and `do_commit_timelocked_weights`); knows nothing of what weights lead to (`epoch`).

A commitment is accepted and recorded, but never revealed: that takes a signature of the drand
network, which a chain in a file does not fetch. Where commit-reveal is on, no new weights become
visible, and a commitment is dropped unread once its time to be revealed has passed. It is off by
default.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from mapreduce.chain.calls import DispatchError, dispatchable
from mapreduce.chain.genesis import ROOT_NETUID

if TYPE_CHECKING:
    from mapreduce.chain.calls import Dispatch
    from mapreduce.chain.state import State

U16_MAX: Final = 2**16 - 1
COMMIT_REVEAL_VERSION: Final = 4  # the only one that the runtime takes
MAX_UNREVEALED_COMMITS: Final = 10

# Every subnet has one mechanism. Its storage index, mecid * 4096 + netuid, is the netuid itself.
_MECHANISM_COUNT: Final = 1


@dispatchable("SubtensorModule", "set_weights", "set_mechanism_weights")
def _set_weights(
    call: Dispatch,
    *,
    netuid: int,
    dests: list[int],
    weights: list[int],
    version_key: int,
    mecid: int = 0,
) -> None:
    state = call.state
    if state.get("CommitRevealWeightsEnabled", netuid):
        raise DispatchError("CommitRevealEnabled")
    if netuid == ROOT_NETUID:
        raise DispatchError("CanNotSetRootNetworkWeights")
    if len(dests) != len(weights):
        raise DispatchError("WeightVecNotEqualSize")
    _require_mechanism(state, netuid, mecid)
    count = int(state.get("SubnetworkN", netuid))
    if len(dests) > count:
        raise DispatchError("UidsLengthExceedUidsInSubNet")
    uid = _require_uid(call, netuid)
    is_owner = uid == state.owner_uid(netuid)
    (stake,) = state.stakes(netuid, [call.signer])
    if not is_owner and stake.total < state.stake_threshold():
        raise DispatchError("NotEnoughStakeToSetWeights")
    required_version = int(state.get("WeightsVersionKey", netuid))
    if version_key < required_version:
        raise DispatchError("IncorrectWeightVersionKey")
    if _is_too_fast(state, netuid, uid, call.block):
        raise DispatchError("SettingWeightsTooFast")
    is_self_weight = dests == [uid]
    has_permit = bool(state.column("ValidatorPermit", netuid)[uid])
    if not (is_self_weight or is_owner or has_permit):
        raise DispatchError("NeuronNoValidatorPermit")
    if len(set(dests)) != len(dests):
        raise DispatchError("DuplicateUids")
    if any(dest >= count for dest in dests):
        raise DispatchError("UidVecContainInvalidOne")
    least = min(int(state.get("MinAllowedWeights", netuid)), count)
    if not is_self_weight and len(weights) < least:
        raise DispatchError("WeightVecLengthIsLow")
    stored = _max_upscaled(weights)
    limit = int(state.get("MaxWeightsLimit", netuid))
    if not is_self_weight and max(stored, default=0) * U16_MAX > limit * sum(stored):
        raise DispatchError("MaxWeightExceeded")
    row = [list(pair) for pair in zip(dests, stored, strict=True)]
    state.put("Weights", netuid, uid, value=row)
    state.set_cell("LastUpdate", netuid, uid, call.block)
    call.event("WeightsSet", [netuid, uid])


@dispatchable("SubtensorModule", "commit_timelocked_weights", "commit_timelocked_mechanism_weights")
def _commit_timelocked_weights(
    call: Dispatch,
    *,
    netuid: int,
    commit: bytes,
    reveal_round: int,
    commit_reveal_version: int,
    mecid: int = 0,
) -> None:
    state = call.state
    _require_mechanism(state, netuid, mecid)
    if not state.get("CommitRevealWeightsEnabled", netuid):
        raise DispatchError("CommitRevealDisabled")
    if commit_reveal_version != COMMIT_REVEAL_VERSION:
        raise DispatchError("IncorrectCommitRevealVersion")
    uid = _require_uid(call, netuid)
    if _is_too_fast(state, netuid, uid, call.block):
        raise DispatchError("CommittingWeightsTooFast")
    epoch_index = int(state.get("SubnetEpochIndex", netuid))
    _drop_expired_commits(state, netuid, epoch_index)
    commits = list(state.get("TimelockedWeightCommits", netuid, epoch_index) or [])
    if sum(who == call.signer for who, *_ in commits) >= MAX_UNREVEALED_COMMITS:
        raise DispatchError("TooManyUnrevealedCommits")
    commits.append([call.signer, call.block, "0x" + commit.hex(), reveal_round])
    state.put("TimelockedWeightCommits", netuid, epoch_index, value=commits)
    state.set_cell("LastUpdate", netuid, uid, call.block)
    digest = "0x" + blake2b(commit, digest_size=32).hexdigest()
    call.event("TimelockedWeightsCommitted", [call.signer, netuid, digest, reveal_round])


def _drop_expired_commits(state: State, netuid: int, epoch_index: int) -> None:
    oldest = epoch_index - int(state.get("RevealPeriodEpochs", netuid))
    for keys, _ in state.ledger.scan("SubtensorModule", "TimelockedWeightCommits", [netuid]):
        if int(keys[0]) < oldest:
            state.ledger.delete("SubtensorModule", "TimelockedWeightCommits", [netuid, *keys])


def _max_upscaled(weights: list[int]) -> list[int]:
    """Scaled so that the largest becomes 65535, rounded half up."""
    top = max(weights, default=0)
    if top == 0:
        return weights
    return [(2 * weight * U16_MAX + top) // (2 * top) for weight in weights]


def _require_mechanism(state: State, netuid: int, mecid: int) -> None:
    if not state.subnet_exists(netuid) or mecid >= _MECHANISM_COUNT:
        raise DispatchError("MechanismDoesNotExist")


def _require_uid(call: Dispatch, netuid: int) -> int:
    uid = call.state.uid(netuid, call.signer)
    if uid is None:
        raise DispatchError("HotKeyNotRegisteredInSubNet")
    return uid


def _is_too_fast(state: State, netuid: int, uid: int, block: int) -> bool:
    """Whether the rate limit has not passed yet; 0 stands for "never"."""
    last = int(state.column("LastUpdate", netuid)[uid])
    return last != 0 and block - last < int(state.get("WeightsSetRateLimit", netuid))
