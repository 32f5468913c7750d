"""A server that silent clients cannot exhaust: a limited number of connections, a thread for each.

A client that sends nothing, or a byte now and then, delays no other client.  If all places are
taken, a new client gets the place of the client that has sent no request for the longest time.
A new client is refused only while the server is answering in every place.

Source: socketserver.
"""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress
from socketserver import BaseRequestHandler, TCPServer, ThreadingMixIn
from typing import Any

#: The limit of each wait for a client.
CONNECTION_S = 10.0
CONNECTIONS = 64


class BoundedServer(ThreadingMixIn, TCPServer):
    """A TCP server with a thread for each connection, and CONNECTIONS places."""

    allow_reuse_address = True
    daemon_threads = True
    # socketserver's default of 5 is too small: HAProxy checks all its servers at once, and its
    # checks time out before the kernel tries to connect again, after a second.
    request_queue_size = CONNECTIONS

    def __init__(self, address: tuple[Any, ...], handler: type[BaseRequestHandler]) -> None:
        """Bind and listen.  Raises OSError."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        # Connections without a request, the oldest first.  While _alone is held, they stay open.
        self._waited_for: dict[Any, None] = {}
        self._alone = threading.Lock()
        super().__init__(address, handler)

    @property
    def where(self) -> str:
        """The bound address, as HOST:PORT, with the interface of a link-local address."""
        address: Any = self.server_address
        host, port = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def begin_answer(self, request: Any) -> None:
        """Record that a request is complete and its answer begins.

        Raises OSError if the connection was closed for another client.
        """
        with self._alone:
            if request not in self._waited_for:
                raise ConnectionAbortedError
            del self._waited_for[request]
            request.settimeout(CONNECTION_S)

    def await_client(self, request: Any) -> None:
        """Record that an answer is made, and the server waits for the client again."""
        with self._alone:
            self._waited_for[request] = None

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection.  Raises OSError."""
        request, address = super().get_request()
        request.settimeout(CONNECTION_S)
        return request, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether the connection got a place, perhaps by closing another connection."""
        if not self._free.acquire(blocking=False) and not self._takes_a_place():
            return False
        self.await_client(request)
        return True

    def _takes_a_place(self) -> bool:
        with self._alone:
            oldest = next(iter(self._waited_for), None)
            if oldest is None:
                return False
            del self._waited_for[oldest]
            with suppress(OSError):  # the client has disconnected
                # Not SSLSocket.shutdown(), which drops the session while another thread uses it.
                socket.socket.shutdown(oldest, socket.SHUT_RDWR)
        return self._free.acquire(timeout=CONNECTION_S)  # the thread of `oldest` ends at once

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own."""
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self.shutdown_request(request)
            self._free.release()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def shutdown_request(self, request: Any) -> None:
        """End one connection."""
        with self._alone:
            self._waited_for.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that are gone or too slow; show a bug of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)
