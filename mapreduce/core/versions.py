"""Versions of this program, `X.Y.Z`: how they are written and compared, and which work together.

Knows this rule and its words; knows nobody who has a version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

MAX_CLAIM = 32

_WRITTEN = re.compile(r"(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A release; newer ones are greater."""

    major: int
    minor: int
    patch: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The version that is written `X.Y.Z`, and nothing else. Raises ValueError."""
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text[:32]!r} is no version X.Y.Z")
        return cls(*(int(number) for number in match.groups()))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


def disagreement(theirs: str | None, ours: str, who: str) -> str | None:
    """Why `who`, with the version it claims, cannot work with one of our version, and who has to
    change; None if they can: releases with the same first number understand each other.

    `theirs` is a stranger's text: only a bounded, printable part of it comes back.
    """
    claimed = (theirs or "unknown")[:MAX_CLAIM]
    if claimed.partition(".")[0] == ours.partition(".")[0]:
        return None
    claimed = "".join(c if c.isprintable() else "?" for c in claimed)
    try:
        older = who if Version.parse(claimed) < Version.parse(ours) else "this side"
    except ValueError:
        older = "the older one"
    return (
        f"{who} speaks version {claimed}, this side {ours}: the first numbers must be equal; "
        f"update {older}"
    )
