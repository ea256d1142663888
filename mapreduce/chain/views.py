"""The runtime APIs that the SDK reads: metagraph, neurons, stake, hyperparameters, prices. Knows
the shape of their records; changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mapreduce.chain import epoch
from mapreduce.chain.genesis import (
    ALPHA_PRICE_RAO,
    HYPERPARAMETERS,
    NETWORK_COST_RAO,
    OWN_PALLET,
    POOL_RAO,
    ROOT_NETUID,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mapreduce.chain.state import State

Record = dict[str, Any]

_NEVER_SERVED: Final = dict.fromkeys(
    ("block", "version", "ip", "port", "ip_type", "protocol", "placeholder1", "placeholder2"), 0
)
_NO_PROMETHEUS: Final = dict.fromkeys(("block", "version", "ip", "port", "ip_type"), 0)


class View:
    """The state at one block, read-only."""

    def __init__(self, state: State, block: int) -> None:
        self.state = state
        self.block = block


_APIS: Final[dict[tuple[str, str], Callable[..., Any]]] = {}


def _serves(api: str, *methods: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for method in methods:
            _APIS[api, method] = function
        return function

    return register


def serves(api: str, method: str) -> bool:
    """Whether the embedded chain answers this runtime API."""
    return (api, method) in _APIS


def call(view: View, api: str, method: str, params: Sequence[Any] | Mapping[str, Any]) -> Any:
    """Answer a runtime API that `serves` names.

    Raises:
        TypeError: the arguments do not fit.
    """
    function = _APIS[api, method]
    if isinstance(params, (list, tuple)):
        return function(view, *params)
    return function(view, **dict(params))


# Subnets ------------------------------------------------------------------------------------------


@_serves("SubnetInfoRuntimeApi", "get_subnet_hyperparams_v3")
def _hyperparameters(view: View, netuid: int) -> list[Record] | None:
    if not view.state.subnet_exists(netuid):
        return None
    return [
        {"name": p.name, "value": {p.tag: _tagged(p.tag, view.state.get(p.storage, netuid))}}
        for p in HYPERPARAMETERS
    ]


def _tagged(tag: str, value: Any) -> Any:
    return {"bits": value} if tag in ("I32F32", "U64F64") else value


@_serves("SubnetInfoRuntimeApi", "get_next_epoch_start_block")
def _next_epoch(view: View, netuid: int) -> int | None:
    return epoch.next_epoch_block(view.state, netuid)


@_serves("SubnetInfoRuntimeApi", "get_metagraph")
def _metagraph(view: View, netuid: int) -> Record | None:
    state = view.state
    if not state.subnet_exists(netuid):
        return None
    neurons = state.neurons(netuid)
    hotkeys = [hotkey for _, hotkey in neurons]
    stakes = state.stakes(netuid, hotkeys)
    owners = state.owners()
    axons = dict(_by_key(view, "Axons", netuid))
    registered = dict(_by_key(view, "BlockAtRegistration", netuid))
    last_step = int(state.get("LastEpochBlock", netuid))
    name = (state.get("SubnetIdentitiesV3", netuid) or {}).get("subnet_name", "")
    return {
        "netuid": netuid,
        "name": list(name.encode()),
        "symbol": state.get("TokenSymbol", netuid),
        "identity": None,
        "network_registered_at": state.get("NetworkRegisteredAt", netuid),
        "owner_hotkey": state.get("SubnetOwnerHotkey", netuid),
        "owner_coldkey": state.get("SubnetOwner", netuid),
        "block": view.block,
        "tempo": state.get("Tempo", netuid),
        "last_step": last_step,
        "blocks_since_last_step": view.block - last_step,
        "num_uids": len(neurons),
        "max_uids": state.get("MaxAllowedUids", netuid),
        "burn": state.get("Burn", netuid),
        "tao_in": POOL_RAO,
        "alpha_in": POOL_RAO,
        "moving_price": {"bits": 1 << 32},
        **{
            p.name: state.get(p.storage, netuid)
            for p in HYPERPARAMETERS
            if p.name not in ("tempo", "subnet_is_active")
        },
        "hotkeys": hotkeys,
        "coldkeys": [owners[hotkey] for hotkey in hotkeys],
        "identities": [None] * len(neurons),
        "axons": [axons.get(hotkey, _NEVER_SERVED) for hotkey in hotkeys],
        "active": state.column("Active", netuid),
        "validator_permit": state.column("ValidatorPermit", netuid),
        "last_update": state.column("LastUpdate", netuid),
        "block_at_registration": [registered[uid] for uid, _ in neurons],
        # Empty on the real chain too: these scores are deprecated there.
        "rank": [],
        "trust": [],
        "pruning_score": [],
        "consensus": state.column("Consensus", netuid),
        "incentives": state.column("Incentive", netuid),
        "dividends": state.column("Dividends", netuid),
        "emission": state.column("Emission", netuid),
        "alpha_stake": [stake.alpha for stake in stakes],
        "tao_stake": [stake.tao for stake in stakes],
        "total_stake": [stake.total for stake in stakes],
    }


def _by_key(view: View, item: str, netuid: int) -> list[tuple[Any, Any]]:
    entries = view.state.ledger.scan("SubtensorModule", item, [netuid])
    return [(key[0], value) for key, value in entries]


@_serves("SubnetRegistrationRuntimeApi", "get_network_registration_cost")
def _network_cost(view: View) -> int:
    return NETWORK_COST_RAO


# Neurons ------------------------------------------------------------------------------------------


@_serves("NeuronInfoRuntimeApi", "get_neurons_lite")
def _neurons_lite(view: View, netuid: int) -> list[Record]:
    state = view.state
    columns = {
        item: state.column(item, netuid)
        for item in (
            "Active",
            "Emission",
            "Incentive",
            "Consensus",
            "Dividends",
            "LastUpdate",
            "ValidatorPermit",
        )
    }
    axons = dict(_by_key(view, "Axons", netuid))
    neurons = state.neurons(netuid)
    stakes = state.stakes(netuid, [hotkey for _, hotkey in neurons])
    owners = state.owners()
    records = []
    for uid, hotkey in neurons:
        coldkey = owners[hotkey]
        cell = {item: column[uid] for item, column in columns.items()}
        records.append(
            {
                "hotkey": hotkey,
                "coldkey": coldkey,
                "uid": uid,
                "netuid": netuid,
                "active": cell["Active"],
                "axon_info": axons.get(hotkey, _NEVER_SERVED),
                "prometheus_info": _NO_PROMETHEUS,
                "stake": [(coldkey, stakes[uid].total)],
                "rank": 0,
                "emission": cell["Emission"],
                "incentive": cell["Incentive"],
                "consensus": cell["Consensus"],
                "trust": 0,
                "validator_trust": 0,
                "dividends": cell["Dividends"],
                "last_update": cell["LastUpdate"],
                "validator_permit": cell["ValidatorPermit"],
                "pruning_score": 0,
            }
        )
    return records


@_serves("NeuronInfoRuntimeApi", "get_neurons")
def _neurons(view: View, netuid: int) -> list[Record]:
    weights = dict(_by_key(view, "Weights", netuid))
    bonds = dict(_by_key(view, "Bonds", netuid))
    return [
        {**record, "weights": weights.get(record["uid"], []), "bonds": bonds.get(record["uid"], [])}
        for record in _neurons_lite(view, netuid)
    ]


# Stake and prices ---------------------------------------------------------------------------------


def _stake_record(view: View, coldkey: str, hotkey: str, netuid: int, rao: int) -> Record:
    return {
        "hotkey": hotkey,
        "coldkey": coldkey,
        "netuid": netuid,
        "stake": rao,
        "locked": 0,
        "emission": 0,
        "tao_emission": 0,
        "drain": 0,
        "is_registered": view.state.uid(netuid, hotkey) is not None,
    }


@_serves("StakeInfoRuntimeApi", "get_stake_info_for_hotkey_coldkey_netuid")
def _stake_info(view: View, hotkey: str, coldkey: str, netuid: int) -> Record:
    held = view.state.position(coldkey, hotkey, netuid)
    return _stake_record(view, coldkey, hotkey, netuid, held)


@_serves("StakeInfoRuntimeApi", "get_stake_info_for_coldkey")
def _stake_infos(view: View, coldkey: str) -> list[Record]:
    return [
        _stake_record(view, coldkey, str(keys[0]), int(keys[1]), rao)
        for keys, rao in view.state.ledger.scan(OWN_PALLET, "Stake", [coldkey])
    ]


@_serves("StakeInfoRuntimeApi", "get_stake_info_for_coldkeys")
def _stake_infos_of_all(view: View, coldkeys: list[str]) -> list[tuple[str, list[Record]]]:
    return [(coldkey, _stake_infos(view, coldkey)) for coldkey in coldkeys]


@_serves("SwapRuntimeApi", "current_alpha_price")
def _price(view: View, netuid: int) -> int:
    return ALPHA_PRICE_RAO


@_serves("SwapRuntimeApi", "current_alpha_price_all")
def _prices(view: View) -> list[Record]:
    return [
        {"netuid": netuid, "price": ALPHA_PRICE_RAO}
        for netuid in view.state.netuids()
        if netuid != ROOT_NETUID
    ]


def _swap(rao: int) -> Record:
    return {
        "tao_amount": rao,
        "alpha_amount": rao,
        "tao_fee": 0,
        "alpha_fee": 0,
        "tao_slippage": 0,
        "alpha_slippage": 0,
    }


@_serves("SwapRuntimeApi", "sim_swap_tao_for_alpha")
def _buy(view: View, netuid: int, tao: int) -> Record:
    return _swap(tao)


@_serves("SwapRuntimeApi", "sim_swap_alpha_for_tao")
def _sell(view: View, netuid: int, alpha: int) -> Record:
    return _swap(alpha)
