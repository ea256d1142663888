"""The socket that a neuron listens on. Knows addresses and what keeps one from listening; knows
nothing of HTTP."""

from __future__ import annotations

import errno
import socket

from mapreduce.errors import LocalError, PortInUse

BACKLOG = 128


def listen(ip: str, port: int) -> socket.socket:
    """A socket that listens on `ip:port`; "::" takes IPv4 as well. Port 0 is any free one.

    Raises PortInUse, or LocalError for an address that is not this machine's or not allowed.
    """
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        return socket.create_server(
            (ip, port), family=family, backlog=BACKLOG, dualstack_ipv6=ip == "::"
        )
    except (OSError, ValueError) as error:  # ValueError: "::" where IPv4 cannot come with it
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise PortInUse(ip, port) from None
        reason = getattr(error, "strerror", None) or error
        raise LocalError(
            f"cannot listen on {ip}:{port}: {reason}; check --axon.ip and --axon.port"
        ) from None
