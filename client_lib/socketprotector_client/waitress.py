"""waitress on a Listener, with an end for idle clients in a drain.

waitress has no graceful stop.  It closes idle keep-alive connections after `channel_timeout`
(120 s), so a draining worker would live that long.  This module shortens that time when the drain
begins, but not for a client that is sending the body of a request or reading an answer.

Source: docs.pylonsproject.org/projects/waitress, "Arguments to waitress.serve".
"""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple

from waitress import create_server, wasyncore

from . import system
from .listener import Listener
from .process import on_drain
from .wait_set import LONGEST_WAIT_S
from .worker import current

if TYPE_CHECKING:
    from .address import ListenAddress

# Not 0: a client that has just connected, or read an answer, has this long to send its next
# request.  waitress checks once a second.
_IDLE_S = 1


def serve(
    app: Any,
    address: Optional[ListenAddress] = None,
    *,
    limit: Optional[int] = None,
    **options: Any,
) -> None:
    """Serve a WSGI application; return when drained.  Requests under way finish first.

    `address`, `limit` and errors are those of Listener.
    options: any option of waitress.serve(), except its listen addresses.
    """
    # take=None: waitress accepts once for each wake-up.
    serve_on(Listener(address, limit=limit, take=None), app, **options)


def serve_on(listener: Listener, app: Any, **options: Any) -> None:
    """Serve on an existing Listener; takes ownership of it."""
    listener._outlives_term = True  # the application's handler would cut off requests
    server = create_server(app, sockets=[listener], **options)
    _take_all_families(server)

    def drain() -> None:
        spread = current().spread
        if spread is None:
            end_idle()
            return
        intake = listener._opened()

        def end_last() -> None:
            spread.wait(lambda: len(intake.open) > 0)
            end_idle()

        system.start_thread(end_last, ())  # other callbacks must not wait

    def end_silent(now: float) -> None:
        for each in server.active_channels.values():
            # A client that pauses while it sends the body of its request is not idle, and neither
            # is one that pauses while it reads an answer.
            in_body = each.request is not None and each.request.headers_finished
            is_busy = in_body or each.total_outbufs_len > 0
            patience_s = server.adj.channel_timeout if is_busy else _IDLE_S
            if not each.requests and each.last_activity < now - patience_s:
                each.will_close = True

    def end_idle() -> None:
        server.maintenance = end_silent
        server.adj.cleanup_interval = _IDLE_S
        server.next_channel_cleanup = 0
        server.pull_trigger()

    on_drain(drain)
    server.asyncore = _Loop(listener)
    server.run()


def _take_all_families(server: Any) -> None:
    """Let a server take TCP and UNIX clients; waitress makes it for the first listener's family."""

    def set_options(connection: socket.socket) -> None:
        if connection.family != socket.AF_UNIX:
            for option in server.adj.socket_options:
                connection.setsockopt(*option)

    server.set_socket_options = set_options
    server.fix_addr = lambda peer: peer if isinstance(peer, tuple) else ("localhost", None)


class _Loop:
    """waitress's loop, where a connection wakes one idle worker, not all: see shared_epoll.py."""

    def __init__(self, listener: Listener) -> None:
        self._intake = listener._opened()
        self._epoll = select.epoll()  # of all descriptors but the listener
        self._watched: Dict[int, Tuple[Any, int]] = {}
        self._intake.sleep_beside(self._epoll.fileno())
        # At connection_limit waitress does not accept, and so does not look at the intake.
        self._watchdog = self._intake.watchdog
        if self._watchdog is not None:
            self._epoll.register(self._watchdog.fileno(), select.EPOLLIN)

    def loop(self, timeout: float, map: Dict[int, Any], use_poll: bool = False) -> None:
        """Serve the dispatchers in `map` (by descriptor) until it is empty."""
        while map:
            accepting = self._watch(map)
            if accepting is not None:
                ours, others = self._intake.sleep(timeout)
                found = self._epoll.poll(0) if others else []
            else:
                ours, found = False, self._epoll.poll(min(timeout, LONGEST_WAIT_S))
            for fd, flags in found:
                if self._watchdog is not None and fd == self._watchdog.fileno():
                    self._watchdog.answer()
                elif fd in map:
                    wasyncore.readwrite(map[fd], flags)
            if ours:
                wasyncore.read(accepting)

    def _watch(self, map: Dict[int, Any]) -> Any:
        """Update the epoll; return the listener's dispatcher if it wants to accept."""
        wanted, accepting = {}, None
        for fd, each in list(map.items()):
            flags = select.EPOLLIN | select.EPOLLPRI if each.readable() else 0
            if each.accepting:
                accepting = each if flags else None
                continue
            flags |= select.EPOLLOUT if each.writable() else 0
            if flags:
                wanted[fd] = each, flags
        for fd in self._watched.keys() - wanted.keys():
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # the descriptor was closed
        for fd, (each, flags) in wanted.items():
            if self._watched.get(fd) != (each, flags):
                try:
                    self._epoll.register(fd, flags)
                except FileExistsError:
                    self._epoll.modify(fd, flags)
        self._watched = wanted
        return accepting
