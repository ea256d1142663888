"""Which miners may be one machine or one line: those that share a network or an owner.

Knows addresses and coldkeys as the chain publishes them. Knows nothing of measurements, and does
not prove anything: honest neighbours are a cluster too, and lose little by it.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

# What one customer easily gets of a provider; these hold the /32 and the /64 too.
_PREFIX_BITS: Final = {4: 24, 6: 48}


def clusters(neurons: Iterable[tuple[str, str, str | None]]) -> dict[str, str]:
    """Hotkey to cluster, which is named by the least of its hotkeys.

    Args:
        neurons: Hotkey, coldkey, and the IP address that it serves at, if any.
    """
    root: dict[str, str] = {}
    first: dict[Hashable, str] = {}

    def _find(hotkey: str) -> str:
        while root[hotkey] != hotkey:
            root[hotkey] = root[root[hotkey]]
            hotkey = root[hotkey]
        return hotkey

    for hotkey, coldkey, ip in neurons:
        root.setdefault(hotkey, hotkey)
        for sign in _signs(coldkey, ip):
            low, high = sorted((_find(hotkey), _find(first.setdefault(sign, hotkey))))
            root[high] = low
    return {hotkey: _find(hotkey) for hotkey in root}


def _signs(coldkey: str, ip: str | None) -> Iterator[Hashable]:
    """What two miners of one cluster have in common.

    A loopback address is none: it names a machine only to itself, so that a fleet on one machine
    would be one cluster. That opens no hole: who publishes one on a chain is reached by no other
    machine's bots, and earns nothing there.
    """
    yield ("coldkey", coldkey)
    if ip is None:
        return
    address = ip_address(ip)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if not address.is_loopback and not address.is_unspecified:
        prefix = int(address) >> (address.max_prefixlen - _PREFIX_BITS[address.version])
        yield (address.version, prefix)
