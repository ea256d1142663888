"""A peer's end of a stream that says whatever a test wants it to say."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING

from mapreduce import __version__
from mapreduce.net.auth import new_session_key, sign_request
from mapreduce.net.client import make_http_session
from mapreduce.net.server import VERSION_HEADER
from mapreduce.services.peer_job import PeerJob
from mapreduce.wire.frames import HEADER_BYTES, Header, Kind, encode_frame

if TYPE_CHECKING:
    from bittensor.sp_core import Keypair

    from test.integration.fleet import Fleet, MinerNode


class RawStream:
    """A stream whose peer says what a test wants it to say, signed with `key` where it must be."""

    key: Keypair

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.nonce = b""
        self.farewell = b""

    @classmethod
    async def open(
        cls, node: MinerNode, job: str, key: Keypair, *, hello: bool = True
    ) -> RawStream:
        path = f"/v1/jobs/{job}/stream"
        headers = sign_request(key, method="GET", path=path, body=b"", receiver=node.remote.hotkey)
        headers |= {"Host": "x", "Connection": "Upgrade", "Upgrade": "mapreduce/1"}
        headers[VERSION_HEADER] = __version__
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        stream = cls(*await asyncio.open_connection("127.0.0.1", node.remote.port))
        stream.key = key
        stream.writer.write("\r\n".join([*lines, "", ""]).encode())
        head = (await stream.reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 101 Switching Protocols\r\n"), head
        stream.nonce = bytes.fromhex(head.split("X-Mapreduce-Nonce: ")[1].split("\r\n")[0])
        if hello:
            stream.send(Kind.HELLO, stream.nonce)
        return stream

    def send(self, kind: Kind, body: bytes = b"", **fields: int) -> None:
        self.writer.write(encode_frame(Header(kind=kind, length=len(body), **fields), body))

    async def receive(self) -> Header:
        header = Header.decode(await self.reader.readexactly(HEADER_BYTES))
        await self.reader.readexactly(header.length)
        return header

    async def cut(self) -> bool:
        """Waits until the miner has ended the stream; `farewell` is what it still said."""
        try:
            self.farewell = await self.reader.read()
        except ConnectionResetError:
            self.farewell = b""
        return True

    def reset(self) -> None:
        """Ends the connection as a crashed machine would, if it could still speak."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def jobs_and_raw(fleet: Fleet, real: int) -> tuple[list[PeerJob], RawStream]:
    """A job whose last rank is raw; it runs on the fleet's first miner."""
    node = fleet.miners[0]
    keys = [new_session_key() for _ in range(real + 1)]
    grant = fleet.grant(keys, [node])
    signed = fleet.sign(grant)
    status, _ = await fleet.request(fleet.validator_key, node.remote, "POST", "/v1/jobs", signed)
    assert status == 200
    jobs = [
        PeerJob(make_http_session(), fleet.validator, key, signed, grant, rank)
        for rank, key in enumerate(keys[:real])
    ]
    fleet.jobs += jobs
    await asyncio.gather(*(job.connect() for job in jobs))
    return jobs, await RawStream.open(node, grant.job, keys[-1])
