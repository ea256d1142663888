"""When weights are set on the chain, and what becomes of a failure.

Knows what was set before and when it may be again. Does not know how scores are made, nor the
chain's calls (`chain/weights.py`).
"""

from __future__ import annotations

import json
import logging
import math
import time
from typing import TYPE_CHECKING

from mapreduce import __version__
from mapreduce.chain.weights import plan_weights, read_weights_clock, set_weights
from mapreduce.core.versions import Version
from mapreduce.errors import ChainUnavailable, InvalidArgument, NotRegistered, Refused
from mapreduce.services.neuron import METAGRAPH_AGE_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    import bittensor as bt
    from bittensor.sp_core import Keypair

    from mapreduce.services.neuron import Directory
    from mapreduce.store.history import History
    from mapreduce.store.records import Result

RETRY_S = (15.0, 900.0)  # after a failure: the first pause, and the longest

_log = logging.getLogger(__name__)


def version_key(version: str) -> int:
    """The number under which a release sets weights: 1.2.3 is 10203. A subnet's owner can refuse
    the weights of older ones."""
    number = Version.parse(version)
    return number.major * 10_000 + number.minor * 100 + number.patch


class WeightSetter:
    """Sets the weights of one validator; `pause_s` is how often it should be asked. With `dry_run`
    it logs and records what it would set."""

    def __init__(
        self,
        client: bt.Client,
        key: Keypair,
        netuid: int,
        directory: Directory,
        history: History,
        *,
        dry_run: bool,
    ) -> None:
        self.pause_s = 1.0
        self._client = client
        self._key = key
        self._netuid = netuid
        self._directory = directory
        self._history = history
        self._dry_run = dry_run
        self._not_before = 0.0
        self._failures = 0
        self._alarmed = False

    async def set_if_due(self, weights: Mapping[str, float]) -> None:
        """Sets these weights (by hotkey, summing to 1) if they are news and the chain allows it.

        Never sets none at all: if no miner has a score, what the chain holds stays.
        """
        if time.time() < self._not_before:
            return
        metagraph = await self._directory.metagraph(METAGRAPH_AGE_S)
        # By uid as they are now: whoever has taken over a uid does not inherit its weight. What a
        # validator says of itself a chain does not count.
        own_hotkey = self._key.ss58_address
        uids = {n.hotkey: n.uid for n in metagraph.neurons if n.hotkey != own_hotkey}
        vector = {uids[hotkey]: weight for hotkey, weight in weights.items() if hotkey in uids}
        total = math.fsum(vector.values())
        if not total > 0:
            if not self._alarmed:
                _log.error("no miner has a score: weights are not set, the chain keeps the last")
            self._alarmed = True
            return
        self._alarmed = False
        vector = {uid: vector[uid] / total for uid in sorted(vector)}
        if self._is_news(vector):
            own = metagraph.by_hotkey(own_hotkey)
            if own is None:
                self._failed(vector, "refused", "this hotkey is not registered any more")
            else:
                await self._set(own.uid, vector)

    def _is_news(self, vector: Mapping[int, float]) -> bool:
        """Whether other weights were set last, or a window was scored since."""
        last = self._history.last_weights("dry run" if self._dry_run else "set")
        if last is None or last.vector_json != _text(vector):
            return True
        window = self._history.last_window()
        return window is not None and window[1] > last.at

    async def _set(self, uid: int, vector: Mapping[int, float]) -> None:
        number = version_key(__version__)
        try:
            clock = await read_weights_clock(self._client, self._netuid, uid)
            if clock.wait_blocks > 0:
                self._not_before = time.time() + clock.wait_blocks * clock.block_time_s
                _log.info(
                    "weights wait for the chain's rate limit",
                    extra={"blocks": clock.wait_blocks, "limit": clock.rate_limit_blocks},
                )
                return
            if self._dry_run:
                planned = await plan_weights(
                    self._client, self._key, self._netuid, vector, version_key=number
                )
                _log.info("weights that would be set (dry run)", extra={"weights": planned})
                self._record(vector, clock.block, "dry run", "neuron.disable_set_weights")
                return
            done = await set_weights(
                self._client, self._key, self._netuid, vector, version_key=number
            )
        except (Refused, InvalidArgument, NotRegistered) as error:
            self._failed(vector, "refused", str(error))
        except ChainUnavailable as error:
            self._failed(vector, "unreachable", str(error))
        else:
            self._failures = 0
            self._record(vector, done.block, "set", "")
            _log.info(
                "weights are set",
                extra={
                    "block": done.block,
                    "miners": len(vector),
                    "commit_reveal": done.commit_reveal,
                    "weights": {uid: round(weight, 4) for uid, weight in vector.items()},
                },
            )

    def _failed(self, vector: Mapping[int, float], result: Result, reason: str) -> None:
        pause_s = min(RETRY_S[0] * 2**self._failures, RETRY_S[1])
        self._failures = min(self._failures + 1, 16)
        self._not_before = time.time() + pause_s
        self._record(vector, 0, result, reason)
        _log.error("weights are not set", extra={"reason": reason, "retry_s": pause_s})

    def _record(self, vector: Mapping[int, float], block: int, result: Result, why: str) -> None:
        self._history.add_weights(
            at=time.time(), block=block, vector_json=_text(vector), result=result, reason=why[:256]
        )


def _text(vector: Mapping[int, float]) -> str:
    return json.dumps(vector, separators=(",", ":"))
