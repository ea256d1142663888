"""Whether others can reach a neuron where it says that it listens: a validator dials back.

Both sides: the validator's route, and the neuron that asks. Knows what an answer proves, and how to
say it to an operator; knows nothing of how an address is found (`axon.py`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING

from mapreduce.errors import MapReduceError, Refused, Unavailable, VersionMismatch
from mapreduce.net.client import Remote, call
from mapreduce.net.server import CALLER, NO_NEURON, json_response
from mapreduce.wire.dial import MAX_REASON, DialAnswer
from mapreduce.wire.messages import MinerStatus

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web
    from bittensor.sp_core import Keypair

    from mapreduce.chain.metagraph import Neuron
    from mapreduce.services.neuron import Directory

DIAL_TIMEOUT_S = 5.0
ANSWER_S = 5.0  # that the answer may come after the dialling
FRESH_S = 2.0  # who asks may have moved just now
AGAIN_S = 30.0  # from one dialling of a hotkey to the next
ASKED = 3  # validators at a time
FIRST_S = 10.0
EVERY_S = 3600.0
UNREACHABLE_S = 300.0  # while it is not reached
WRONG_PARTY = 401  # what our server answers to a request that is meant for another hotkey

_log = logging.getLogger(__name__)


class DialBack:
    """The route on a validator. It dials what the chain shows, never what a caller names."""

    def __init__(self, key: Keypair, directory: Directory, http: aiohttp.ClientSession) -> None:
        self._key = key
        self._directory = directory
        self._http = http
        self._dialled_at: dict[str, float] = {}

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/dial", self._dial)

    async def _dial(self, request: web.Request) -> web.Response:
        hotkey = request[CALLER].address
        neuron = None
        if not request[CALLER].is_session_key:
            neuron = (await self._directory.metagraph(FRESH_S)).by_hotkey(hotkey)
        if neuron is None:
            raise Refused(
                f"{hotkey} is not registered on this subnet", code="not_registered", status=403
            )
        if neuron.ip is None or neuron.port is None:
            raise Refused("the chain shows no axon of this hotkey", code="no_axon")
        self._require_rarely(hotkey)
        reason = await self._reach(neuron, neuron.ip, neuron.port)
        return json_response(
            DialAnswer(
                ip=neuron.ip,
                port=neuron.port,
                reached=reason is None,
                reason=(reason or "")[:MAX_REASON],
                seen_from=(request.remote or "").removeprefix("::ffff:")[:64],
            )
        )

    def _require_rarely(self, hotkey: str) -> None:
        """Raises Refused if this hotkey was dialled just now."""
        now = asyncio.get_running_loop().time()
        self._dialled_at = {k: at for k, at in self._dialled_at.items() if now - at < AGAIN_S}
        if hotkey in self._dialled_at:
            wait_s = self._dialled_at[hotkey] + AGAIN_S - now
            raise Refused(f"dialled just now; ask again in {wait_s:.0f} s", code="too_often")
        self._dialled_at[hotkey] = now

    async def _reach(self, neuron: Neuron, ip: str, port: int) -> str | None:
        """Why this hotkey does not answer there; None if it does."""
        remote = Remote(f"uid {neuron.uid}", neuron.hotkey, ip, port)
        try:
            await call(
                self._http,
                self._key,
                remote,
                "GET",
                "/v1/status",
                None,
                MinerStatus,
                timeout_s=DIAL_TIMEOUT_S,
            )
        except VersionMismatch:
            return None
        except Refused as error:
            # Our server looks at whom a request is for before anything else, so whatever it refuses
            # for another reason, a validator for want of this route, it was the right one.
            if error.status == WRONG_PARTY:
                return "somebody else answers there: a neuron with another hotkey"
            return str(error) if error.code == NO_NEURON else None
        except MapReduceError as error:
            return str(error)
        return None


async def watch_reach(
    key: Keypair, directory: Directory, http: aiohttp.ClientSession, axon: object
) -> None:
    """Asks validators from time to time whether they reach this hotkey, and tells the log what they
    say. `axon` is how the log names the address."""
    reached: bool | None = None
    unheard_s = FIRST_S
    await asyncio.sleep(FIRST_S * random.random())
    while True:
        answers = await _ask_some(key, directory, http)
        pause_s = unheard_s
        if not answers:  # validators may be about to start
            unheard_s = min(2 * unheard_s, EVERY_S)
        else:
            before, reached = reached, any(answer.reached for _, answer in answers)
            if not reached:
                _log.error(_unreachable(answers))
            elif not before:
                by = next(name for name, answer in answers if answer.reached)
                _log.info("reachable as advertised", extra={"axon": axon, "by": by})
            pause_s = EVERY_S if reached else UNREACHABLE_S
        await asyncio.sleep(pause_s * random.uniform(0.9, 1.1))


async def _ask_some(
    key: Keypair, directory: Directory, http: aiohttp.ClientSession
) -> list[tuple[str, DialAnswer]]:
    """What some validators, by name, have found; those that do not say are left out."""
    try:
        metagraph = await directory.metagraph(FRESH_S)
    except Unavailable:
        return []
    validators = [
        Remote(f"validator uid {n.uid}", n.hotkey, n.ip, n.port)
        for n in metagraph.neurons
        if n.validator_permit and n.ip is not None and n.port and n.hotkey != key.ss58_address
    ]
    chosen = random.sample(validators, min(ASKED, len(validators)))
    answers = await asyncio.gather(*(_ask(key, http, validator) for validator in chosen))
    return [
        (validator.name, answer)
        for validator, answer in zip(chosen, answers, strict=True)
        if answer is not None
    ]


async def _ask(key: Keypair, http: aiohttp.ClientSession, validator: Remote) -> DialAnswer | None:
    try:
        return await call(
            http,
            key,
            validator,
            "POST",
            "/v1/dial",
            None,
            DialAnswer,
            timeout_s=DIAL_TIMEOUT_S + ANSWER_S,
        )
    except MapReduceError as error:
        _log.debug("not dialled back", extra={"by": str(validator), "reason": str(error)})
        return None


def _unreachable(answers: list[tuple[str, DialAnswer]]) -> str:
    """One line that says what is wrong and what to do, of what strangers have answered."""
    name, answer = answers[0]
    others = f", nor can {len(answers) - 1} more" if len(answers) > 1 else ""
    text = (
        f"unreachable as advertised: {name} cannot reach {answer.ip}:{answer.port}{others} "
        f"({answer.reason}); it sees this host as {answer.seen_from}. Open or forward the port, or "
        "publish another address with --axon.external_ip and --axon.external_port"
    )
    return "".join(c if c.isprintable() else "?" for c in text)
