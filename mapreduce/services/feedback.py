"""What a validator tells of scores: to each hotkey its own, and to anybody the proofs.

Knows the routes, and which rows of the state make an answer. Does not know how scores are made, nor
how they read (`mapreduce/score.py`).
"""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

from aiohttp import web
from blake3 import blake3

from mapreduce.errors import BadMessage, Refused, Unavailable, ValidatorUnreachable
from mapreduce.net.auth import signer, verify_signature
from mapreduce.net.client import Remote, call
from mapreduce.net.server import CALLER, json_response
from mapreduce.services.auditor import DISPUTE_WINDOW_S
from mapreduce.services.neuron import METAGRAPH_AGE_S
from mapreduce.wire.messages import decode_message, encode_message
from mapreduce.wire.proofs import MAX_PROOF_BYTES
from mapreduce.wire.scores import (
    MAX_MEASUREMENTS,
    MAX_REASON,
    MAX_STRIKES,
    Ban,
    Measured,
    ScoreFeedback,
    SignedScore,
    Status,
    Strike,
    WeightsFailed,
    WeightsSet,
    WindowScore,
    read_components,
    score_statement,
)

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from bittensor.sp_core import Keypair

    from mapreduce.chain.metagraph import Neuron
    from mapreduce.core.scoring_config import ScoringConfig
    from mapreduce.services.auditor import Auditor
    from mapreduce.services.neuron import Directory
    from mapreduce.store.history import History
    from mapreduce.store.ledger import Ledger

MAX_AGE_S = 60.0  # of an answer: an older one may hide what has happened since
ALLOWED_SKEW_S = 10.0  # of two clocks

# Which step of which job tells a miner its benchmarks; a node's URL may hold its operator's key,
# and paths are of the machines of bots.
_PRIVATE = re.compile(r"\bstep \d+|\b[0-9a-f]{32}\b|\S+://\S+|(?<!\S)[~/]\S+")


class Feedback:
    """The routes that miners ask. `cap_bytes_per_s` is the most that the bots can measure."""

    def __init__(
        self,
        key: Keypair,
        netuid: int,
        directory: Directory,
        history: History,
        ledger: Ledger,
        auditor: Auditor,
        cap_bytes_per_s: float,
        config: ScoringConfig,
    ) -> None:
        self._key = key
        self._netuid = netuid
        self._directory = directory
        self._history = history
        self._ledger = ledger
        self._auditor = auditor
        self._cap_bytes_per_s = cap_bytes_per_s
        self._config = config

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/v1/score", self._score)
        app.router.add_get("/v1/proofs/{proof}", self._proof)

    async def _score(self, request: web.Request) -> web.Response:
        """The caller's own score: what others get is none of its business."""
        caller = request[CALLER]
        if caller.is_session_key:
            raise Refused("a score is a hotkey's: sign with it", code="hotkey_required", status=403)
        metagraph = await self._directory.metagraph(METAGRAPH_AGE_S)
        neuron = metagraph.by_hotkey(caller.address)
        text = encode_message(self.of(caller.address, neuron, time.time())).decode()
        signature = signer(self._key)(score_statement(text)).hex()
        return json_response(SignedScore(score=text, signature=signature))

    async def _proof(self, request: web.Request) -> web.Response:
        """A proof is evidence for everybody."""
        data = self._ledger.proof(request.match_info["proof"])
        if data is None:
            message = "no such proof is kept (any more)"
            raise Refused(message, code="no_such_proof", status=404)
        return web.Response(body=data, content_type="application/octet-stream")

    def of(self, hotkey: str, neuron: Neuron | None, now: float) -> ScoreFeedback:
        """All there is to tell the hotkey. Raises LocalError if the state cannot be read."""
        last = self._history.last_window()
        score = self._window_score(hotkey)
        ban = self._ban(hotkey)
        status: Status = "scored" if score is not None else "not scored yet"
        if ban is not None:
            status = "banned"
        if neuron is None:
            status = "not registered"
        return ScoreFeedback(
            validator=self._key.ss58_address,
            hotkey=hotkey,
            netuid=self._netuid,
            uid=None if neuron is None else neuron.uid,
            at=now,
            status=status,
            window=None if last is None else last[0],
            window_closed_at=None if last is None else last[1],
            score=score,
            cap_bytes_per_s=self._cap_bytes_per_s,
            measurements=[] if last is None else self._measured(hotkey, last[0], now),
            ban=ban,
            strikes=[
                Strike(
                    proof=entry.id,
                    kind=entry.kind,
                    role="miner" if entry.role == "miner" else "peer",
                    at=entry.at,
                )
                for entry in self._ledger.proofs_of(hotkey, MAX_STRIKES)
            ],
            disputes=self._ledger.peers_disputing(hotkey, now - DISPUTE_WINDOW_S),
            weights=self._weights(neuron),
            weights_failed=self._weights_failed(),
        )

    def _window_score(self, hotkey: str) -> WindowScore | None:
        scores = self._history.scores()
        own = scores.get(hotkey)
        if own is None:
            return None
        components = read_components(own.components_json, score=own.score, weight=own.weight)
        return WindowScore(rank=own.rank, miners=len(scores), components=components)

    def _measured(self, hotkey: str, window: int, now: float) -> list[Measured]:
        """None of the window that runs: it would tell which of the last jobs was a benchmark."""
        since = now - (MAX_MEASUREMENTS + 1) * self._config.window_s
        rows = self._history.measurements(since, hotkey=hotkey)
        closed = [row for row in rows if row.window <= window]
        return [
            Measured(
                window=row.window,
                window_at=row.at - row.at % self._config.window_s,
                outcome=row.outcome,
                goodput_bytes_per_s=float(f"{row.goodput_bytes_per_s:.3g}"),
                latency_s=None if row.latency_s is None else round(row.latency_s, 3),
                # What is void was no fault of the miner, and is nothing that it should know.
                reason="" if row.outcome == "void" else told(row.reason),
            )
            for row in closed[: -MAX_MEASUREMENTS - 1 : -1]
        ]

    def _ban(self, hotkey: str) -> Ban | None:
        proof = self._auditor.banned().get(hotkey)
        entry = None if proof is None else self._ledger.proof_entry(proof)
        if entry is None:
            return None
        until = entry.at + self._config.ban_s
        return Ban(proof=entry.id, own=entry.culprit == hotkey, until=until)

    def _weights(self, neuron: Neuron | None) -> WeightsSet | None:
        last = [self._history.last_weights("set"), self._history.last_weights("dry run")]
        newest = max((w for w in last if w is not None), key=lambda w: w.at, default=None)
        if newest is None:
            return None
        weight = 0.0
        if neuron is not None and neuron.registered_at_block <= newest.block:  # else another's uid
            weight = json.loads(newest.vector_json).get(str(neuron.uid), 0.0)
        return WeightsSet(
            at=newest.at,
            block=newest.block,
            dry_run=newest.result == "dry run",
            weight=weight,
        )

    def _weights_failed(self) -> WeightsFailed | None:
        last = [self._history.last_weights("refused"), self._history.last_weights("unreachable")]
        newest = max((w for w in last if w is not None), key=lambda w: w.at, default=None)
        if newest is None:
            return None
        return WeightsFailed(at=newest.at, reason=told(newest.reason))


