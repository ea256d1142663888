"""The control client: signed JSON requests to miners and validators.

Knows refusals and timeouts; knows no route's meaning.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import aiohttp
from yarl import URL

from mapreduce import __version__
from mapreduce.errors import BadMessage, Refused, Unavailable, VersionMismatch
from mapreduce.net.auth import sign_request
from mapreduce.net.server import VERSION_HEADER, parse_error
from mapreduce.wire.messages import MAX_MESSAGE_BYTES, decode_message, encode_message

if TYPE_CHECKING:
    from bittensor.sp_core import Keypair

Answer = TypeVar("Answer")

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a neuron listens, and the hotkey that requests to it are bound to.

    `name` is for errors.
    """

    name: str
    hotkey: str
    ip: str
    port: int

    def url(self, path: str) -> URL:
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return URL(f"http://{host}:{self.port}{path}", encoded=True)

    def __str__(self) -> str:
        return f"{self.name} at {self.ip}:{self.port}"


def make_http_session() -> aiohttp.ClientSession:
    """A client session for control requests and streams.

    Redirects and proxies have no place here.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        headers={VERSION_HEADER: __version__},
        auto_decompress=False,
    )


def raise_refusal(remote: Remote, status: int, body: bytes) -> None:
    """Raises what a neuron's refusal means to the caller."""
    detail = parse_error(status, body)
    message = f"{remote} refused: {detail.message}"
    if detail.code == "version_mismatch":
        raise VersionMismatch(message, status=status)
    raise Refused(message, code=detail.code, status=status)


async def call(
    http: aiohttp.ClientSession,
    key: Keypair,
    remote: Remote,
    method: str,
    path: str,
    message: object | None,
    answer: type[Answer],
    *,
    timeout_s: float = 10.0,
    most_bytes: int = MAX_MESSAGE_BYTES,
) -> Answer:
    """Sends one signed request and decodes the answer, of at most `most_bytes`. `message` may be
    bytes, and so may the `answer`.

    Raises Unavailable if none comes, Refused (VersionMismatch) if the answer is no, and BadMessage
    if it cannot be read.
    """
    if message is None or isinstance(message, bytes):
        body = message or b""
    else:
        body = encode_message(message)
    headers = sign_request(key, method=method, path=path, body=body, receiver=remote.hotkey)
    if http.closed:
        raise Unavailable(f"{remote} is not asked any more: this side is closing")
    try:
        async with (
            asyncio.timeout(timeout_s),
            http.request(
                method, remote.url(path), data=body, headers=headers, allow_redirects=False
            ) as response,
        ):
            data = await response.content.read(most_bytes + 1)
            while len(data) <= most_bytes and not response.content.at_eof():
                data += await response.content.read(most_bytes + 1 - len(data))
            status = response.status
    except TimeoutError:
        raise Unavailable(f"{remote} did not answer {method} {path} in {timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(f"{remote} cannot be reached: {error or type(error).__name__}") from None
    if status != 200:
        raise_refusal(remote, status, data)
    if isinstance(data, answer):  # bytes were asked for
        if len(data) > most_bytes:
            raise BadMessage(f"an answer of more than {most_bytes} bytes", who=str(remote))
        return data
    try:
        return decode_message(answer, data)
    except BadMessage as error:
        raise BadMessage(str(error), who=str(remote)) from None
