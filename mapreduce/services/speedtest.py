"""The miner's speed test: runs the public tool when a validator asks, and tells what it said.

Knows the routes, the tool's process and how it ends; bounds and times are in `wire/speedtest.py`.
Knows nothing of scores: the figures are information for people.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
import time
from typing import TYPE_CHECKING

from mapreduce.commands import run_command
from mapreduce.errors import BadMessage, Refused, Unavailable
from mapreduce.net.server import json_response
from mapreduce.wire.speedtest import (
    EVERY_S,
    MAX_OUTPUT_BYTES,
    NEVER,
    SpeedTestAnswer,
    done,
    failed,
    loggable,
    may_start,
    running,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiohttp import web

TOOL = "speedtest"  # the module of speedtest-cli
TIMEOUT_S = 120.0  # it takes 20 to 40 s
NOT_INSTALLED = "speedtest-cli is not installed"

_log = logging.getLogger(__name__)


def tool_command(mini: str | None, module: str = TOOL) -> list[str]:
    """What runs the tool, against the Mini server at the URL `mini` or the nearest public one."""
    # -P: no speedtest.py of the directory that the miner was started in, ours least of all, is
    # taken for the tool. Without its pre-allocation it takes 150 MB less of the miner's memory.
    command = [sys.executable, "-P", "-W", "ignore", "-m", module, "--json", "--no-pre-allocate"]
    # A Mini server is the operator's own, and rarely speaks TLS.
    return [*command, "--secure"] if mini is None else [*command, "--mini", mini]


def is_installed(module: str = TOOL) -> bool:
    """Whether Python finds the tool."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


async def run_tool(command: Sequence[str], timeout_s: float = TIMEOUT_S) -> bytes:
    """What the tool prints; raises CommandFailed."""
    return await run_command(
        "speedtest-cli", command, timeout_s=timeout_s, most_bytes=MAX_OUTPUT_BYTES
    )


class SpeedTests:
    """The routes, the one test that may run, and the last one.

    `permitted` raises Refused for a caller without a validator permit, `job_count` is how many jobs
    the miner serves now, `mini` the URL of the operator's own server, `module` the tool.
    """

    def __init__(
        self,
        permitted: Callable[[web.Request], Awaitable[object]],
        job_count: Callable[[], int],
        *,
        enabled: bool = True,
        mini: str | None = None,
        module: str = TOOL,
    ) -> None:
        self.last: SpeedTestAnswer = NEVER
        self._permitted = permitted
        self._job_count = job_count
        self._enabled = enabled
        self._mini = mini
        self._module = module
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def add_routes(self, app: web.Application) -> None:
        """Adds them, and warns once if no test can run."""
        app.router.add_get("/v1/speedtest", self._show)
        app.router.add_post("/v1/speedtest", self._start)
        app.on_shutdown.append(self._shutdown)
        if self._enabled and not is_installed(self._module):
            _log.warning(
                f"{NOT_INSTALLED}: validators that ask for a speed test are told so; "
                "pip install speedtest-cli; the miner runs on"
            )

    async def _show(self, request: web.Request) -> web.Response:
        await self._admit(request)
        return json_response(self.last)

    async def _start(self, request: web.Request) -> web.Response:
        """Starts one if it may; the answer is the test that runs, or the last one."""
        await self._admit(request)
        now = time.time()
        if may_start(self.last, now):
            self._check_idle()
            self._begin(now)
        return json_response(self.last)

    async def _admit(self, request: web.Request) -> None:
        await self._permitted(request)
        if not self._enabled:
            raise Refused("this miner runs no speed tests (--miner.no_speedtest)", code="disabled")

    def _check_idle(self) -> None:
        """Raises Refused unless a test harms nobody."""
        if self._closing:
            raise Refused("the miner is shutting down", code="closing", status=503)
        jobs = self._job_count()
        if jobs:
            raise Refused(
                f"{jobs} job{'s' if jobs > 1 else ''} running: a speed test would slow "
                f"{'them' if jobs > 1 else 'it'} down, and measure nothing; ask again later",
                code="busy",
            )

    def _begin(self, now: float) -> None:
        if not is_installed(self._module):
            self._fail(f"{NOT_INSTALLED} on the miner's side", now)
            return
        self.last = running(now)
        self._task = asyncio.create_task(self._run(now))

    async def _run(self, at: float) -> None:
        try:
            answer = done(await run_tool(tool_command(self._mini, self._module)), at)
        except (Unavailable, BadMessage) as error:
            self._fail(str(error), at)
            return
        except Exception:
            _log.exception("the speed test failed")
            self.last = failed("an error of the miner; its log has more", at)
            return
        self.last = answer
        _log.info(
            "speed test done",
            extra={
                "download_bits_per_s": answer.download_bits_per_s,
                "upload_bits_per_s": answer.upload_bits_per_s,
                "ping_s": answer.ping_s,
                "server": None if answer.server is None else answer.server.name,
                "next_in_s": EVERY_S,
            },
        )

    def _fail(self, reason: str, at: float) -> None:
        self.last = failed(reason, at)
        _log.warning("no speed test; the miner runs on", extra={"reason": loggable(reason)})

    async def _shutdown(self, _: web.Application) -> None:
        """Ends the tool with everything it has started."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