def told(reason: str) -> str:
    """A reason from the state as a miner gets to read it: without what is not its business."""
    return _PRIVATE.sub("..", reason)[:MAX_REASON]


def read_score(signed: SignedScore, *, validator: str, hotkey: str, now: float) -> ScoreFeedback:
    """The score, once it is proven to be that validator's word on that hotkey, and fresh. Raises
    BadMessage."""
    score = decode_message(ScoreFeedback, signed.score)
    signature = bytes.fromhex(signed.signature)
    if not verify_signature(validator, score_statement(signed.score), signature, session_key=False):
        raise BadMessage(f"the signature of this score is not {validator}'s")
    if score.validator != validator:
        raise BadMessage(f"the score is by {score.validator}, not by {validator}")
    if score.hotkey != hotkey:
        raise BadMessage(f"the score is of {score.hotkey}, not of {hotkey}")
    age_s = now - score.at
    if not -ALLOWED_SKEW_S <= age_s <= MAX_AGE_S:
        raise BadMessage(
            f"the score was signed {age_s:.0f} s ago by this clock: at most {MAX_AGE_S:g} s are "
            "accepted; set the clocks (NTP) or ask again"
        )
    return score


async def ask_score(
    http: ClientSession, key: Keypair, validator: Remote
) -> tuple[SignedScore, ScoreFeedback]:
    """What a validator tells this hotkey, checked.

    Raises ValidatorUnreachable, Refused, or BadMessage as `read_score` does.
    """
    try:
        signed = await call(http, key, validator, "GET", "/v1/score", None, SignedScore)
    except Unavailable as error:
        raise ValidatorUnreachable(str(error)) from None
    except Refused as error:
        if error.status != 404:
            raise
        text = f"{validator} is no validator that tells scores"
        raise Refused(text, code=error.code, status=404) from None
    score = read_score(signed, validator=validator.hotkey, hotkey=key.ss58_address, now=time.time())
    return signed, score


async def ask_proof(
    http: ClientSession, key: Keypair, validator: Remote, proof: str
) -> bytes | None:
    """The evidence of a proof; None if the validator has none (any more)."""
    path = f"/v1/proofs/{proof}"
    try:
        data = await call(
            http, key, validator, "GET", path, None, bytes, most_bytes=MAX_PROOF_BYTES
        )
    except Unavailable as error:
        raise ValidatorUnreachable(str(error)) from None
    except Refused as error:
        if error.code != "no_such_proof":
            raise
        return None
    if blake3(data).hexdigest()[:32] != proof:
        raise BadMessage(f"the evidence of proof {proof} is another's", who=str(validator))
    return data
