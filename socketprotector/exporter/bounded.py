"""A server that no client can exhaust: a thread for each connection, and a limit of both.

A client that connects and sends nothing delays no other: each connection has a thread, a limit of
time, and is one of a limited number; one too many is closed at once.  That time is for each wait of
its thread, so there is one for the whole, too: a byte now and then would keep a place for ever.

Source: socketserver.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import suppress
from socketserver import BaseRequestHandler, TCPServer, ThreadingMixIn
from typing import Any

#: For a handshake, for a request, and for each answer.
CONNECTION_S = 10.0
#: For all of them.
LONGEST_S = 30.0
CONNECTIONS = 64


class BoundedServer(ThreadingMixIn, TCPServer):
    """Listens; a thread for each connection."""

    allow_reuse_address = True
    daemon_threads = True
    # socketserver's own 5 are soon full: HAProxy checks all its servers at the same moment, and a
    # connection that finds no place is made a second later, when the check has been given up.
    request_queue_size = CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[BaseRequestHandler]) -> None:
        """Bind and listen.  Raises OSError."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._until: dict[socket.socket, float] = {}
        super().__init__(address, handler)

    @property
    def where(self) -> str:
        """The address that it has got, as HOST:PORT."""
        host, port = self.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def handshake(self, request: Any) -> Any:
        """Return what to talk to a client over.  Raises OSError."""
        return request

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take it unless too many are there."""
        return self._free.acquire(blocking=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give it a thread of its own."""
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection; the handshake, too, is this thread's."""
        try:
            request.settimeout(CONNECTION_S)
            with request.dup() as same:  # with TLS the request is another object from there on
                self._until[same] = time.monotonic() + LONGEST_S
                try:
                    super().process_request_thread(self.handshake(request), client_address)
                finally:
                    del self._until[same]
        except OSError:  # no TLS, or no descriptor
            request.close()
        finally:
            self._free.release()

    def service_actions(self) -> None:
        """Cut off those that have had their time; called twice a second."""
        for each, until in self._until.copy().items():
            if time.monotonic() >= until:
                with suppress(OSError):  # it has gone away meanwhile
                    each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore that a client has gone away, or was too slow; show what is a fault of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)
