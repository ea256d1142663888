"""Signing grants and reading signed ones.

Knows whose signature must be on them; knows no routes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapreduce.errors import BadMessage, Refused
from mapreduce.net.auth import signer, verify_signature
from mapreduce.wire.messages import Grant, SignedGrant, decode_message, encode_message
from mapreduce.wire.proofs import keys_of
from mapreduce.wire.statements import grant_statement

MAX_GRANT_AHEAD_S = 2.0  # what btauth allows a clock

if TYPE_CHECKING:
    from bittensor.sp_core import Keypair

    from mapreduce.wire.keys import JobKeys


def sign_grant(key: Keypair, grant: Grant) -> SignedGrant:
    """The grant as its validator hands it out."""
    text = encode_message(grant).decode()
    return SignedGrant(grant=text, signature=signer(key)(grant_statement(text)).hex())


def read_grant(signed: SignedGrant, validator: str) -> Grant:
    """The grant, once it is proven to be that validator's. Raises BadMessage."""
    grant = decode_message(Grant, signed.grant)
    if grant.validator != validator:
        raise BadMessage(f"the grant is {grant.validator}'s, not {validator}'s")
    signature = bytes.fromhex(signed.signature)
    if not verify_signature(validator, grant_statement(signed.grant), signature, session_key=False):
        raise BadMessage(f"the signature of this grant is not {validator}'s")
    return grant


def job_keys(signed: SignedGrant, grant: Grant) -> JobKeys:
    """Who signs in the job that `signed`, the first grant of it, has opened."""
    return keys_of(grant, signed.grant, verify_signature)


class AcceptedGrants:
    """The jobs that a miner has accepted, so that none is accepted twice: a validator that offered
    a job again could make an honest miner sign two results of one step, which is a fraud proof.

    Of jobs before this process nothing is known. So a grant must be younger than it, and by what a
    grant may be ahead of the clock: one before may have accepted it that much earlier.
    """

    def __init__(self, started_at: float) -> None:
        self._oldest = started_at + MAX_GRANT_AHEAD_S
        self._now = started_at
        self._expiry: dict[str, float] = {}

    def add(self, grant: Grant, now: float) -> None:
        """Takes note of a job; all times are seconds of the Unix epoch. Raises Refused for a job
        that was accepted before, or may have been."""
        now = self._now = max(self._now, now)  # a clock that is set back brings no job back
        self._expiry = {job: at for job, at in self._expiry.items() if at > now}
        if grant.job in self._expiry:
            raise Refused(f"job {grant.job} was accepted already", code="duplicate_job")
        made_in_time = self._oldest <= grant.created_at <= now + MAX_GRANT_AHEAD_S
        if not made_in_time or grant.expires_at <= now:
            raise Refused(
                f"the grant was made {now - grant.created_at:.1f} s ago by this clock; this miner "
                f"accepts what was made in the last {now - self._oldest:.1f} s, since it started, "
                f"and at most {MAX_GRANT_AHEAD_S:g} s ahead; set the clocks (NTP) or offer again",
                code="stale_grant",
            )
        self._expiry[grant.job] = grant.expires_at
