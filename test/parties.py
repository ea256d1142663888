"""Who takes part in a test's job: real keys, derived from names, and a grant that names them."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

from bittensor.sp_core import CRYPTO_ED25519, CRYPTO_SR25519, Keypair

from mapreduce.net.auth import signer
from mapreduce.services.grants import job_keys, sign_grant
from mapreduce.wire.messages import Grant, MinerAddress
from mapreduce.wire.statements import session_key_statement

if TYPE_CHECKING:
    from mapreduce.wire.terms import Terms


@functools.cache
def hotkey(name: str) -> Keypair:
    seed = hashlib.sha256(name.encode()).digest()
    return Keypair.create_from_seed(seed, crypto_type=CRYPTO_SR25519)


@functools.cache
def session_key(name: str) -> Keypair:
    seed = hashlib.sha256(name.encode()).digest()
    return Keypair.create_from_seed(seed, crypto_type=CRYPTO_ED25519)


class Parties:
    """A validator, its peers and its miners; miner i has uid 10 + i."""

    def __init__(self, terms: Terms, *, audit_budget: float = 0.01, job: str = "ab" * 16) -> None:
        self.validator = hotkey("validator")
        self.peers = [hotkey(f"peer-{rank}") for rank in range(terms.peer_count)]
        self.sessions = [session_key(f"session-{rank}") for rank in range(terms.peer_count)]
        self.miners = [hotkey(f"miner-{index}") for index in range(terms.miner_count)]
        self.grant = Grant(
            version="2.0.0",
            job=job,
            netuid=10,
            validator=self.validator.ss58_address,
            created_at=1_000.0,
            expires_at=4_600.0,
            bandwidth=terms.bandwidth,
            window_bytes=terms.window_bytes,
            frame_bytes=terms.frame_bytes,
            session_keys=[key.ss58_address for key in self.sessions],
            miners=[
                MinerAddress(uid=10 + i, hotkey=key.ss58_address, ip="127.0.0.1", port=8091)
                for i, key in enumerate(self.miners)
            ],
            audit_budget=audit_budget,
        )
        self.signed = sign_grant(self.validator, self.grant)
        self.keys = job_keys(self.signed, self.grant)

    def delegation(self, rank: int) -> bytes:
        """The hotkey's word for the rank's session key."""
        statement = session_key_statement(
            self.validator.ss58_address, self.sessions[rank].ss58_address
        )
        return signer(self.peers[rank])(statement)
