"""Who sent a request: btauth/1 on every control request, and signed statements for what must be
shown to others.

The one module besides the chain's that knows bittensor. Does not know routes or messages.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bittensor import http_auth
from bittensor.sp_core import (
    CRYPTO_ED25519,
    CRYPTO_SR25519,
    Keypair,
    decode_ss58,
    encode_ss58,
    verify,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_AGE_S = http_auth.DEFAULT_MAX_AGE
ALLOWED_SKEW_S = http_auth.DEFAULT_ALLOWED_SKEW
_LONGEST_MS = 10**15


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated sender: a hotkey, or the session key of a peer inside a job."""

    address: str
    is_session_key: bool


class Denied(Exception):
    """A request that does not prove who sent it.

    `code` is stable; the text is safe to send back.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def new_session_key() -> Keypair:
    """A throw-away ed25519 keypair; it lives in memory only."""
    return Keypair.create_from_seed(os.urandom(32), crypto_type=CRYPTO_ED25519)


def sign_request(
    key: Keypair, *, method: str, path: str, body: bytes, receiver: str
) -> dict[str, str]:
    """The btauth/1 headers of a request; `path` is the request target exactly as it is sent."""
    return http_auth.sign(key, method=method, path=path, body=body, receiver_ss58=receiver)


class Verifier:
    """Checks the requests that arrive at one hotkey; remembers nonces, so one per process and
    hotkey."""

    def __init__(self, hotkey: str) -> None:
        self.hotkey = hotkey
        self._nonces = http_auth.InMemoryNonceStore()

    def verify(self, headers: Mapping[str, str], body: bytes, *, method: str, path: str) -> Caller:
        """Who signed this request. Raises Denied."""
        try:
            caller = http_auth.verify(
                headers,
                body,
                method=method,
                path=path,
                self_hotkey_ss58=self.hotkey,
                nonce_store=self._nonces,
            )
        except http_auth.StaleRequest:
            raise Denied("stale_request", _clock_message(headers)) from None
        except http_auth.ReplayedRequest:
            raise Denied("replayed_request", "this request has been received before") from None
        except http_auth.WrongReceiver:
            message = f"the request was signed for another receiver than {self.hotkey}"
            raise Denied("wrong_receiver", message) from None
        except http_auth.BadSignature as error:
            raise Denied("bad_signature", str(error)) from None
        except http_auth.AuthError as error:
            raise Denied("malformed_auth", str(error)) from None
        if caller.crypto_type not in (CRYPTO_SR25519, CRYPTO_ED25519):
            raise Denied("malformed_auth", "keys of this type are not accepted")
        return Caller(caller.hotkey_ss58, caller.crypto_type == CRYPTO_ED25519)


def _clock_message(headers: Mapping[str, str]) -> str:
    age_ms = (time.time_ns() - int(headers[http_auth.HEADER_NONCE])) // 10**6
    age_ms = max(-_LONGEST_MS, min(age_ms, _LONGEST_MS))  # a stranger's number has any size
    side = "behind" if age_ms > 0 else "ahead of"
    return (
        f"the request was signed {abs(age_ms) / 1e3:.1f} s {side} this clock: at most "
        f"{MAX_AGE_S:g} s behind and {ALLOWED_SKEW_S:g} s ahead are accepted; set the clock (NTP) "
        "or retry"
    )


def signer(key: Keypair) -> Callable[[bytes], bytes]:
    """Signs statements with this key; they name their kind themselves (`wire/statements.py`)."""

    def sign(statement: bytes) -> bytes:
        return bytes(key.sign(statement))

    return sign


@functools.lru_cache(maxsize=4096)
def _is_canonical(address: str) -> bool:
    return bool(encode_ss58(decode_ss58(address)) == address)


def verify_signature(signer: str, statement: bytes, signature: bytes, *, session_key: bool) -> bool:
    """Whether this address signed the statement: a session key (ed25519) or a hotkey (sr25519).

    A key has several ss58 spellings; only the one that wallets show is an address here.
    """
    try:
        if not _is_canonical(signer):
            return False
        crypto = CRYPTO_ED25519 if session_key else CRYPTO_SR25519
        return bool(verify(statement, signature, signer, crypto))
    except ValueError:  # no address, or no signature at all
        return False
