"""Opening a chain by its name: the one place that knows the embedded chain from a real one.

Importing this module loads neither bittensor nor SQLite.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from mapreduce.errors import ConfigError

if TYPE_CHECKING:
    import bittensor as bt

EMBEDDED: Final = "embedded"
DEFAULT_CHAIN_PATH: Final = "~/.mapreduce/chain.sqlite"
NAMED_NETWORKS: Final = ("finney", "test", "local", "archive")

_ALLOWED: Final = f"{', '.join(NAMED_NETWORKS)}, {EMBEDDED}[:PATH], or a ws:// or wss:// address"


def is_embedded(network: str) -> bool:
    """Whether the name means a chain in a file of this machine."""
    return network == EMBEDDED or network.startswith(EMBEDDED + ":")


def embedded_path(network: str) -> Path:
    """The file of an embedded chain's name, `embedded` or `embedded:PATH`.

    Raises:
        ConfigError: nothing follows the colon.
    """
    _, colon, path = network.partition(":")
    if colon and not path:
        raise ConfigError(f"subtensor.network = {network!r}: a path must follow the colon")
    return Path(path or DEFAULT_CHAIN_PATH).expanduser()


def open_chain(network: str, *, endpoint: str | None = None) -> bt.Client:
    """A client for a chain, not yet connected: `async with open_chain("embedded") as client: ...`.

    Args:
        network: `finney`, `test`, `local`, `archive`, a `ws://` or `wss://` address, or
            `embedded[:PATH]` for the chain in a file (`DEFAULT_CHAIN_PATH` without a path).
        endpoint: the `ws://` or `wss://` address to use instead of the named network's own.

    Raises:
        ConfigError: an unknown name, an address of another kind, or an embedded chain with an
            endpoint.
    """
    if is_embedded(network):
        path = embedded_path(network)
        if endpoint is not None:
            raise ConfigError(
                f"subtensor.chain_endpoint = {endpoint!r} does not go with "
                f"subtensor.network = {network!r}: an embedded chain has no endpoint"
            )
        import bittensor as bt

        from mapreduce.chain.embedded import EMBEDDED_URL, EmbeddedSubstrate

        return bt.Client(EMBEDDED_URL, substrate=EmbeddedSubstrate(path))
    if network not in NAMED_NETWORKS and not _is_address(network):
        raise ConfigError(f"subtensor.network = {network!r} is unknown; allowed is {_ALLOWED}")
    if endpoint is not None and not _is_address(endpoint):
        raise ConfigError(
            f"subtensor.chain_endpoint = {endpoint!r}: allowed is a ws:// or wss:// address"
        )
    import bittensor as bt

    return bt.Client(endpoint or network)


def _is_address(text: str) -> bool:
    scheme, separator, host = text.partition("://")
    return scheme in ("ws", "wss") and bool(separator) and bool(host)
