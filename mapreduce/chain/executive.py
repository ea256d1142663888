"""Including a signed extrinsic in the chain: verify, count, dispatch, log. Knows validity and
atomicity; knows nothing of what a call means, nor of the SDK.

A transaction is either invalid (never included; the nonce stays) or included, and then its call
succeeds or fails. A failed call undoes everything it wrote and still uses the nonce, as on a real
chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mapreduce.chain import extrinsic as codec
from mapreduce.chain import runtime

if TYPE_CHECKING:
    from mapreduce.chain.state import State

BLOCKS_KEPT: Final = 14_400
"""How far back the log of extrinsics and events reaches: an hour of the fastest usual blocks."""

# Position 0 of every block is the inherent that sets the time.
_FIRST_POSITION: Final = 1


class InvalidTransaction(Exception):
    """The extrinsic cannot be included; `name` is the one that a real chain's pool gives."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class Included:
    """Where an extrinsic stands and how its call ended; `error` is the runtime's name or None."""

    block: int
    position: int
    hash: str
    error: str | None
    events: list[dict[str, Any]]


def include(state: State, data: bytes, block: int) -> Included:
    """Apply one signed extrinsic inside the caller's write transaction.

    Raises:
        InvalidTransaction: it is forged, replayed, too early, expired or unreadable; nothing was
            written.
    """
    signed = _validated(state, data, block)
    state.use_nonce(signed.signer)
    call = runtime.Dispatch(state, signed.signer, block)
    error: str | None = None
    try:
        with state.ledger.savepoint():
            runtime.dispatch(call, signed.call.module, signed.call.function, signed.call.params)
    except runtime.DispatchError as refused:
        error = refused.name
        call.events = []
    call.event(
        "ExtrinsicFailed" if error else "ExtrinsicSuccess",
        {"dispatch_error": error} if error else {},
        pallet="System",
    )
    record = {
        "signer": signed.signer,
        "nonce": signed.nonce,
        "call_module": signed.call.module,
        "call_function": signed.call.function,
        "call_args": [
            {"name": key, "value": _readable(value)} for key, value in signed.call.params.items()
        ],
        "error": error,
        "events": call.events,
    }
    digest = codec.extrinsic_hash(data)
    position = state.ledger.append(block, _FIRST_POSITION, digest, record)
    if position == _FIRST_POSITION:
        state.ledger.forget_before(block - BLOCKS_KEPT)
    return _included(block, position, digest, record)


def find(state: State, digest: str, block: int) -> Included | None:
    """The extrinsic of that hash in that block."""
    for position, found, record in state.ledger.included(block):
        if found == digest:
            return _included(block, position, found, record)
    return None


def event_records(position: int, events: list[Any]) -> list[dict[str, Any]]:
    """Events in the shape in which the SDK decodes `System.Events`."""
    return [
        {
            "phase": "ApplyExtrinsic",
            "extrinsic_idx": position,
            "event": {"module_id": pallet, "event_id": name, "attributes": attributes},
            "topics": [],
        }
        for pallet, name, attributes in events
    ]


def _readable(value: Any) -> Any:
    """An argument as a block shows it: bytes as hex, at any depth."""
    match value:
        case bytes():
            return "0x" + value.hex()
        case dict():
            return {key: _readable(entry) for key, entry in value.items()}
        case list():
            return [_readable(entry) for entry in value]
        case _:
            return value


def _included(block: int, position: int, digest: str, record: dict[str, Any]) -> Included:
    return Included(
        block=block,
        position=position,
        hash=digest,
        error=record["error"],
        events=event_records(position, record["events"]),
    )


def _validated(state: State, data: bytes, block: int) -> codec.Extrinsic:
    try:
        signed = codec.decode(data)
        runtime.check_call(signed.call.module, signed.call.function, signed.call.params)
    except codec.MalformedExtrinsic as error:
        raise InvalidTransaction("BadRequest", f"not an extrinsic ({error})") from error
    except runtime.UnknownCall as error:
        raise InvalidTransaction("Call", str(error)) from error
    if not signed.verify(state.genesis.hash):
        raise InvalidTransaction("BadProof", f"the signature of {signed.signer} does not fit")
    if signed.period is not None and not signed.birth <= block < signed.birth + signed.period:
        raise InvalidTransaction(
            "AncientBirthBlock",
            f"valid for {signed.period} blocks from {signed.birth}, now {block}",
        )
    nonce = state.nonce(signed.signer)
    if signed.nonce != nonce:
        name = "Stale" if signed.nonce < nonce else "Future"
        raise InvalidTransaction(
            name, f"nonce {signed.nonce} of {signed.signer}, the chain expects {nonce}"
        )
    return signed
