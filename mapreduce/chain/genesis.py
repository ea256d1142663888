"""What a new embedded chain holds. Knows its parameters, the hyperparameters of a subnet and their
defaults; knows nothing of what later happens to them.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mapreduce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mapreduce.chain.ledger import Ledger

RAO_PER_TAO: Final = 10**9
MAPREDUCE_NETUID: Final = 10
ROOT_NETUID: Final = 0

FREE_RAO: Final = 10_000 * RAO_PER_TAO
"""What an account that the chain has never seen holds, so that a newcomer needs no faucet."""
EXISTENTIAL_DEPOSIT_RAO: Final = 500
MIN_STAKE_RAO: Final = 2_000_000
NETWORK_COST_RAO: Final = 100 * RAO_PER_TAO
POOL_RAO: Final = (
    1_000_000 * RAO_PER_TAO
)  # both sides of every pool: the price is 1 and stays there
ALPHA_PRICE_RAO: Final = RAO_PER_TAO
STRICT_STAKE_THRESHOLD_RAO: Final = RAO_PER_TAO
"""What a validator must have staked on a strict chain; finney asks for about 1000 TAO."""
TAO_WEIGHT: Final = 0.18  # how much stake on root counts beside alpha

# The development account //Alice owns the subnets of a new chain, as she does on a local node.
GENESIS_OWNER: Final = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"

OWN_PALLET: Final = "Embedded"  # entries that a real chain keeps in another form, or not at all


class Hyperparameter(NamedTuple):
    """One entry of `get_subnet_hyperparams_v3`; the chain names its value's type, `tag`."""

    name: str
    storage: str
    tag: str
    default: int | bool
    strict_default: int | bool | None = None


