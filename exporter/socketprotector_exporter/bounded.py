"""A server that no silent client can exhaust: a thread for each connection, so many at most.

A client that connects and sends nothing, or a byte now and then, delays no other one: once all
places are taken, the next client gets the place of the one that has been waited for the longest.
Only where an answer is being made in every place the next one is closed.

Source: socketserver.
"""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress
from socketserver import BaseRequestHandler, TCPServer, ThreadingMixIn
from typing import Any

#: For each wait for a client.
CONNECTION_S = 10.0
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
        # Those whose client is waited for, the oldest first.  Under the lock none is closed.
        self._waited_for: dict[Any, None] = {}
        self._alone = threading.Lock()
        super().__init__(address, handler)

    @property
    def where(self) -> str:
        """The address that it has got, as HOST:PORT."""
        host, port = self.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def asked(self, request: Any) -> None:
        """A client's request is whole: its answer is made now.  Raises OSError: it was cut off."""
        with self._alone:
            if request not in self._waited_for:
                raise ConnectionAbortedError
            del self._waited_for[request]
            request.settimeout(CONNECTION_S)

    def answers(self, request: Any) -> None:
        """The answer is made: for the rest it is the client that is waited for."""
        with self._alone:
            self._waited_for[request] = None

    def get_request(self) -> tuple[Any, Any]:
        """Accept.  Raises OSError."""
        request, address = super().get_request()
        request.settimeout(CONNECTION_S)
        return request, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take it, if need be in the place of the one that has been waited for the longest."""
        if not self._free.acquire(blocking=False) and not self._takes_a_place():
            return False
        self.answers(request)
        return True

    def _takes_a_place(self) -> bool:
        with self._alone:
            oldest = next(iter(self._waited_for), None)
            if oldest is None:
                return False
            del self._waited_for[oldest]
            with suppress(OSError):  # it has gone away meanwhile
                # Not its own method: that of TLS takes the session away from the thread there.
                socket.socket.shutdown(oldest, socket.SHUT_RDWR)
        return self._free.acquire(timeout=CONNECTION_S)  # its thread ends at once

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give it a thread of its own."""
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
        """Ignore that a client has gone away, or was too slow; show what is a fault of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)
