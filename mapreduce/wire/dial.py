"""What a validator tells a neuron that asks whether it can be reached. Knows fields and bounds;
knows nothing of connecting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

MAX_REASON = 512

_STRICT = ConfigDict(extra="ignore", strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class DialAnswer:
    """Whether this hotkey answers at the `ip` and `port` that the chain shows, and if not, why;
    `seen_from` is the address from which the validator was asked."""

    __pydantic_config__ = _STRICT

    ip: Annotated[str, Field(max_length=45)]
    port: Annotated[int, Field(ge=1, le=65535)]
    reached: bool
    reason: Annotated[str, Field(max_length=MAX_REASON)]
    seen_from: Annotated[str, Field(max_length=64)]
