"""The validator: coordinator, auditor, benchmarks and scorer on one axon. Knows how its parts are
put together."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from mapreduce.net.auth import Verifier
from mapreduce.net.client import make_http_session
from mapreduce.net.server import make_app
from mapreduce.services.auditor import Auditor
from mapreduce.services.benchmarks import BenchmarkLimits, Benchmarks
from mapreduce.services.coordinator import Coordinator, Limits
from mapreduce.services.dial import DialBack
from mapreduce.services.feedback import Feedback
from mapreduce.services.neuron import Neuron
from mapreduce.services.organic import Organic
from mapreduce.services.recruiter import Recruiter
from mapreduce.services.rounds import Rounds
from mapreduce.services.scorer import Scorer
from mapreduce.services.weights import WeightSetter
from mapreduce.store.database import Database
from mapreduce.store.history import History
from mapreduce.store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import web

    from mapreduce.config import ValidatorConfig


@asynccontextmanager
async def validating(
    neuron: Neuron,
    config: ValidatorConfig,
    app: web.Application,
    *,
    mines: bool,
) -> AsyncIterator[None]:
    """A validator's routes on `app`, and its scoring while the context lasts. `mines`: the same
    hotkey serves as a miner too.

    Raises LocalError if its state cannot be opened.
    """
    netuid, scoring, directory = config.chain.netuid, config.scoring, neuron.directory
    with Database.open(config.state_path(neuron.hotkey)) as database:
        async with make_http_session() as http:
            ledger, history = Ledger(database), History(database)
            bots = frozenset(config.benchmark_hotkeys)
            organic = Organic(history, bots, scoring)
            auditor = Auditor(ledger, history, organic, scoring.ban_s)
            recruiter = Recruiter(neuron.key, directory, http, auditor.banned, mines=mines)
            coordinator = Coordinator(
                neuron.key,
                netuid,
                recruiter,
                Limits(
                    window_bytes=config.window_bytes,
                    frame_bytes=config.frame_bytes,
                    join_timeout_s=config.join_timeout_s,
                    audit_budget=config.audit_budget,
                ),
                auditor,
            )
            benchmarks = Benchmarks(
                coordinator,
                BenchmarkLimits(
                    bots=bots,
                    max_bytes_per_s=config.max_bandwidth_bits_per_s / 8,
                    bytes_per_day=config.benchmark_bytes_per_day,
                    seconds=config.benchmark_s,
                ),
                scoring,
            )
            setter = WeightSetter(
                neuron.client,
                neuron.key,
                netuid,
                directory,
                history,
                dry_run=not config.sets_weights,
            )
            neuron.duties.append(benchmarks)
            rounds = Rounds(benchmarks, recruiter, directory, history, scoring)
            scorer = Scorer(
                directory, history, auditor, organic, rounds, recruiter, setter, scoring
            )
            feedback = Feedback(
                neuron.key,
                netuid,
                directory,
                history,
                ledger,
                auditor,
                rounds.cap_bytes_per_s,
                scoring,
            )
            dial_back = DialBack(neuron.key, directory, http)
            for part in (coordinator, auditor, benchmarks, feedback, dial_back):
                part.add_routes(app)
            scoring_task = asyncio.create_task(scorer.run())
            try:
                yield
            finally:
                scoring_task.cancel()
                await asyncio.wait([scoring_task])


async def run_validator(config: ValidatorConfig) -> None:
    """Serves as a validator until it is told to stop.

    Raises LocalError or Unavailable if it cannot start.
    """
    async with Neuron.open(config.chain, config.wallet, "validator") as neuron:
        uid = await neuron.require_uid()
        app = make_app(Verifier(neuron.hotkey), neuron.not_ready)
        async with validating(neuron, config, app, mines=False):
            await neuron.serve(app, config.axon, uid, state=config.state_path(neuron.hotkey))
