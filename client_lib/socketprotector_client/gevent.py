"""Connections for gevent's servers, with gevent's patching and without.

The library's drop-in Listener does not fit: gevent's servers accept from its descriptor below
Python, and its waits would block all greenlets.

    WSGIServer(Listener(4321), app, handler_class=WSGIHandler).serve_forever()

Rule: only greenlets of this module wait here.

Source: gevent.org, "gevent.baseserver" and "gevent.pywsgi"; a server needs `fileno`, and `_accept`
as on sockets.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import select
import socket
import struct
import weakref
from typing import TYPE_CHECKING, Any, Callable, Iterable, Optional, Tuple

import gevent
from gevent import pywsgi
from gevent.socket import socket as gevent_socket
from gevent.socket import wait_read

from .errors import Drained
from .exit_after_drain import DrainExit
from .intake import Intake
from .process import draining
from .wait_set import WaitSet
from .worker import current

if TYPE_CHECKING:
    from .address import ListenAddress

# A client that has just read an answer has this long to send its next request.
_IDLE_S = 1.0


class Listener:
    """A listening socket for gevent's StreamServer and WSGIServer."""

    #: Servers read this attribute of their socket.
    timeout = 0.0
    #: Servers make client sockets with these.  -1: query the kernel, because listeners may differ.
    family = type = proto = -1

    def __init__(
        self, address: Optional[ListenAddress] = None, *, limit: Optional[int] = None
    ) -> None:
        """Take connections from the protector; without one, bind `address`.

        `address`, `limit` and errors are those of `connections`.  Sends READY=1 once a server
        waits for connections.
        """
        self._intake: Intake = current().open_intake(address, limit)
        self._took = False
        self._leaving = self._has_let_go = False
        self._queue: Optional[_Queue] = None
        self._rung = False
        self._aside: Optional[WaitSet] = None
        #: Handlers that have answered their client and wait for its next request.
        self.idle: weakref.WeakSet[WSGIHandler] = weakref.WeakSet()

    def fileno(self) -> int:
        current().ready()
        if self._aside is None:
            self._look_aside()
        if self._queue is not None:
            self._queue.wait_again()  # a server starts again
        elif self._intake.queue.may_join:
            self._queue = _Queue(self._intake, self._ring)
        return self._intake.fileno()

    def getsockname(self) -> Any:
        """Return the address of the first listener."""
        return self._intake.source.sockname

    def accept(self) -> Tuple[gevent_socket, Any]:
        """Return (socket, client's address).  Raises BlockingIOError if no client waits."""
        fd, peer = self._accept()
        return gevent_socket(fileno=fd), peer

    def close(self) -> None:
        """Stop accepting."""
        if self._intake.on_renewal is not None:
            self._intake.on_renewal()  # otherwise the loop keeps this object, and an epoll
        self._intake.close()

    def _look_aside(self) -> None:
        """Notice the drain and the watchdog, also while the server's pool is full.

        A server with a full pool does not accept.  Once idle clients have ended, it accepts again.
        """
        ends, watchdog = current().drain.fds, self._intake.watchdog
        self._aside = aside = WaitSet()
        aside.add(ends, select.EPOLLRDHUP)
        if watchdog is not None:
            aside.add([watchdog.fileno()])
        watcher = gevent.get_hub().loop.io(aside.fileno(), 1, ref=False)

        def look() -> None:
            if watchdog is not None:
                watchdog.answer()
            if draining():
                aside.remove(ends)
                self._let_idle_go()

        def forget() -> None:  # in a forked child the descriptors are the parent's
            watcher.stop()
            aside.close()

        watcher.start(look)
        self._intake.on_renewal = forget

    def _let_idle_go(self) -> None:
        # Only once: later a client has a moment to send its next request.
        if not self._has_let_go:
            self._has_let_go = True
            for handler in list(self.idle):
                handler.end_idle()

    def _ring(self) -> None:
        self._rung = True
        self._intake.waits.ring()

    def _accept(self) -> Tuple[int, Any]:
        # Servers accept until an error, and would take the whole queue before they serve.
        connection = None
        if self._rung and not self._leaving:
            self._rung = False
            self._intake.waits.hush()
        if not self._took and not self._leaving:
            try:
                connection = self._intake.get_now()
            except Drained:
                self._leaving = True
                gevent.spawn(self._leave)
        self._took = connection is not None
        if connection is None:
            if self._queue is not None:
                self._queue.wait_again()
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return connection.detach(), connection.peer

    def _leave(self) -> None:
        end = DrainExit(self._intake)
        end.begin()
        self._let_idle_go()
        while True:
            end.wait(0)  # raises SystemExit after the last client
            wait_read(self._intake.fileno())


