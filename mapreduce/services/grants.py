"""Signing grants and reading signed ones.

Knows whose signature must be on them; knows no routes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapreduce.errors import BadMessage
from mapreduce.net.auth import check_statement, sign_statement
from mapreduce.wire.messages import Grant, SignedGrant, decode_message, encode_message

if TYPE_CHECKING:
    from bittensor.sp_core import Keypair

_KIND = "grant"


def sign_grant(key: Keypair, grant: Grant) -> SignedGrant:
    """The grant as its validator hands it out."""
    text = encode_message(grant).decode()
    return SignedGrant(grant=text, signature=sign_statement(key, _KIND, text))


def read_grant(signed: SignedGrant, validator: str) -> Grant:
    """The grant, once it is proven to be that validator's. Raises BadMessage."""
    grant = decode_message(Grant, signed.grant)
    if grant.validator != validator:
        raise BadMessage(f"the grant is {grant.validator}'s, not {validator}'s")
    check_statement(validator, _KIND, signed.grant, signed.signature)
    return grant
