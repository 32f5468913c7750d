"""Sends connections to the route, and handles failed sends.

A full queue, a broken channel, or a shortage of descriptors or memory (shortage.py) blocks sending.
If a send fails, undelivered.py keeps the client's connection.  Once sending is possible again, we
send the kept connection first.  But a probe whose send fails is dropped.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ....model.lazy_dataclass import mutable
from ....system.channel import BROKEN
from ....system.loop import WRITE, Loop
from . import probe_sender
from .generation_channel import GenerationChannel
from .queue_watch import QueueWatch
from .shortage import Shortage
from .undelivered import Undelivered


@mutable
class Outlet:
    """The sending side of the route's channel, free or blocked."""

    loop: Loop
    undelivered: Undelivered
    queue_watch: QueueWatch  # watches the route's queue
    shortage: Shortage
    #: Called when a send has failed, to stop accepting.
    stop: Callable[[], None]
    #: Called when a full channel has room again.
    resume: Callable[[], None]
    #: Called when a worker has shut down the route's channel.
    broken: Callable[[], None]
    route: GenerationChannel | None = None
    lost: int = 0  # how many connections were lost while we took them back from a queue
    _full: GenerationChannel | None = None  # the full channel, watched for room

    def lead_to(self, channel: GenerationChannel | None) -> None:
        """Send to this channel from now on; None: send nothing."""
        self.route = channel
        self.queue_watch.follow(channel)
        self._unwatch_full()

    @property
    def is_free(self) -> bool:
        """Return whether a new connection can be sent now.

        Kept connections go first: return False while a kept connection waits for this route.
        """
        return (
            self.route is not None
            and self._full is None
            and not self.shortage.lasts
            and not self.undelivered.has(self.route.knows_of)
        )

    def resume_if_room(self) -> None:
        """Resume if the full channel has room again.

        Called during long work that blocks the loop: a blocked loop cannot call _on_room().
        """
        if self._full is not None and self._full.has_room():
            self._on_room()

    def send_kept(self) -> None:
        """Send the kept connections whose listener the route knows."""
        route = self.route
        while route is not None and self.route is route and not self.shortage.lasts:
            if self._full is not None:
                return
            if not self.undelivered.has(route.knows_of):
                return
            taken = self.undelivered.take(route.knows_of)
            if taken is None:
                # take() could not write the state; daemon/checkpoint.py has logged why.
                self.shortage.pause()
            else:
                self.send(route, *taken)

    def send(self, route: GenerationChannel, header: bytes, fd: int) -> None:
        """Send one connection; if that fails, see send_failed().  Takes ownership of fd."""
        try:
            route.send(header, fd)
        except OSError as error:
            self.send_failed(header, fd, error)
        else:
            self.queue_watch.add_uncounted()
            self.let_go(fd)

    def send_again(self, route: GenerationChannel) -> None:
        """Take all queued connections back, and send them again in the same order.

        Called if workers leave the queue's oldest connection untaken: a send wakes a worker
        (queue_watch.py).
        """
        for _ in range(route.depth()):
            taken = self.shortage.take_back(route) if self.is_free else None
            if taken is None:
                return
            self.queue_watch.subtract_counted()
            header, fd = taken
            if fd < 0:
                self.lost += not probe_sender.is_probe(header)
            else:
                self.send(route, header, fd)

    def send_failed(self, header: bytes, fd: int, error: OSError) -> None:
        """Keep a client's connection or drop a probe after a failed send; takes ownership of fd."""
        if probe_sender.is_probe(header):
            self.let_go(fd)  # a kept probe could reach another generation
        else:
            self.undelivered.keep_first(header, fd)
        self.stop()
        if error.errno == errno.EAGAIN and self.route is not None:
            self._await_room(self.route)
        elif error.errno in BROKEN:
            self.route = None
            self.broken()
        else:
            self.shortage.begin("sendmsg", error)

    def let_go(self, fd: int) -> None:
        """Close our copy of a connection; reopen the reserve descriptor if it was spent.

        shortage.py explains the reserve.
        """
        os.close(fd)
        self.shortage.open_reserve()

    def _await_room(self, channel: GenerationChannel) -> None:
        try:
            self.loop.watch(channel.write.fileno(), self._on_room, WRITE)
        except OSError as error:
            self.shortage.begin("epoll_ctl", error)
        else:
            self._full = channel

    def _on_room(self) -> None:
        self._unwatch_full()
        self.resume()

    def _unwatch_full(self) -> None:
        if self._full is not None:
            self.loop.unwatch(self._full.write.fileno())
            self._full = None