# struct epoll_event: events and data.  Source: epoll_ctl(2); the kernel's EPOLL_PACKED.
_EVENT = struct.Struct("=IQ" if platform.machine() == "x86_64" else "@IQ")


class _Queue(WaitSet):
    """The queue in the epoll of gevent's loop itself, so that the kernel wakes one idle worker.

    libev waits in C, so its epoll cannot be replaced as in shared_epoll.py.  libev first registers
    the queue without the flag.  Then we register it again with EPOLLEXCLUSIVE, and with the data by
    which libev knows the descriptor; /proc shows that data.  If a step fails, nothing is changed,
    and all idle workers wake.

    Source: ev_epoll.c of libev; proc(5), /proc/PID/fdinfo.
    """

    def __init__(self, intake: Intake, ready: Callable[[], None]) -> None:
        """Watch the intake's queue.

        ready: called for each wake-up.  Then the queue is not watched until wait_again() is called.
        """
        self._intake = intake
        (self._fd,) = intake.source.fds
        self._ready = ready
        self._data = -1
        self._wanted = False
        self._pid = os.getpid()
        loop = gevent.get_hub().loop
        super().__init__(of=loop.fileno() if getattr(loop, "backend", "") == "epoll" else -1)
        self._watcher = loop.io(self._fd, 1, ref=False)
        self._watcher.start(self._is_ready)
        gevent.spawn_later(0, self._join)  # by then libev has registered the queue

    def add(self, fds: Iterable[int], events: int = select.EPOLLIN) -> None:
        self._wanted = True
        event = _EVENT.pack(events, self._data)
        if _libc.epoll_ctl(self.fileno(), _EPOLL_CTL_ADD, self._fd, event):
            error = ctypes.get_errno()
            if error != errno.EEXIST:
                raise OSError(error, os.strerror(error))

    def remove(self, fds: Iterable[int]) -> None:
        self._wanted = False
        super().remove(fds)

    def wait_again(self) -> None:
        """Watch the queue again, behind all other workers."""
        if self._wanted:
            try:
                self.add((self._fd,), select.EPOLLIN | select.EPOLLEXCLUSIVE)
            except OSError:  # out of memory
                self._intake.queue.leave_loop()

    def close(self) -> None:
        self.remove((self._fd,))
        self.forget()

    def forget(self) -> None:
        self._wanted = False
        self._watcher.stop()
        self._watcher.close()
        super().forget()

    def _join(self) -> None:
        if os.getpid() != self._pid:  # a forked child's loop has its own epoll
            self.forget()
            return
        try:
            with open(f"/proc/self/fdinfo/{self.fileno()}") as file:
                watched = rf"^tfd:\s*{self._fd} .*\bdata:\s*([0-9a-f]+)"
                found = re.findall(watched, file.read(), re.MULTILINE)
        except OSError:
            found = []
        if found and self._intake.queue.may_join:
            self._data = int(found[0], 16)
            super().remove((self._fd,))
            self._intake.queue.join(self)
        else:
            self.forget()

    def _is_ready(self) -> None:
        if self._wanted:
            # Watch the queue again only after accept(): until then other workers may take from it.
            super().remove((self._fd,))
            self._ready()


_libc = ctypes.CDLL(None, use_errno=True)
_EPOLL_CTL_ADD = 1


class WSGIHandler(pywsgi.WSGIHandler):  # type: ignore[misc]
    """gevent's handler that, during a drain, sends `Connection: close` and ends idle clients."""

    close_connection: bool
    _answered = False

    def read_requestline(self) -> Any:
        if not self._answered:
            return super().read_requestline()
        listener = getattr(self.server, "socket", None)
        if isinstance(listener, Listener):
            listener.idle.add(self)
        try:
            if not draining():
                return super().read_requestline()
            with gevent.Timeout(_IDLE_S, False):
                return super().read_requestline()
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
        """Give end of file to the greenlet that waits for the next request."""
        try:
            self.socket.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # the client has disconnected
