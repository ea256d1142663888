"""Calls and signed extrinsics as bytes. Knows the encoding, the signature and what it covers; knows
nothing of accounts or of what a call does.

The bytes are canonical JSON rather than SCALE: the SDK treats both as opaque, and the runtime
metadata that SCALE needs is in no package. What is signed covers the call, the nonce, the era and
the chain's genesis hash, so an extrinsic can be neither altered, nor replayed, nor carried to
another chain.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from bittensor import sp_core

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_EXTRINSIC_BYTES: Final = 256 * 1024

_BYTES_TAG: Final = "0x"  # the only key of an object that stands for bytes
_DOMAIN: Final = b"mapreduce-embedded-chain/1\n"  # a btauth header or message can never verify here


class MalformedExtrinsic(Exception):
    """The bytes are no extrinsic of this chain."""


@dataclass(frozen=True, slots=True)
class Call:
    """A composed call, with the attributes that the SDK's executor looks for."""

    module: str
    function: str
    params: Mapping[str, Any]

    @property
    def data(self) -> bytes:
        """The canonical bytes."""
        return _canonical([self.module, self.function, dict(self.params)])

    @property
    def call_hash(self) -> bytes:
        """BLAKE2b-256 of `data`."""
        return blake2b(self.data, digest_size=32).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Extrinsic:
    """A signed call. `period` None means that it never expires."""

    call: Call
    signer: str
    crypto_type: int
    nonce: int
    birth: int
    period: int | None
    signature: bytes

    def encode(self) -> bytes:
        """The bytes whose hash names the extrinsic."""
        return _canonical({"signed": self._signed_part(), "signature": self.signature.hex()})

    def verify(self, genesis_hash: str) -> bool:
        """True if the signer signed exactly this, for this chain."""
        message = _message(self._signed_part(), genesis_hash)
        try:
            return bool(
                sp_core.verify(message, self.signature, self.signer, crypto_type=self.crypto_type)
            )
        except (ValueError, TypeError):  # an address, key or signature that is none
            return False

    def _signed_part(self) -> dict[str, Any]:
        return _signed_part(
            self.call, self.signer, self.crypto_type, self.nonce, self.birth, self.period
        )


async def sign(
    call: Call, signer: Any, *, nonce: int, birth: int, period: int | None, genesis_hash: str
) -> Extrinsic:
    """Have `signer` (a keypair, or anything the SDK accepts as its `Signer`) sign the call."""
    address, crypto_type = str(signer.ss58_address), int(signer.crypto_type)
    part = _signed_part(call, address, crypto_type, nonce, birth, period)
    signature = signer.sign(_message(part, genesis_hash))
    if inspect.isawaitable(signature):  # a device or a remote signer
        signature = await signature
    return Extrinsic(
        call=call,
        signer=address,
        crypto_type=crypto_type,
        nonce=nonce,
        birth=birth,
        period=period,
        signature=bytes(signature),
    )


def decode(data: bytes) -> Extrinsic:
    """The extrinsic in `data`; its signature is not yet verified.

    Raises:
        MalformedExtrinsic: anything else than the bytes that `Extrinsic.encode` makes.
    """
    if len(data) > MAX_EXTRINSIC_BYTES:
        raise MalformedExtrinsic(f"{len(data)} bytes are more than {MAX_EXTRINSIC_BYTES}")
    try:
        outer = json.loads(data, object_hook=_restore_bytes)
        part = outer["signed"]
        module, function, params = part["call"]
        extrinsic = Extrinsic(
            call=Call(module, function, params),
            signer=part["signer"],
            crypto_type=part["crypto_type"],
            nonce=part["nonce"],
            birth=part["birth"],
            period=part["period"],
            signature=bytes.fromhex(outer["signature"]),
        )
        numbers = [extrinsic.nonce, extrinsic.birth, extrinsic.crypto_type]
        if not all(type(n) is int for n in [*numbers, extrinsic.period or 0]):
            raise TypeError("a number is none")
        if not all(type(s) is str for s in (module, function, extrinsic.signer)):
            raise TypeError("a name is none")
        if extrinsic.encode() != data:
            raise ValueError("not canonical")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MalformedExtrinsic(str(error)) from error
    return extrinsic


def extrinsic_hash(data: bytes) -> str:
    """BLAKE2b-256 of the encoded extrinsic, 0x-hex."""
    return "0x" + blake2b(data, digest_size=32).hexdigest()


def _signed_part(
    call: Call, signer: str, crypto_type: int, nonce: int, birth: int, period: int | None
) -> dict[str, Any]:
    return {
        "call": [call.module, call.function, dict(call.params)],
        "signer": signer,
        "crypto_type": crypto_type,
        "nonce": nonce,
        "birth": birth,
        "period": period,
    }


def _message(part: dict[str, Any], genesis_hash: str) -> bytes:
    digest = blake2b(_canonical([genesis_hash, part]), digest_size=32).digest()
    return _DOMAIN + digest


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_replace_bytes).encode()


def _replace_bytes(value: object) -> dict[str, str]:
    if isinstance(value, (bytes, bytearray)):
        return {_BYTES_TAG: bytes(value).hex()}
    raise TypeError(f"a call cannot hold a {type(value).__name__}")


def _restore_bytes(value: dict[str, Any]) -> Any:
    if value.keys() == {_BYTES_TAG}:
        return bytes.fromhex(value[_BYTES_TAG])
    return value
