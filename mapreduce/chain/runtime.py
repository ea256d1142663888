"""The calls that the embedded chain can dispatch, with the real chain's rules and names of errors.

Knows what a call changes and when it is refused; knows nothing of signatures, nonces or the SDK. A
new call is one more function under `@dispatchable`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from bittensor import sp_core

from mapreduce.chain import epoch
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
    from collections.abc import Callable, Mapping

    from mapreduce.chain.state import State

MAX_CIPHERTEXT_BYTES: Final = 8192
LOOPBACK: Final = {4: 0x7F000001, 6: 1}  # 127.0.0.1 and ::1: exactly these, as on the real chain

_UINT_BITS: Final = {
    "netuid": 16,
    "port": 16,
    "version": 32,
    "ip": 128,
    "ip_type": 8,
    "protocol": 8,
    "placeholder1": 8,
    "placeholder2": 8,
}


class DispatchError(Exception):
    """The chain refuses a call; `name` is the name of the runtime's error."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class UnknownCall(Exception):
    """No such call here, or arguments that it does not take."""


@dataclass(slots=True)
class Dispatch:
    """One call in progress: who signed it, at which block, and the events so far."""

    state: State
    signer: str
    block: int
    events: list[tuple[str, str, Any]] = field(default_factory=list)

    def event(self, name: str, attributes: Any, *, pallet: str = "SubtensorModule") -> None:
        """Report what happened."""
        self.events.append((pallet, name, attributes))


_DISPATCHABLES: Final[dict[tuple[str, str], Callable[..., None]]] = {}


def dispatchable(
    module: str, *functions: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the named calls; its keyword-only parameters are theirs."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for name in functions:
            _DISPATCHABLES[module, name] = function
        return function

    return register


def check_call(module: str, function: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments, with an address always as its ss58 text.

    Raises:
        UnknownCall: the embedded chain has no such call, or it does not take these arguments.
    """
    name = f"{module}.{function}"
    handler = _DISPATCHABLES.get((module, function))
    if handler is None:
        raise UnknownCall(
            f"the embedded chain does not serve {name}; it serves "
            + ", ".join(sorted(f"{m}.{f}" for m, f in _DISPATCHABLES))
        )
    parameters = [
        p for p in inspect.signature(handler).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    required = {p.name for p in parameters if p.default is p.empty}
    if not required <= params.keys() <= {p.name for p in parameters}:
        raise UnknownCall(f"{name} takes {sorted(required)}, not {sorted(params)}")
    kinds = {p.name: str(p.annotation) for p in parameters}
    return {key: _checked(name, key, kinds[key], value) for key, value in params.items()}


def _checked(call: str, key: str, kind: str, value: Any) -> Any:
    bits = _UINT_BITS.get(key, 64)
    if isinstance(value, dict) and value.keys() == {"Id"}:
        value = value["Id"]  # a MultiAddress
    if kind == "int" and type(value) is int and 0 <= value < 2**bits:
        return value
    if kind == "bool" and type(value) is bool:
        return value
    if kind == "bytes" and isinstance(value, bytes) and len(value) <= MAX_CIPHERTEXT_BYTES:
        return value
    if kind == "str" and type(value) is str:
        try:
            sp_core.ss58_decode(value)
            return value
        except ValueError:
            pass
    expected = {
        "int": f"a u{bits}",
        "str": "an ss58 address",
        "bytes": f"at most {MAX_CIPHERTEXT_BYTES} bytes",
    }.get(kind, f"a {kind}")
    raise UnknownCall(f"{call}: {key} = {value!r} is not {expected}")


def dispatch(call: Dispatch, module: str, function: str, params: Mapping[str, Any]) -> None:
    """Carry out a call that `check_call` has passed.

    Raises:
        DispatchError: the rules forbid it; the caller undoes what was written so far.
    """
    _DISPATCHABLES[module, function](call, **params)


# Registration -------------------------------------------------------------------------------------


@dispatchable("SubtensorModule", "burned_register")
def _burned_register(call: Dispatch, *, netuid: int, hotkey: str) -> None:
    state = call.state
    if netuid == ROOT_NETUID:
        raise DispatchError("RegistrationNotPermittedOnRootSubnet")
    _require_subnet(state, netuid)
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
    _require_subnet(call.state, netuid)
    if call.state.get("SubnetOwner", netuid) != call.signer:
        raise DispatchError("NotSubnetOwner")
    if call.state.get("FirstEmissionBlockNumber", netuid) is not None:
        raise DispatchError("FirstEmissionBlockNumberAlreadySet")
    start_subnet(call.state.ledger, netuid, block=call.block)
    call.event("FirstEmissionBlockNumberSet", [netuid, call.block])


# Serving ------------------------------------------------------------------------------------------


@dispatchable("SubtensorModule", "serve_axon")
def _serve_axon(
    call: Dispatch,
    *,
    netuid: int,
    version: int,
    ip: int,
    port: int,
    ip_type: int,
    protocol: int,
    placeholder1: int,
    placeholder2: int,
) -> None:
    state = call.state
    _require_subnet(state, netuid)
    if state.uid(netuid, call.signer) is None:
        raise DispatchError("HotKeyNotRegisteredInNetwork")
    if ip_type not in LOOPBACK:
        raise DispatchError("InvalidIpType")
    broadcast = 2**32 - 1 if ip_type == 4 else 2**128 - 1
    if ip >= broadcast or (state.genesis.strict and ip == LOOPBACK[ip_type]):
        raise DispatchError("InvalidIpAddress")
    previous = state.get("Axons", netuid, call.signer)
    limit = int(state.get("ServingRateLimit", netuid))
    if previous is not None and call.block - int(previous["block"]) < limit:
        raise DispatchError("ServingRateLimitExceeded")
    if port == 0:
        raise DispatchError("InvalidPort")
    axon = {
        "block": call.block,
        "version": version,
        "ip": ip,
        "port": port,
        "ip_type": ip_type,
        "protocol": protocol,
        "placeholder1": placeholder1,
        "placeholder2": placeholder2,
    }
    state.put("Axons", netuid, call.signer, value=axon)
    call.event("AxonServed", [netuid, call.signer])


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


def _require_subnet(state: State, netuid: int) -> None:
    if not state.subnet_exists(netuid):
        raise DispatchError("SubnetNotExists")


def _require_own_or_new(call: Dispatch, hotkey: str) -> None:
    """A hotkey belongs to the coldkey that registered it first."""
    owner = call.state.get("Owner", hotkey)
    if owner is None:
        call.state.adopt(hotkey, call.signer)
    elif owner != call.signer:
        raise DispatchError("NonAssociatedColdKey")


def _require_stakeable(state: State, netuid: int, hotkey: str) -> None:
    _require_subnet(state, netuid)
    if not state.get("SubtokenEnabled", netuid):
        raise DispatchError("SubtokenDisabled")
    if state.get("Owner", hotkey) is None:
        raise DispatchError("HotKeyAccountNotExists")
