"""The kinds of values an option may have: how each is written, checked and described.

Knows texts, JSON values and what is allowed; knows no option (`config/options.py`) and no source.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol
from urllib.parse import urlsplit

NETWORKS = ("finney", "test", "local", "archive")
AUTO_UPDATE_LEVELS = ("major", "minor", "patch", "notify", "no")

_BASE58 = frozenset("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class NotAllowed(ValueError):
    """A value outside its kind, with a reason for people; a bare `ValueError` has none."""


class Kind(Protocol):
    """A sort of value. Both methods raise `ValueError` for a value outside `allowed`."""

    @property
    def allowed(self) -> str:
        """What a person may write, for messages and help."""

    def from_text(self, text: str) -> object:
        """The value written on the command line or in an environment variable."""

    def check(self, value: object) -> object:
        """The value found in JSON or given by Python code, in its normal form."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number; with `sizes`, a number of bytes that may carry a unit (512MB, 4GiB)."""

    low: int
    high: int
    unit: str = ""
    multiple: int = 1
    sizes: bool = False

    @property
    def allowed(self) -> str:
        what = f"a whole number{f' of {self.unit}' if self.unit else ''}"
        parts = [f"{what} from {self.low} to {self.high}"]
        if self.multiple > 1:
            parts.append(f"a multiple of {self.multiple}")
        if self.sizes:
            parts.append('units as in "512MB" (10^6) or "4MiB" (2^20) are understood')
        return ", ".join(parts)

    def from_text(self, text: str) -> int:
        text = text.strip()
        if self.sizes and not text.isdecimal():
            return self.check(_bytes_from(text))
        return self.check(int(text))

    def check(self, value: object) -> int:
        if self.sizes and isinstance(value, str):
            value = _bytes_from(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        if not self.low <= value <= self.high or value % self.multiple:
            raise ValueError
        return value


def _bytes_from(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    # "4G" is refused: half the world reads it as 10^9, the other half as 2^30.
    if match is None or (match[2] and not text.strip().lower().endswith("b")):
        raise ValueError
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(Fraction(match[1]) * base ** _POWERS[unit[:1]])


@dataclass(frozen=True, slots=True)
class Seconds:
    """A positive, finite time in seconds."""

    high: float

    @property
    def allowed(self) -> str:
        return f"a number of seconds above 0 and up to {self.high:g}"

    def from_text(self, text: str) -> float:
        return self.check(float(text))

    def check(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        if not 0 < value <= self.high:  # also false for NaN
            raise ValueError
        return float(value)


@dataclass(frozen=True, slots=True)
class Number:
    """Any number in a range."""

    low: float
    high: float

    @property
    def allowed(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def from_text(self, text: str) -> float:
        return self.check(float(text))

    def check(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        if not self.low <= value <= self.high:  # also false for NaN
            raise ValueError
        return float(value)


SHARE = Number(0, 1)


@dataclass(frozen=True, slots=True)
class Switch:
    """True or false; on the command line its mere presence means true."""

    allowed: str = "true or false"

    def from_text(self, text: str) -> bool:
        if text not in ("true", "false"):
            raise ValueError
        return text == "true"

    def check(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


class _Text:
    """Base of the kinds that are written as text everywhere."""

    def from_text(self, text: str) -> object:
        return self.check(text)

    def check(self, value: object) -> object:
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise ValueError
        return self.check_text(value.strip())

    def check_text(self, text: str) -> object:
        return text


@dataclass(frozen=True)
class FilePath(_Text):
    """A path; `~` is left to whoever opens it."""

    allowed: str = "a path"


@dataclass(frozen=True)
class WalletName(_Text):
    """A name under the wallet path; with `pair` also NAME/HOTKEY."""

    pair: bool = False
    placeholder: str = ""

    @property
    def allowed(self) -> str:
        return f"a name without slashes{', or NAME/HOTKEY' if self.pair else ''}"

    def check_text(self, text: str) -> str:
        if text == self.placeholder or re.fullmatch("<.*>", text):
            raise NotAllowed("the placeholder of the example: edit it")
        parts = text.split("/") if self.pair else [text]
        if len(parts) > 2 or any(p in ("", ".", "..") or "/" in p or "\\" in p for p in parts):
            raise ValueError
        return text


@dataclass(frozen=True)
class IpAddress(_Text):
    """An IPv4 or IPv6 address; with `public` one that others can dial."""

    public: bool = False

    @property
    def allowed(self) -> str:
        more = " that others can dial" if self.public else ', "0.0.0.0" or "::" for all'
        return f"an IPv4 or IPv6 address{more}"

    def check_text(self, text: str) -> str:
        address = ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))
        if self.public and (address.is_unspecified or address.is_multicast):
            raise ValueError
        return str(address)


@dataclass(frozen=True)
class Network(_Text):
    """A network of the SDK, a websocket URL, or the embedded chain."""

    urls_only: bool = False

    @property
    def allowed(self) -> str:
        url = "ws://HOST[:PORT] or wss://HOST[:PORT]"
        return url if self.urls_only else f"{', '.join(NETWORKS)}, {url}, or embedded[:PATH]"

    def check_text(self, text: str) -> str:
        if text.startswith(("ws://", "wss://")):
            parts = urlsplit(text)
            if not parts.hostname or parts.port == 0:  # .port raises ValueError above 65535
                raise ValueError
        elif self.urls_only or not (
            text in (*NETWORKS, "embedded") or re.fullmatch("embedded:.+", text)
        ):
            raise ValueError
        return text


@dataclass(frozen=True)
class Url(_Text):
    """The http or https address of something on the web."""

    allowed: str = "http://HOST[:PORT][/PATH] or https://HOST[:PORT][/PATH]"

    def check_text(self, text: str) -> str:
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
        return text


@dataclass(frozen=True)
class UpdateLevel(_Text):
    """How large a release may be installed without asking."""

    allowed: str = " or ".join(f'"{level}"' for level in AUTO_UPDATE_LEVELS)

    def check(self, value: object) -> object:
        if isinstance(value, bool) or str(value).lower() in ("true", "false", "on", "off"):
            raise NotAllowed('it is a level, not a switch: "no" turns it off')
        return super().check(value)

    def check_text(self, text: str) -> str:
        if text not in AUTO_UPDATE_LEVELS:
            raise ValueError
        return text


@dataclass(frozen=True, slots=True)
class Hotkeys:
    """A list of ss58 addresses; "" is a slot not filled and dropped. As text: comma-separated."""

    allowed: str = (
        'a list of different ss58 addresses (47 or 48 base58 characters), "" for an unfilled slot'
    )

    def from_text(self, text: str) -> tuple[str, ...]:
        return self.check(text.split(","))

    def check(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError
        found: dict[str, int] = {}
        for place, entry in enumerate(value, start=1):
            hotkey = entry.strip() if isinstance(entry, str) else None
            if hotkey is None or (
                hotkey and not (len(hotkey) in (47, 48) and set(hotkey) <= _BASE58)
            ):
                raise NotAllowed(f"entry {place} is not an ss58 address: {entry!r}")
            if hotkey in found:
                raise NotAllowed(f"entries {found[hotkey]} and {place} are the same: {hotkey!r}")
            if hotkey:
                found[hotkey] = place
        return tuple(found)
