"""What a call of the embedded chain is: its arguments, checked; who signs it; how it is refused.

Knows the shapes of arguments and which function carries out which call; knows nothing of the rules,
which stand in `runtime` and the modules beside it. A new call is one more function under
`@dispatchable`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from bittensor import sp_core

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mapreduce.chain.state import State

CommitmentInfo = dict[str, Any]
"""`{"fields": [[field, ...]]}`: the pallet's newtype around a vector makes the list nested."""

MAX_RAW_BYTES: Final = 128
MAX_BIG_RAW_BYTES: Final = 512

_UINT_BITS: Final = {
    "netuid": 16,
    "mecid": 8,
    "port": 16,
    "version": 32,
    "ip": 128,
    "ip_type": 8,
    "protocol": 8,
    "placeholder1": 8,
    "placeholder2": 8,
    "commit_reveal_version": 16,
}
_MAX_BYTES: Final = 8192  # MevShield's bound on a ciphertext, the largest of all
_COMMIT_BYTES: Final = 5000  # MAX_CRV3_COMMIT_SIZE_BYTES of the subtensor pallet
_HASH_VARIANTS: Final = ("BlakeTwo256", "Sha256", "Keccak256", "ShaThree256")
_HASH_BYTES: Final = 32
_UNIT_VARIANTS: Final = ("None", "ResetBondsFlag")


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


def dispatch(call: Dispatch, module: str, function: str, params: Mapping[str, Any]) -> None:
    """Carry out a call that `check_call` has passed.

    Raises:
        DispatchError: the rules forbid it; the caller undoes what was written so far.
    """
    _DISPATCHABLES[module, function](call, **params)


def require_subnet(state: State, netuid: int) -> None:
    """Refuse a netuid that is not taken."""
    if not state.subnet_exists(netuid):
        raise DispatchError("SubnetNotExists")


# Shapes of arguments ------------------------------------------------------------------------------


def _checked(call: str, key: str, kind: str, value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"Id"}:
        value = value["Id"]  # a MultiAddress
    bits = _UINT_BITS.get(key, 64)
    longest = _COMMIT_BYTES if key == "commit" else _MAX_BYTES
    fits, expected = {
        "int": (_is_uint(value, bits), f"a u{bits}"),
        "list[int]": (
            isinstance(value, list) and all(_is_uint(v, 16) for v in value),
            "a list of u16",
        ),
        "bool": (type(value) is bool, "a bool"),
        "bytes": (
            isinstance(value, bytes) and len(value) <= longest,
            f"at most {longest} bytes",
        ),
        "str": (_is_address(value), "an ss58 address"),
        "CommitmentInfo": (
            _is_commitment(value),
            f"[[field, ...]] of RawN (N <= {MAX_RAW_BYTES}), BigRaw (<= {MAX_BIG_RAW_BYTES} bytes),"
            f" {', '.join(_HASH_VARIANTS)}, {', '.join(_UNIT_VARIANTS)}; nothing timelocked",
        ),
    }[kind]
    if not fits:
        raise UnknownCall(f"{call}: {key} = {value!r} is not {expected}")
    return value


def _is_uint(value: Any, bits: int) -> bool:
    return type(value) is int and 0 <= value < 2**bits


def _is_address(value: Any) -> bool:
    if type(value) is not str:
        return False
    try:
        sp_core.ss58_decode(value)
    except ValueError:
        return False
    return True


def _is_commitment(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"fields"}:
        return False
    outer = value["fields"]
    if not isinstance(outer, list) or len(outer) != 1 or not isinstance(outer[0], list):
        return False
    return all(_is_commitment_field(entry) for entry in outer[0])


def _is_commitment_field(entry: Any) -> bool:
    if isinstance(entry, str):
        return entry in _UNIT_VARIANTS
    if not isinstance(entry, dict) or len(entry) != 1:
        return False
    ((variant, data),) = entry.items()
    if not isinstance(data, bytes):
        return False
    if variant in _HASH_VARIANTS:
        return len(data) == _HASH_BYTES
    if variant == "BigRaw":
        return len(data) <= MAX_BIG_RAW_BYTES
    return bool(variant == f"Raw{len(data)}" and len(data) <= MAX_RAW_BYTES)
