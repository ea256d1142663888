"""The HTTP server of a neuron: authentication, limits and error bodies around its routes.

Knows no route's meaning.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING

from aiohttp import web

from mapreduce import __version__
from mapreduce.core.versions import MAX_CLAIM, disagreement
from mapreduce.errors import (
    BadMessage,
    LocalError,
    Refused,
    Unavailable,
    VersionMismatch,
)
from mapreduce.net.auth import Caller, Denied, Verifier
from mapreduce.net.listener import BACKLOG
from mapreduce.wire.messages import MAX_MESSAGE_BYTES, ErrorAnswer, ErrorDetail, encode_message

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

VERSION_HEADER = "X-Mapreduce-Version"
SHUTDOWN_TIMEOUT_S = 2.0
TELL_AGAIN_S = 3600.0
MAX_TOLD = 16
NO_NEURON = "no_neuron"  # the code of a refusal that is none of this protocol
CALLER = web.RequestKey("caller", Caller)
BODY = web.RequestKey("body", bytes)

_log = logging.getLogger(__name__)


class Strangers:
    """Tells this side's operator of callers with which it cannot work: not every time, since
    anybody can be one."""

    def __init__(self) -> None:
        self._told_at: dict[str, float] = {}

    def check(self, request: web.Request) -> None:
        """Raises VersionMismatch, naming both versions, unless the caller's fits ours."""
        theirs = request.headers.get(VERSION_HEADER)
        reason = disagreement(theirs, __version__, "the caller")
        if reason is None:
            return
        now = asyncio.get_running_loop().time()
        claimed = str(theirs)[:MAX_CLAIM]
        self._told_at = {
            version: at for version, at in self._told_at.items() if now - at < TELL_AGAIN_S
        }
        # Without a version it is no program of ours, but somebody who looks around.
        if theirs and claimed not in self._told_at and len(self._told_at) < MAX_TOLD:
            self._told_at[claimed] = now
            _log.warning(
                "a caller is refused, and gives this neuron no work",
                extra={"address": request.remote, "path": request.path, "reason": reason},
            )
        raise VersionMismatch(reason, status=426)


def json_response(message: object, status: int = 200) -> web.Response:
    """A control message as an answer."""
    return web.Response(
        body=encode_message(message),
        status=status,
        content_type="application/json",
        headers={VERSION_HEADER: __version__},
    )


def error_response(status: int, code: str, message: str) -> web.Response:
    """A refusal: `code` for programs, `message` for people."""
    detail = ErrorDetail(code=code, message=message[:4096])
    return json_response(ErrorAnswer(error=detail), status)


def make_app(verifier: Verifier, readiness: Callable[[], str | None]) -> web.Application:
    """An application whose `/v1/` routes are reached by authenticated callers only.

    `request[CALLER]` says who calls and `request[BODY]` holds the verified body. `readiness`
    returns why the service is not ready, or None.
    """

    strangers = Strangers()

    @web.middleware
    async def authenticate(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not request.path.startswith("/v1/"):
            return await handler(request)
        try:
            strangers.check(request)
            body = await request.read()
            request[CALLER] = verifier.verify(
                request.headers, body, method=request.method, path=request.raw_path
            )
            request[BODY] = body
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            limit = f"control messages are limited to {MAX_MESSAGE_BYTES} bytes"
            return error_response(413, "too_large", limit)
        except Denied as error:
            return error_response(401, error.code, str(error))
        except BadMessage as error:
            return error_response(400, "bad_message", str(error))
        except Refused as error:
            return error_response(error.status or 409, error.code, str(error))
        except (Unavailable, LocalError) as error:
            _log.warning("request failed", extra={"path": request.path, "error": str(error)})
            return error_response(503, "unavailable", str(error))
        except ConnectionError:
            raise  # a stream that is over: aiohttp has nothing left to answer on
        except web.HTTPException as error:
            what = f"{request.method} {request.path}: {error.reason}"
            return error_response(error.status, "http_error", what)
        except Exception:
            _log.exception("request failed", extra={"path": request.path})
            return error_response(500, "internal", "an error on this side; its log has more")

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "version": __version__})

    async def readyz(_: web.Request) -> web.Response:
        reason = readiness()
        if reason is not None:
            return web.json_response({"status": "not ready", "reason": reason}, status=503)
        return web.json_response({"status": "ready", "version": __version__})

    app = web.Application(middlewares=[authenticate], client_max_size=MAX_MESSAGE_BYTES)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


async def start_server(app: web.Application, listener: socket.socket) -> web.AppRunner:
    """Serves on a socket that listens; `await runner.cleanup()` ends it and closes the socket."""
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,  # a peer that hangs up must lose its place in a join
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    await runner.setup()
    await web.SockSite(runner, listener, backlog=BACKLOG).start()
    return runner


def parse_error(status: int, body: bytes) -> ErrorDetail:
    """The refusal in an answer, whatever sent it."""
    try:
        document = json.loads(body)["error"]
        return ErrorDetail(code=str(document["code"])[:64], message=str(document["message"])[:4096])
    except (ValueError, KeyError, TypeError):
        return ErrorDetail(code=NO_NEURON, message=f"HTTP status {status} from no neuron of ours")
