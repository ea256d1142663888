"""Our own subnet on given hosts: real neurons, each a process, as operators run them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mapreduce.local import LocalSubnet, Place
from mapreduce.processes import free_ports

if TYPE_CHECKING:
    from bench.lab import Site
    from bench.relay import Route


class PlacedSubnet(LocalSubnet):
    """A subnet whose miners are on the hosts of a site, and whose validator is on its driver; bots
    are where the peers are.

    `verified=False`: miners and ranks neither hash nor sign (see `unverified.py`). `options` are
    those of `LocalSubnet`.
    """

    def __init__(self, site: Site, *, verified: bool = True, **options: Any) -> None:
        super().__init__(miners=len(site.miners), **options)
        self.site = site
        self.verified = verified

    def program(self, role: str, name: str) -> tuple[str, ...]:
        if role == "miner" and not self.verified:
            return ("-m", "bench.unverified")
        return super().program(role, name)

    def place(self, name: str) -> Place:
        role, _, number = name.partition("-")
        if role == "bot":
            host = self.site.peers[int(number) - 1]
            return Place(prefix=host.prefix, ip=host.ip)
        return self.validator_place() if role == "validator" else self.miner_place(int(number))

    def validator_place(self) -> Place:
        return Place(prefix=self.site.driver.prefix, ip=self.site.driver.ip)

    def miner_place(self, number: int) -> Place:
        """Of miner 1, 2, .."""
        host = self.site.miners[number - 1]
        return Place(prefix=host.prefix, ip=host.ip)


class RelayedSubnet(PlacedSubnet):
    """A subnet whose miners publish ports on the driver instead of their own; a `Relay` of
    `routes` there leads to them."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        ports = free_ports(2 * len(site.miners))
        self._own, self._published = ports[::2], ports[1::2]

    @property
    def routes(self) -> list[Route]:
        return [
            (published, host.ip, own)
            for published, host, own in zip(
                self._published, self.site.miners, self._own, strict=True
            )
        ]

    def miner_place(self, number: int) -> Place:
        host = self.site.miners[number - 1]
        published = str(self._published[number - 1])
        flags = ("--axon.external_ip", self.site.driver.ip, "--axon.external_port", published)
        return Place(prefix=host.prefix, ip=host.ip, port=self._own[number - 1], flags=flags)
