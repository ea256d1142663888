"""Windows: at the end of each, what was measured becomes standings and scores, and is kept.

Knows the history, the benchmarks and the clock. Does not know the formula (`core/scoring.py`), nor
how weights reach the chain (`weights.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import defaultdict
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from mapreduce.core.scoring import (
    OwnerSeen,
    Seen,
    Standing,
    advance,
    from_json,
    score_all,
    to_json,
    weights,
)
from mapreduce.errors import MapReduceError
from mapreduce.services.neuron import METAGRAPH_AGE_S
from mapreduce.store import history as store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mapreduce.core.scoring import Components, ScoringConfig
    from mapreduce.services.auditor import Auditor
    from mapreduce.services.neuron import Directory
    from mapreduce.services.organic import Organic
    from mapreduce.services.recruiter import Recruiter
    from mapreduce.services.rounds import Rounds
    from mapreduce.services.weights import WeightSetter
    from mapreduce.store.history import History

FRESH_STATE_S = 86400.0  # scores of an earlier process that are no older than this still hold
RETRY_S = 5.0

_log = logging.getLogger(__name__)


class Scorer:
    """The measuring and scoring of one validator, window after window."""

    def __init__(
        self,
        directory: Directory,
        history: History,
        auditor: Auditor,
        organic: Organic,
        rounds: Rounds,
        recruiter: Recruiter,
        setter: WeightSetter,
        config: ScoringConfig,
    ) -> None:
        self._directory = directory
        self._history = history
        self._auditor = auditor
        self._organic = organic
        self._rounds = rounds
        self._recruiter = recruiter
        self._setter = setter
        self._config = config
        self._trusted = False  # whether every miner has had its turn, now or in an earlier run
        self._measured_at = 0.0  # when a bot last measured anybody

    async def run(self) -> None:
        """Measures and scores until it is cancelled."""
        resumed = False
        while True:
            try:
                if not resumed:
                    self._resume()
                    resumed = True
                await self._look()
                await self._window()
            except MapReduceError as error:
                _log.warning("scoring is interrupted", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)
            except Exception:  # the top of this task: jobs go on, whatever is wrong here
                _log.exception("scoring failed")
                await asyncio.sleep(RETRY_S)

    @property
    def _may_set(self) -> bool:
        """Whether the scores are worth setting: bots without work for a day make them stale."""
        return self._trusted and time.time() - self._measured_at < FRESH_STATE_S

    def _resume(self) -> None:
        """Takes up what an earlier process has left."""
        standings = self._standings()
        for hotkey, standing in standings.items():
            if standing.goodput_bytes_per_s:
                self._rounds.estimates[hotkey] = standing.goodput_bytes_per_s
        for row in self._history.measurements(time.time() - FRESH_STATE_S):
            if row.outcome == "measured":
                self._measured_at = max(self._measured_at, row.at)
        # The earlier process had measured a whole round, or it would not have set any.
        set_before = self._history.last_weights("set") or self._history.last_weights("dry run")
        self._trusted = set_before is not None
        last = self._history.last_window()
        if last is not None:
            scores = self._history.scores()
            self._recruiter.weights = {h: score.weight for h, score in scores.items()}
        _log.info(
            "state is loaded",
            extra={
                "miners": len(standings),
                "last_window": None if last is None else last[0],
                "weights": "may be set" if self._may_set else "wait for a whole round",
            },
        )

    def _standings(self) -> dict[str, Standing]:
        return {hotkey: from_json(text) for hotkey, text in self._history.standings().items()}

    async def _look(self) -> None:
        """Notes who is registered now."""
        metagraph = await self._directory.metagraph(METAGRAPH_AGE_S)
        self._organic.coldkeys = {n.hotkey: n.coldkey for n in metagraph.neurons}
        self._history.see(
            [
                store.Seen(uid=n.uid, hotkey=n.hotkey, coldkey=n.coldkey, ip=n.ip)
                for n in metagraph.neurons
            ],
            time.time(),
        )

    async def _window(self) -> None:
        """One window, or what is left of it."""
        length_s = self._config.window_s
        window = math.floor(time.time() / length_s)
        begin, end = window * length_s, (window + 1) * length_s
        await self._close_left(window - 1, begin - length_s)
        done = {
            row.hotkey
            for row in self._history.measurements(begin)
            if row.window == window and row.outcome != "void"
        }
        setting = asyncio.create_task(self._set_weights_until(end))
        try:
            whole = await self._rounds.run(window, end, done)
            await asyncio.sleep(max(0.0, end - time.time()))
        finally:
            setting.cancel()
            await asyncio.wait([setting])
        await self._look()
        self._trusted = self._trusted or whole
        await self.close_window(window, begin)

    async def _close_left(self, window: int, begin: float) -> None:
        """Scores the window before this one if an earlier process has measured in it and ended."""
        last = self._history.last_window()
        left = any(row.window == window for row in self._history.measurements(begin))
        if left and (last is None or last[0] != window):
            await self.close_window(window, begin)

    async def close_window(self, window: int, begin: float) -> None:
        """Scores what the window that began at `begin` has brought; all of it is kept at once."""
        last = self._history.last_window()
        if last is not None and last[0] == window:
            return  # the clock was set back: nothing counts twice
        metagraph = await self._directory.metagraph(METAGRAPH_AGE_S)
        registered = {n.hotkey for n in metagraph.neurons}
        now = time.time()
        standings = self._standings()
        goodputs = {h: s.goodput_bytes_per_s for h, s in standings.items() if s.goodput_bytes_per_s}
        seen = self._seen(window, begin, self._organic.settle(now, goodputs))
        for hotkey, brought in seen.items():
            standings[hotkey] = advance(standings.get(hotkey, Standing()), brought, self._config)
        current = {hotkey: s for hotkey, s in standings.items() if hotkey in registered}
        scored = score_all(
            current,
            banned=self._auditor.banned(),
            disputed=self._auditor.flags().miners,
            clusters=await self._rounds.cluster_of(current),
            cap_bytes_per_s=self._rounds.cap_bytes_per_s,
            config=self._config,
        )
        self._history.close_window(
            window,
            now,
            {hotkey: to_json(standings[hotkey]) for hotkey in seen},
            {
                hotkey: store.Score(
                    rank=rank,
                    score=parts.score,
                    weight=parts.weight,
                    components_json=components_json(parts),
                )
                for rank, (hotkey, parts) in enumerate(scored.items(), 1)
            },
        )
        self._recruiter.weights = weights(scored)
        self._history.prune(now)
        self._auditor.prune(now)
        _log.info(
            "window closed",
            extra={
                "window": window,
                "miners": len(scored),
                "measured": len(seen),
                "with_weight": len(self._recruiter.weights),
            },
        )

    def _seen(
        self, window: int, begin: float, outcomes: Sequence[store.Outcome]
    ) -> dict[str, Seen]:
        """What benchmarks and real jobs have shown in this window, by hotkey."""
        slots: defaultdict[str, list[store.Measurement]] = defaultdict(list)
        for row in self._history.measurements(begin):
            if row.window == window and row.outcome != "void":
                slots[row.hotkey].append(row)
            if row.outcome == "measured":
                self._measured_at = max(self._measured_at, row.at)
        owners: defaultdict[str, dict[str, OwnerSeen]] = defaultdict(dict)
        for outcome in outcomes:
            before = owners[outcome.hotkey].get(outcome.owner, OwnerSeen())
            owners[outcome.hotkey][outcome.owner] = replace(
                before,
                completed=before.completed + outcome.completed,
                failed=before.failed + outcome.failed,
                ratios=before.ratios if outcome.ratio is None else (*before.ratios, outcome.ratio),
            )
        return {
            hotkey: Seen(
                goodputs_bytes_per_s=tuple(row.goodput_bytes_per_s for row in slots[hotkey]),
                completed=sum(row.outcome == "measured" for row in slots[hotkey]),
                failed=sum(row.outcome == "failed" for row in slots[hotkey]),
                latencies_s=tuple(
                    row.latency_s for row in slots[hotkey] if row.latency_s is not None
                ),
                owners=owners.get(hotkey, {}),
            )
            for hotkey in sorted(slots.keys() | owners.keys())
        }

    # Weights --------------------------------------------------------------------------------------

    async def _set_weights_until(self, end: float) -> None:
        """Looks now and then, until the window ends, whether weights are due."""
        while time.time() < end:
            try:
                if self._may_set:
                    await self._setter.set_if_due(self._current_weights())
            except MapReduceError as error:
                _log.warning("weights wait", extra={"error": str(error)})
            except Exception:  # as at the top: whatever is wrong now may be right in a minute
                _log.exception("setting weights failed")
            await asyncio.sleep(self._setter.pause_s)

    def _current_weights(self) -> Mapping[str, float]:
        """By hotkey: the last scores, without whoever has been caught since."""
        banned = self._auditor.banned()
        scores = self._history.scores()
        kept = {h: s.weight for h, s in scores.items() if s.weight > 0 and h not in banned}
        total = math.fsum(kept.values())
        return {hotkey: weight / total for hotkey, weight in kept.items()}


def components_json(parts: Components) -> str:
    """The factors of a score as text for a store; `score` and `weight` stand beside it."""
    factors = asdict(parts)
    del factors["score"], factors["weight"]
    return json.dumps(factors, separators=(",", ":"))
