"""Who signs in a job, and how a signature is checked. Knows addresses; knows no cryptography: that
is handed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mapreduce.errors import BadMessage
from mapreduce.wire.statements import SIGNATURE_BYTES, Place, Reject


class Verify(Protocol):
    """Whether `signer` (ss58) signed the statement: a peer's ed25519 session key, or a hotkey."""

    def __call__(
        self, signer: str, statement: bytes, signature: bytes, *, session_key: bool
    ) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerName:
    """Who a miner is in errors and signatures."""

    uid: int
    hotkey: str

    def __str__(self) -> str:
        return f"miner uid {self.uid} ({self.hotkey})"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobKeys:
    """The parties of a job: `grant` is its digest, `validator` the hotkey that signed it,
    `session_keys` are the peers' by rank, `miners` in segment order."""

    grant: bytes
    validator: str
    session_keys: tuple[str, ...]
    miners: tuple[MinerName, ...]
    verify: Verify

    def place(self, step: int, segment: int) -> Place:
        return Place(grant=self.grant, step=step, segment=segment)

    def signed_by_rank(self, rank: int, statement: bytes, signature: bytes) -> bool:
        """Whether the peer with this rank (index) signed the statement."""
        return self.verify(self.session_keys[rank], statement, signature, session_key=True)

    def signed_by_miner(self, segment: int, statement: bytes, signature: bytes) -> bool:
        """Whether the miner of this segment signed the statement."""
        return self.verify(self.miners[segment].hotkey, statement, signature, session_key=False)

    def rejected(self, data: bytes, step: int, segment: int, rank: int) -> bool:
        """Whether the miner of this segment has signed that it received other bytes than the rank
        sent; `data` is the statement with its signature."""
        statement, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
        try:
            said = Reject.from_statement(statement)
        except BadMessage:
            return False
        fits = said.place == self.place(step, segment) and said.rank == rank
        return fits and self.signed_by_miner(segment, statement, signature)