HYPERPARAMETERS: Final = (
    Hyperparameter("kappa", "Kappa", "U16", 32767),
    Hyperparameter("immunity_period", "ImmunityPeriod", "U16", 5000),
    Hyperparameter("min_allowed_weights", "MinAllowedWeights", "U16", 1),
    Hyperparameter("max_weights_limit", "MaxWeightsLimit", "U16", 65535),
    Hyperparameter("tempo", "Tempo", "U16", 360),
    Hyperparameter("weights_version", "WeightsVersionKey", "U64", 0),
    Hyperparameter("weights_rate_limit", "WeightsSetRateLimit", "U64", 0, 100),
    Hyperparameter("activity_cutoff", "ActivityCutoff", "U16", 5000),
    Hyperparameter("activity_cutoff_factor", "ActivityCutoffFactorMilli", "U32", 13889),
    Hyperparameter("registration_allowed", "NetworkRegistrationAllowed", "Bool", True),
    Hyperparameter("target_regs_per_interval", "TargetRegistrationsPerInterval", "U16", 1),
    Hyperparameter("min_burn", "MinBurn", "TaoBalance", 500_000),
    Hyperparameter("max_burn", "MaxBurn", "TaoBalance", 100 * RAO_PER_TAO),
    Hyperparameter("burn_half_life", "BurnHalfLife", "U16", 360),
    Hyperparameter("burn_increase_mult", "BurnIncreaseMult", "U64F64", 1 << 64),
    Hyperparameter("bonds_moving_avg", "BondsMovingAverage", "U64", 900_000),
    Hyperparameter("max_regs_per_block", "MaxRegistrationsPerBlock", "U16", 256),
    Hyperparameter("serving_rate_limit", "ServingRateLimit", "U64", 0, 50),
    Hyperparameter("max_validators", "MaxAllowedValidators", "U16", 64),
    Hyperparameter("commit_reveal_period", "RevealPeriodEpochs", "U64", 1),
    Hyperparameter("commit_reveal_weights_enabled", "CommitRevealWeightsEnabled", "Bool", False),
    Hyperparameter("alpha_high", "AlphaHigh", "U16", 58982),
    Hyperparameter("alpha_low", "AlphaLow", "U16", 45875),
    Hyperparameter("liquid_alpha_enabled", "LiquidAlphaOn", "Bool", False),
    Hyperparameter("alpha_sigmoid_steepness", "AlphaSigmoidSteepness", "I32F32", 1000 << 32),
    Hyperparameter("yuma_version", "YumaVersion", "U16", 3),
    Hyperparameter("subnet_is_active", "SubtokenEnabled", "Bool", False),
    Hyperparameter("transfers_enabled", "TransferToggle", "Bool", True),
    Hyperparameter("bonds_reset_enabled", "BondsResetOn", "Bool", False),
    Hyperparameter("user_liquidity_enabled", "EnabledUserLiquidity", "Bool", False),
    Hyperparameter("owner_cut_enabled", "OwnerCutEnabled", "Bool", True),
    Hyperparameter("owner_cut_auto_lock_enabled", "OwnerCutAutoLockEnabled", "Bool", False),
    Hyperparameter("min_childkey_take", "MinChildkeyTake", "U16", 0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Genesis:
    """What a chain was created with; stored in it and never changed."""

    hash: str
    created_at_s: float
    """Unix time of block 1."""
    block_time_s: float
    strict: bool
    """The real chain's refusals and delays, instead of a newcomer's convenience."""
    max_uids: int
    hyperparameters: Mapping[str, int | bool]
    """What differs from the defaults, on every subnet of the chain."""


def new_genesis(
    *,
    now_s: float,
    block_time_s: float = 0.25,
    strict: bool = False,
    max_uids: int = 256,
    hyperparameters: Mapping[str, int | bool] = MappingProxyType({}),
) -> Genesis:
    """The parameters of a new chain.

    Raises:
        ConfigError: a value out of range, or a hyperparameter that no subnet has.
    """
    if not 0.001 <= block_time_s <= 3600:
        raise ConfigError(f"block_time_s = {block_time_s!r}: allowed is 0.001 to 3600 seconds")
    if not 1 <= max_uids <= 4096:
        raise ConfigError(f"max_uids = {max_uids!r}: allowed is 1 to 4096")
    defaults = {parameter.name: parameter.default for parameter in HYPERPARAMETERS}
    for name, value in hyperparameters.items():
        if name not in defaults:
            known = ", ".join(sorted(defaults))
            raise ConfigError(f"no hyperparameter {name!r}; there are: {known}")
        if type(value) is not type(defaults[name]) or value < 0:
            raise ConfigError(f"hyperparameter {name} = {value!r}: the default is {defaults[name]}")
    return Genesis(
        hash="0x" + secrets.token_hex(32),  # random: an extrinsic of one chain is void on another
        created_at_s=now_s,
        block_time_s=block_time_s,
        strict=strict,
        max_uids=max_uids,
        hyperparameters=dict(hyperparameters),
    )


def write_genesis(ledger: Ledger, genesis: Genesis) -> None:
    """Fill a new ledger: the parameters and the started subnets root (0), 1 and ours (10)."""
    ledger.put(OWN_PALLET, "Genesis", [], asdict(genesis))
    ledger.put("System", "Number", [], 1)
    if genesis.strict:
        ledger.put("SubtensorModule", "StakeThreshold", [], STRICT_STAKE_THRESHOLD_RAO)
    for netuid, name, symbol in (
        (ROOT_NETUID, "root", "\u03c4"),
        (1, "apex", "\u03b1"),
        (MAPREDUCE_NETUID, "mapreduce", "\u03ba"),
    ):
        write_subnet(ledger, genesis, netuid, name, symbol, owner=GENESIS_OWNER, block=1)
        ledger.put("SubtensorModule", "SubnetOwnerHotkey", [netuid], GENESIS_OWNER)
        start_subnet(ledger, netuid, block=1)


def write_subnet(
    ledger: Ledger,
    genesis: Genesis,
    netuid: int,
    name: str,
    symbol: str,
    *,
    owner: str,
    block: int,
) -> None:
    """An empty subnet that is not started yet."""

    def put(item: str, value: Any) -> None:
        ledger.put("SubtensorModule", item, [netuid], value)

    for parameter in HYPERPARAMETERS:
        value = parameter.default
        if genesis.strict and parameter.strict_default is not None:
            value = parameter.strict_default
        put(parameter.storage, genesis.hyperparameters.get(parameter.name, value))
    put("NetworksAdded", True)
    put("NetworkRegisteredAt", block)
    put("SubnetOwner", owner)
    put("SubnetMechanism", 1)
    put("SubnetLocked", NETWORK_COST_RAO)
    put("TokenSymbol", list(symbol.encode()))
    put("SubnetIdentitiesV3", {"subnet_name": name})
    put("Burn", RAO_PER_TAO // 10)
    put("SubnetworkN", 0)
    put("MaxAllowedUids", genesis.max_uids)
    put("LastEpochBlock", block)
    put("SubnetEpochIndex", 0)


def start_subnet(ledger: Ledger, netuid: int, *, block: int) -> None:
    """Let stake be added and epochs count."""
    ledger.put("SubtensorModule", "SubtokenEnabled", [netuid], True)
    ledger.put("SubtensorModule", "FirstEmissionBlockNumber", [netuid], block)


def read_genesis(ledger: Ledger) -> Genesis:
    """The parameters of an existing chain."""
    return Genesis(**ledger.get(OWN_PALLET, "Genesis"))
