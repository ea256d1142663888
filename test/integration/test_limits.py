"""A limited link as its process: bytes through real sockets. How long they take is not asserted."""

from __future__ import annotations

import hashlib
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from mapreduce.local_checkout import open_link
from mapreduce.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IP = "127.0.0.1"
NBYTES = 2_000_000
DATA = hashlib.shake_128(b"link").digest(NBYTES)


def read_all(connection: socket.socket) -> bytes:
    received = bytearray()
    while data := connection.recv(1 << 16):
        received += data
    return bytes(received)


def echo(listener: socket.socket) -> None:
    """Sends each connection what it sends, to the last byte."""

    def serve(connection: socket.socket) -> None:
        with connection:
            for _ in range(NBYTES // 20_000):
                received = bytearray()
                while len(received) < 20_000:
                    received += connection.recv(20_000 - len(received))
                connection.sendall(received)

    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


@pytest.fixture
def link(tmp_path: Path) -> Iterator[int]:
    """The port of a link of 200 Mbit/s to a server that answers with what it gets."""
    with socket.create_server((IP, 0)) as listener:
        threading.Thread(target=echo, args=(listener,), daemon=True).start()
        port = listener.getsockname()[1]
        process, published = open_link("link", (), IP, port, 200e6, tmp_path / "link.log")
        with process:
            yield published
        listener.shutdown(socket.SHUT_RDWR)


def test_every_byte_arrives_once_and_in_order_on_all_connections(link: int) -> None:
    connections = [socket.create_connection((IP, link), timeout=30) for _ in range(3)]
    senders = [threading.Thread(target=c.sendall, args=(DATA,)) for c in connections]
    for sender in senders:
        sender.start()
    for connection, sender in zip(connections, senders, strict=True):
        with connection:
            assert read_all(connection) == DATA
        sender.join()


def test_a_connection_that_one_side_closes_is_closed_on_both(link: int) -> None:
    with socket.create_connection((IP, link), timeout=30) as connection:
        connection.sendall(DATA[:20_000])
        assert connection.makefile("rb").read(20_000) == DATA[:20_000]
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_a_link_whose_neuron_is_gone_lives_on_and_refuses(tmp_path: Path) -> None:
    process, port = open_link("link", (), IP, free_port(), 1e6, tmp_path / "link.log")
    with process:
        for _ in range(2):
            with socket.create_connection((IP, port), timeout=30) as connection:
                assert connection.recv(1) == b""
        process.check_alive()
