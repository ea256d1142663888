"""The calls that the embedded chain can dispatch, with the real chain's rules and names of errors:
registration, stake and transfers here, what neurons publish and weights in the modules beside it.

Knows what a call changes and when it is refused; knows nothing of signatures, nonces or the SDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapreduce.chain import epoch, runtime_publish, runtime_weights
from mapreduce.chain.calls import (
    Dispatch,
    DispatchError,
    UnknownCall,
    check_call,
    dispatch,
    dispatchable,
    require_subnet,
)
from mapreduce.chain.genesis import (
    ALPHA_PRICE_RAO,
    EXISTENTIAL_DEPOSIT_RAO,
    MIN_STAKE_RAO,
    NETWORK_COST_RAO,
    ROOT_NETUID,
    start_subnet,
    write_subnet,
)

if TYPE_CHECKING:
    from mapreduce.chain.state import State

# Importing this module makes every call known, wherever it stands.
__all__ = [
    "Dispatch",
    "DispatchError",
    "UnknownCall",
    "check_call",
    "dispatch",
    "runtime_publish",
    "runtime_weights",
]


# Registration -------------------------------------------------------------------------------------


@dispatchable("SubtensorModule", "burned_register")
def _burned_register(call: Dispatch, *, netuid: int, hotkey: str) -> None:
    state = call.state
    if netuid == ROOT_NETUID:
        raise DispatchError("RegistrationNotPermittedOnRootSubnet")
    require_subnet(state, netuid)
    if not state.get("NetworkRegistrationAllowed", netuid):
        raise DispatchError("SubNetRegistrationDisabled")
    if state.uid(netuid, hotkey) is not None:
        raise DispatchError("HotKeyAlreadyRegisteredInSubNet")
    _require_own_or_new(call, hotkey)
    cost = int(state.get("Burn", netuid))
    if not state.can_spend(call.signer, cost):
        raise DispatchError("NotEnoughBalanceToStake")
    uid = _free_uid(state, netuid, call.block)
    state.credit(call.signer, -cost)
    state.place_neuron(netuid, uid, hotkey, call.block)
    call.event("NeuronRegistered", [netuid, uid, hotkey])


def _free_uid(state: State, netuid: int, block: int) -> int:
    """The next uid, or on a full subnet that of the neuron with the lowest emission that is not
    immune.

    Ties go to the older registration, then to the lower uid.
    """
    count = int(state.get("SubnetworkN", netuid))
    if count < int(state.get("MaxAllowedUids", netuid)):
        return count
    immunity = int(state.get("ImmunityPeriod", netuid))
    emission = state.column("Emission", netuid)
    owner_hotkey = state.get("SubnetOwnerHotkey", netuid)
    candidates = []
    for uid, hotkey in state.neurons(netuid):
        registered = int(state.get("BlockAtRegistration", netuid, uid))
        if block - registered >= immunity and hotkey != owner_hotkey:
            candidates.append((emission[uid], registered, uid))
    if not candidates:
        raise DispatchError("NoNeuronIdAvailable")
    return int(min(candidates)[2])


@dispatchable("SubtensorModule", "register_network")
def _register_network(call: Dispatch, *, hotkey: str) -> None:
    state = call.state
    _require_own_or_new(call, hotkey)
    if not state.can_spend(call.signer, NETWORK_COST_RAO):
        raise DispatchError("CannotAffordLockCost")
    taken = set(state.netuids())
    netuid = next(n for n in range(1, 2**16) if n not in taken)
    state.credit(call.signer, -NETWORK_COST_RAO)
    write_subnet(
        state.ledger,
        state.genesis,
        netuid,
        f"subnet {netuid}",
        f"s{netuid}",
        owner=call.signer,
        block=call.block,
    )
    state.put("SubnetOwnerHotkey", netuid, value=hotkey)
    state.place_neuron(netuid, 0, hotkey, call.block)
    epoch.schedule(state)
    call.event("NetworkAdded", [netuid, 1])


@dispatchable("SubtensorModule", "start_call")
def _start_call(call: Dispatch, *, netuid: int) -> None:
    require_subnet(call.state, netuid)
    if call.state.get("SubnetOwner", netuid) != call.signer:
        raise DispatchError("NotSubnetOwner")
    if call.state.get("FirstEmissionBlockNumber", netuid) is not None:
        raise DispatchError("FirstEmissionBlockNumberAlreadySet")
    start_subnet(call.state.ledger, netuid, block=call.block)
    call.event("FirstEmissionBlockNumberSet", [netuid, call.block])


# Stake: one alpha always costs one TAO ------------------------------------------------------------


@dispatchable("SubtensorModule", "add_stake", "add_stake_limit")
def _add_stake(
    call: Dispatch,
    *,
    hotkey: str,
    netuid: int,
    amount_staked: int,
    limit_price: int = ALPHA_PRICE_RAO,
    allow_partial: bool = False,
) -> None:
    del allow_partial  # the price never moves, so an order is filled as a whole or not at all
    state = call.state
    _require_stakeable(state, netuid, hotkey)
    if amount_staked < MIN_STAKE_RAO:
        raise DispatchError("AmountTooLow")
    if limit_price < ALPHA_PRICE_RAO:
        raise DispatchError("SlippageTooHigh")
    if not state.can_spend(call.signer, amount_staked):
        raise DispatchError("NotEnoughBalanceToStake")
    state.credit(call.signer, -amount_staked)
    state.move_stake(call.signer, hotkey, netuid, amount_staked)
    _after_stake_changed(state, netuid)
    call.event("StakeAdded", [call.signer, hotkey, amount_staked, amount_staked, netuid, 0])


@dispatchable("SubtensorModule", "remove_stake", "remove_stake_limit")
def _remove_stake(
    call: Dispatch,
    *,
    hotkey: str,
    netuid: int,
    amount_unstaked: int,
    limit_price: int = ALPHA_PRICE_RAO,
    allow_partial: bool = False,
) -> None:
    del allow_partial  # as in `_add_stake`
    state = call.state
    _require_stakeable(state, netuid, hotkey)
    held = state.position(call.signer, hotkey, netuid)
    if amount_unstaked > held:
        raise DispatchError("NotEnoughStakeToWithdraw")
    if amount_unstaked < MIN_STAKE_RAO or 0 < held - amount_unstaked < MIN_STAKE_RAO:
        raise DispatchError("AmountTooLow")
    if limit_price > ALPHA_PRICE_RAO:
        raise DispatchError("SlippageTooHigh")
    state.move_stake(call.signer, hotkey, netuid, -amount_unstaked)
    state.credit(call.signer, amount_unstaked)
    _after_stake_changed(state, netuid)
    call.event("StakeRemoved", [call.signer, hotkey, amount_unstaked, amount_unstaked, netuid, 0])


def _after_stake_changed(state: State, netuid: int) -> None:
    if not state.genesis.strict:
        # The convenience of a chain for one machine: nobody waits an epoch for a permit. Stake on
        # root counts on every subnet.
        for affected in state.netuids() if netuid == ROOT_NETUID else [netuid]:
            epoch.grant_permits(state, affected)


# Balances and the shield --------------------------------------------------------------------------


@dispatchable("Balances", "transfer_keep_alive", "transfer_allow_death")
def _transfer(call: Dispatch, *, dest: str, value: int) -> None:
    # An account here never dies: one that the ledger does not know would start anew with test TAO.
    if not call.state.can_spend(call.signer, value):
        raise DispatchError("FundsUnavailable")
    if call.state.account(dest)["data"]["free"] + value < EXISTENTIAL_DEPOSIT_RAO:
        raise DispatchError("BelowMinimum")
    call.state.credit(call.signer, -value)
    call.state.credit(dest, value)
    attributes = {"from": call.signer, "to": dest, "amount": value}
    call.event("Transfer", attributes, pallet="Balances")


@dispatchable("MevShield", "submit_encrypted")
def _submit_encrypted(call: Dispatch, *, ciphertext: bytes) -> None:
    # Only the fact is recorded here: who executes the block decrypts and applies what is inside.
    call.event("EncryptedSubmitted", {"who": call.signer}, pallet="MevShield")


# What several calls ask ---------------------------------------------------------------------------


def _require_own_or_new(call: Dispatch, hotkey: str) -> None:
    """A hotkey belongs to the coldkey that registered it first."""
    owner = call.state.get("Owner", hotkey)
    if owner is None:
        call.state.adopt(hotkey, call.signer)
    elif owner != call.signer:
        raise DispatchError("NonAssociatedColdKey")


def _require_stakeable(state: State, netuid: int, hotkey: str) -> None:
    require_subnet(state, netuid)
    if not state.get("SubtokenEnabled", netuid):
        raise DispatchError("SubtokenDisabled")
    if state.get("Owner", hotkey) is None:
        raise DispatchError("HotKeyAccountNotExists")
