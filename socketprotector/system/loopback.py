"""TCP connections over 127.0.0.1: between two sockets of ours, or from a process of a known user.

Any local user can connect to a port of 127.0.0.1, so its listener must know who has connected.

Source: tcp(7), accept(2).
"""

from __future__ import annotations

import socket
from contextlib import suppress

from .cleanup import on_error

_HOST = "127.0.0.1"
#: How many waiting connections of other processes pair() closes.
_OTHERS = 64
#: As long as the system allows (net.core.somaxconn).
_BACKLOG = 4096


def listen() -> socket.socket:
    """Return a non-blocking socket that listens on a free port.  Raises OSError."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with on_error(listening.close):
        listening.bind((_HOST, 0))
        listening.listen(_BACKLOG)
    return listening


def pair() -> tuple[socket.socket, socket.socket | None]:
    """Return the non-blocking client and the server end of a connection.  Raises OSError.

    The port is closed again, and connections of other processes to it are closed.  The server end
    is None if other processes, or a busy kernel, delay the connection: then try again.
    """
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with on_error(client.close), listen() as listening:
        client.connect_ex(listening.getsockname())  # usually established at once
        with suppress(BlockingIOError):
            for _ in range(_OTHERS):
                server, name = listening.accept()
                if name == client.getsockname():
                    return client, server
                server.close()
    return client, None
