"""Where the ranks of a job wait for each other.

Pure: knows who has joined, not sockets, time or miners.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mapreduce.errors import Refused

if TYPE_CHECKING:
    from mapreduce.wire.messages import JoinRequest

MAX_GROUPS = 1024


@dataclass(frozen=True, slots=True)
class Member:
    """Who joined as a rank: a hotkey, and the session key that it has delegated to."""

    hotkey: str
    session_key: str
    delegation: bytes


@dataclass(slots=True, eq=False)
class Group:
    """The ranks (indexes) that have joined one job to be."""

    key: str
    first: JoinRequest
    members: dict[int, Member] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.members) == self.first.peer_count

    @property
    def missing(self) -> list[int]:
        """Ranks that have not joined, counted from 1."""
        return [r + 1 for r in range(self.first.peer_count) if r not in self.members]

    @property
    def ranks(self) -> list[Member]:
        """In rank order; of a complete group."""
        return [self.members[rank] for rank in range(self.first.peer_count)]


class Lobby:
    """All groups that are still waiting for ranks."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}

    def join(self, hotkey: str, request: JoinRequest) -> Group:
        """The group this rank belongs to, which is out of the lobby as soon as it is complete.

        Ranks meet by the job name that they give, or else by hotkey. Raises Refused if the rank is
        out of range or taken, or if it wants another job than the ranks before it.
        """
        rank = request.rank
        if rank >= request.peer_count:
            raise Refused(
                f"rank {rank + 1} is out of range: ranks of {request.peer_count} peers are 1 to "
                f"{request.peer_count}",
                code="rank_out_of_range",
            )
        key = f"job {request.job}" if request.job else f"hotkey {hotkey}"
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= MAX_GROUPS:
                raise Refused("too many jobs are waiting for ranks", code="busy", status=503)
            group = self._groups[key] = Group(key=key, first=request)
        self._check_same(group, request)
        taken = group.members.get(rank)
        if taken is not None and taken.session_key != request.session_key:
            raise Refused(
                f"rank {rank + 1} has joined {key} already, from another process; give jobs that "
                "run at the same time different names (job=...)",
                code="rank_taken",
            )
        delegation = bytes.fromhex(request.delegation)
        group.members[rank] = Member(hotkey, request.session_key, delegation)
        if group.complete:
            del self._groups[key]
        return group

    def leave(self, group: Group, rank: int) -> None:
        """A rank that still waits has gone."""
        if self._groups.get(group.key) is group:
            group.members.pop(rank, None)
            if not group.members:
                del self._groups[group.key]

    def dissolve(self, group: Group) -> None:
        """The group is not going to be complete."""
        if self._groups.get(group.key) is group:
            del self._groups[group.key]

    @property
    def waiting_ranks(self) -> int:
        """How many ranks wait, in all groups."""
        return sum(len(group.members) for group in self._groups.values())

    @staticmethod
    def _check_same(group: Group, request: JoinRequest) -> None:
        first = group.first
        for name in ("peer_count", "bandwidth", "miner_count", "audit"):
            theirs, ours = getattr(first, name), getattr(request, name)
            if theirs != ours:
                raise Refused(
                    f"the ranks disagree on {name}: rank {first.rank + 1} says {theirs}, rank "
                    f"{request.rank + 1} says {ours}",
                    code="ranks_disagree",
                )
