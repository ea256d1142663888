"""How the scripts in `neurons/` run: logging, the event loop, and a supervisor where updates are
wanted.

Knows what every neuron's process does first and last; knows nothing of what it serves. Loads
neither bittensor nor aiohttp, since a supervisor needs neither.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from typing import TYPE_CHECKING, Any, TypeVar

from mapreduce import __version__
from mapreduce.config import PeerConfig
from mapreduce.logs import configure_logging
from mapreduce.net.loop import new_event_loop
from mapreduce.releases import NotUpdatable, left_behind
from mapreduce.services.supervisor import supervise
from mapreduce.services.worker import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from mapreduce.config import MinerConfig, ValidatorConfig

Config = TypeVar("Config", "MinerConfig", "ValidatorConfig", PeerConfig)

_MODULES = {"bot": "benchmark"}  # neurons/: where it has not the name of the role

_log = logging.getLogger(__name__)


def run_neuron(
    config: Config, role: str, serve: Callable[[Config], Coroutine[Any, Any, None]]
) -> int:
    """Runs a neuron to its end, in this process or, with updates, in a child; returns the exit code
    of the process. Raises what `serve` raises."""
    name = f"{role}-{config.wallet.name}-{config.wallet.hotkey}"
    axon = None if isinstance(config, PeerConfig) else config.axon
    if config.updates.level != "no" and VARIABLE not in os.environ:
        configure_logging(config.logging, name=f"{name}-updates")  # each process its own file
        try:
            return supervise(
                config.updates, _updates_name(name, config), _MODULES.get(role, role), axon
            )
        except NotUpdatable as error:
            _log.warning(f"auto_update = {config.updates.level} does nothing: {error}")
    configure_logging(config.logging, name=name)
    if (
        config.updates.level == "no"
        and (newer := left_behind(_updates_name(name, config))) is not None
    ):
        _log.warning(
            f"this is version {__version__}, and version {newer} ran here before, by auto_update: "
            f"git checkout v{newer} and install again, or turn auto_update on"
        )
    for warning in config.warnings:
        _log.warning(warning)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(config))
    return 0


def _updates_name(name: str, config: MinerConfig | ValidatorConfig | PeerConfig) -> str:
    """What tells this neuron's updates from those of others on this machine: one wallet may serve
    several chains and subnets."""
    place = (name, config.wallet.path, config.chain.address, config.chain.netuid)
    return f"{name}-{hashlib.blake2b(repr(place).encode(), digest_size=4).hexdigest()}"
