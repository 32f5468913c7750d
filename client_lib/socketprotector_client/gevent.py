"""Connections for gevent's servers, with gevent's patching and without.

The drop-in Listener is a socket, which gevent's servers ask for its descriptors below Python, and
which waits in a way that would hold up all greenlets.

    WSGIServer(Listener(4321), app, handler_class=WSGIHandler).serve_forever()

Rule: nothing here waits but greenlets of its own.

Source: gevent.org, "gevent.baseserver" and "gevent.pywsgi"; a server needs `fileno`, and `_accept`
as sockets have it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import select
import socket
import weakref
from typing import Any, Callable, Iterable, Optional, Tuple

import gevent
from gevent import pywsgi
from gevent.socket import socket as gevent_socket
from gevent.socket import wait_read

from .address import ListenAddress
from .connection import Connection
from .errors import Drained
from .exit_after_drain import Leave
from .intake import Intake
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
        self._place: Optional[_Place] = None
        self._rung = False
        #: Handlers that wait for the next request of a client that they have answered.
        self.idle: weakref.WeakSet[WSGIHandler] = weakref.WeakSet()

    def fileno(self) -> int:
        current().ready()
        if self._place is not None:
            self._place.wait()  # a server begins anew
        elif self._intake.may_join:
            self._place = _Place(self._intake, self._ring)
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

    def _ring(self) -> None:
        self._rung = True
        self._intake.ring()

    def _take(self) -> Connection:
        # Servers accept until it fails, and would take the whole queue before they serve.
        connection = None
        if self._rung and not self._leaving:
            self._rung = False
            self._intake.hush()
        if not self._took and not self._leaving:
            try:
                connection = self._intake.get(0)
            except Drained:
                self._leaving = True
                gevent.spawn(self._leave)
        self._took = connection is not None
        if connection is None:
            if self._place is not None:
                self._place.wait()
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return connection

    def _leave(self) -> None:
        leave = Leave(self._intake)
        for handler in list(self.idle):
            handler.end_idle()
        while True:
            leave.proceed(0)  # raises SystemExit after the last client
            wait_read(self._intake.fileno())


class _Event(ctypes.Structure):
    # Source: epoll_ctl(2); the kernel's EPOLL_PACKED.
    if platform.machine() == "x86_64":
        _pack_ = 1
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


class _Place:
    """The queue in the epoll of gevent's loop itself, so that one idle worker is woken, not all.

    libev waits in C, so nothing can be put beside its epoll (shared_epoll.py).  It is told of the
    queue in its own way, and then the flag is added: by epoll_ctl with the data that libev has
    given, which /proc tells, for by that it knows its own.  Where any of this is otherwise nothing
    is changed, and all are woken.

    Source: ev_epoll.c of libev; proc(5), /proc/PID/fdinfo.
    """

    def __init__(self, intake: Intake, ready: Callable[[], None]) -> None:
        """ready: called for each wake-up; then nothing is waited for until `wait`."""
        self._intake = intake
        (self._fd,) = intake.source.fds
        self._ready = ready
        self._data = -1
        self._wanted = False
        self._loop = gevent.get_hub().loop
        self._watcher = self._loop.io(self._fd, 1, ref=False)
        self._watcher.start(self._is_ready)
        gevent.spawn_later(0, self._join)  # by then libev has told the kernel

    def add(self, fds: Iterable[int], events: int) -> None:
        self._wanted = True
        self._control(_ADD, events)

    def remove(self, fds: Iterable[int]) -> None:
        self._wanted = False
        try:
            self._control(_DEL)
        except OSError:
            pass  # the loop is over

    def wait(self) -> None:
        """Wait again, last of all workers."""
        if self._wanted:
            try:
                self._control(_ADD, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            except OSError:  # out of memory
                self._intake.leave_loop()

    def close(self) -> None:
        self.remove(())
        self._stop()

    def forget(self) -> None:
        self._wanted = False
        self._stop()

    def _join(self) -> None:
        self._data = _data_of(self._loop, self._fd)
        if self._data >= 0 and self._intake.may_join:
            self._control(_DEL)
            self._intake.join(self)
        else:
            self._stop()

    def _is_ready(self) -> None:
        if self._wanted:
            # Whether the server takes it or is full: meanwhile it is the others'.
            self._control(_DEL)
            self._ready()

    def _stop(self) -> None:
        self._watcher.stop()
        self._watcher.close()

    def _control(self, operation: int, events: int = 0) -> None:
        event = _Event(events, self._data)
        failed = _libc.epoll_ctl(self._loop.fileno(), operation, self._fd, ctypes.byref(event))
        error = ctypes.get_errno() if failed else 0
        if error not in (0, errno.EEXIST, errno.ENOENT):
            raise OSError(error, os.strerror(error))


_libc = ctypes.CDLL(None, use_errno=True)
_ADD, _DEL = 1, 2


def _data_of(loop: Any, fd: int) -> int:
    """Return by what libev knows a descriptor that it waits for; -1 where that is not to be had."""
    try:
        if loop.backend != "epoll":
            return -1
        with open(f"/proc/self/fdinfo/{loop.fileno()}") as file:
            told = re.findall(rf"^tfd:\s*{fd} .*\bdata:\s*([0-9a-f]+)", file.read(), re.MULTILINE)
        return int(told[0], 16)
    except (AttributeError, IndexError, OSError):
        return -1


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
