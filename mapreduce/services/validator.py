"""The validator: a coordinator and an auditor on one axon. Knows how its parts are put together."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from mapreduce.net.auth import Verifier
from mapreduce.net.client import make_http_session
from mapreduce.net.server import make_app
from mapreduce.services.auditor import Auditor
from mapreduce.services.coordinator import Coordinator, Limits
from mapreduce.services.neuron import Directory, Neuron
from mapreduce.store.ledger import Ledger

if TYPE_CHECKING:
    from mapreduce.config import ValidatorConfig


async def run_validator(config: ValidatorConfig) -> None:
    """Serves as a validator until it is told to stop.

    Raises LocalError or Unavailable if it cannot start.
    """
    netuid = config.chain.netuid
    async with (
        AsyncExitStack() as stack,
        Neuron.open(config.chain, config.wallet, "validator") as neuron,
        make_http_session() as http,
    ):
        uid = await neuron.require_uid()
        ledger = stack.enter_context(Ledger.open(config.state_path(neuron.hotkey)))
        auditor = Auditor(ledger)
        limits = Limits(
            window_bytes=config.window_bytes,
            frame_bytes=config.frame_bytes,
            join_timeout_s=config.join_timeout_s,
            audit_budget=config.audit_budget,
        )
        directory = Directory(neuron.client, netuid)
        coordinator = Coordinator(neuron.key, netuid, directory, http, limits, auditor)
        app = make_app(Verifier(neuron.hotkey), neuron.not_ready)
        coordinator.add_routes(app)
        auditor.add_routes(app)
        await neuron.serve(app, config.axon, uid)
