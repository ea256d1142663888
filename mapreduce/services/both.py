"""A validator that mines: both services of one hotkey on one port. Knows how the two are joined."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mapreduce.net.auth import Verifier
from mapreduce.net.server import make_app
from mapreduce.services.miner import add_miner
from mapreduce.services.neuron import Neuron
from mapreduce.services.validator import validating

if TYPE_CHECKING:
    from mapreduce.config import MinerConfig, ValidatorConfig

_log = logging.getLogger(__name__)


async def run_both(config: ValidatorConfig, mining: MinerConfig) -> None:
    """Serves as a validator and as a miner until it is told to stop.

    The miner is measured and scored like any other, and chosen for jobs. Only other validators can
    pay it: a chain does not count what a hotkey says of itself. Raises LocalError or Unavailable if
    it cannot start.
    """
    async with Neuron.open(config.chain, config.wallet, "validator and miner") as neuron:
        uid = await neuron.require_uid()
        app = make_app(Verifier(neuron.hotkey), neuron.not_ready)
        await add_miner(neuron, mining, app)
        async with validating(neuron, config, app, mines=True):
            _log.info("the miner of this hotkey is paid by other validators only")
            await neuron.serve(app, config.axon, uid, state=config.state_path(neuron.hotkey))
