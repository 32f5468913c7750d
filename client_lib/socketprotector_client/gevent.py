"""Connections for gevent's servers, with gevent's patching and without.

The drop-in Listener is a socket, which gevent's servers ask for its descriptors below Python, and
which waits in a way that would hold up all greenlets.

    WSGIServer(Listener(4321), app, handler_class=WSGIHandler).serve_forever()

Rule: nothing here waits but greenlets of its own.

Source: gevent.org, "gevent.baseserver" and "gevent.pywsgi"; a server needs `fileno`, and `_accept`
as sockets have it.
"""

from __future__ import annotations

import errno
import os
import socket
import weakref
from typing import Any, Optional, Tuple

import gevent
from gevent import pywsgi
from gevent.socket import socket as gevent_socket
from gevent.socket import wait_read

from .address import ListenAddress
from .connection import Connection
from .errors import Drained
from .intake import Intake
from .leaving import Leave
from .process import draining
from .worker import current

# Who has just read an answer gets the next request through in this time.
_IDLE_S = 1.0


class Listener:
    """What gevent's StreamServer and WSGIServer take for a listening socket."""

    #: A server asks for it where a socket would have one.
    timeout = 0.0
    #: A server makes its sockets with these: -1, ask the kernel, for listeners may differ.
    family = type = proto = -1

    def __init__(
        self, address: Optional[ListenAddress] = None, *, limit: Optional[int] = None
    ) -> None:
        """Bind `address` where there is no protector.

        `address`, `limit` and errors are those of `connections`.  Says READY=1 once somebody
        waits for connections.
        """
        self._intake: Intake = current().open_intake(address, limit)
        self._took = False
        self._leaving = False
        #: Handlers that wait for the next request of a client that they have answered.
        self.idle: weakref.WeakSet[WSGIHandler] = weakref.WeakSet()

    def fileno(self) -> int:
        current().ready()
        return self._intake.fileno()

    def getsockname(self) -> Any:
        """Return the address of the first listener."""
        return self._intake.source.sockname

    def accept(self) -> Tuple[gevent_socket, Any]:
        """Return (socket, client's address).  Never waits: BlockingIOError if there is none."""
        connection = self._take()
        return gevent_socket(fileno=connection.detach()), connection.peer

    def close(self) -> None:
        """Accept no more."""
        self._intake.close()

    def _accept(self) -> Tuple[int, Any]:
        connection = self._take()
        return connection.detach(), connection.peer

    def _take(self) -> Connection:
        # Servers accept until it fails, and would take the whole queue before they serve.
        connection = None
        if not self._took and not self._leaving:
            try:
                connection = self._intake.get(0)
            except Drained:
                self._leaving = True
                gevent.spawn(self._leave)
        self._took = connection is not None
        if connection is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return connection

    def _leave(self) -> None:
        leave = Leave(self._intake)
        for handler in list(self.idle):
            handler.end_idle()
        while True:
            leave.proceed(0)  # raises SystemExit after the last client
            wait_read(self._intake.fileno())


class WSGIHandler(pywsgi.WSGIHandler):  # type: ignore[misc]
    """gevent's, that answers `Connection: close` and ends idle connections in a drain."""

    close_connection: bool
    _answered = False

    def read_requestline(self) -> str:
        if not self._answered:
            return self._read()
        listener = getattr(self.server, "socket", None)
        if isinstance(listener, Listener):
            listener.idle.add(self)
        try:
            if not draining():
                return self._read()
            with gevent.Timeout(_IDLE_S, False):
                return self._read()
            return ""
        finally:
            if isinstance(listener, Listener):
                listener.idle.discard(self)

    def finalize_headers(self) -> None:
        self._answered = True
        if draining() and not self.close_connection:
            self.response_headers.append((b"Connection", b"close"))
            self.close_connection = True
        super().finalize_headers()

    def end_idle(self) -> None:
        """Let the greenlet that waits for a request read the end of the file."""
        try:
            self.socket.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # its client was quicker

    def _read(self) -> str:
        line: str = super().read_requestline()
        return line
