"""A Speedtest Mini server on loopback, for the public tool as it is.

It also is the HTTP proxy that the tool asks for its configuration, which it fetches from its public
host whatever the server: `environment` makes a process find both. Knows the six requests of
speedtest-cli 2.1.3; knows nothing of miners.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

IP = "127.0.0.1"
CONFIG_HOST = "www.speedtest.net"
CHUNK = bytes(64 * 1024)
DOWNLOAD_BYTES = 4 * len(CHUNK)
HOLD_S = 60.0  # bounds a test that forgets to let go

# Each direction ends after one request of each size, or soon after a second. The ratio is that of
# the public configuration: of smaller sizes the tool sends less than it has announced.
CONFIG = b"""<?xml version="1.0" encoding="UTF-8"?>
<settings>
<client ip="192.0.2.1" lat="52.5" lon="13.4" isp="Loopback" country="DE"/>
<server-config threadcount="2" ignoreids=""/>
<download testlength="1" threadsperurl="1"/>
<upload testlength="1" ratio="5" maxchunkcount="3" threads="2"/>
</settings>
"""


class SpeedtestMini:
    """`with SpeedtestMini() as mini:` serves at `mini.url`. What `hold` names ("config", "page",
    "latency", "download" or "upload") is answered no more, until the server closes or `release`."""

    def __init__(self, *, hold: str | None = None) -> None:
        self.requests: list[str] = []  # what was asked for, in order
        self.hold = hold
        self.released = threading.Event()
        self._server = ThreadingHTTPServer((IP, 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        """HOST:PORT, by which the tool calls a Mini server."""
        return f"{IP}:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        """What `--miner.speedtest_mini` takes."""
        return f"http://{self.address}/mini"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in which the tool runs: no other host is asked for anything."""
        proxy = f"http://{self.address}"
        lower = {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": IP}
        return lower | {name.upper(): value for name, value in lower.items()}

    def release(self) -> None:
        """Answers what it held back."""
        self.released.set()


def _handler(mini: SpeedtestMini) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            target = urlsplit(self.path)
            what = _WHAT.get(target.path.rpartition("/")[2])
            if target.hostname == CONFIG_HOST:
                what = "config"
            elif target.path.startswith("/mini/speedtest/random"):
                what = "download"
            if what is None or target.hostname not in (None, CONFIG_HOST):
                self.send_error(404)
                return
            self._take(what)
            if what == "download":
                self._answer(CHUNK, times=DOWNLOAD_BYTES // len(CHUNK))
            else:
                self._answer(_BODIES[what])

        def do_POST(self) -> None:
            self._take("upload")
            left = int(self.headers["Content-Length"])
            size = left
            while left > 0 and (data := self.rfile.read(min(left, len(CHUNK)))):
                left -= len(data)
            self._answer(b"size=%d" % size)

        def _take(self, what: str) -> None:
            mini.requests.append(what)
            if mini.hold == what:
                mini.released.wait(HOLD_S)

        def _answer(self, body: bytes, times: int = 1) -> None:
            try:
                self.send_response(200)
                self.send_header("Content-Length", str(times * len(body)))
                self.end_headers()
                for _ in range(times):
                    self.wfile.write(body)
            except OSError:  # the tool's time is up, or the tool has ended
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


_WHAT = {"mini": "page", "latency.txt": "latency"}
_BODIES = {
    "config": CONFIG,
    "page": b'<script>var config = { upload_extension: "php" };</script>',
    "latency": b"test=test\n",
}
