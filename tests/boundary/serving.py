"""A server in a thread, for tests of requests and answers."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from tests.running import DEADLINE_S

Serve = Callable[[socket.socket], object]


@contextmanager
def serving(serve: Serve, tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, int]]:
    """Serve one connection after the other on a free port; with tls, after the handshake.

    Connections that `serve` leaves open are closed at the end.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as kept:

        def run() -> None:
            with suppress(OSError):
                while True:
                    one, _ = listening.accept()
                    kept.callback(one.close)
                    with suppress(OSError):
                        if tls is not None:
                            one = kept.enter_context(tls.wrap_socket(one, server_side=True))
                        one.settimeout(DEADLINE_S)
                        serve(one)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listening.getsockname()
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def reset(one: socket.socket) -> None:
    """Close a connection so that its other end sees a reset."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    os.close(one.detach())
