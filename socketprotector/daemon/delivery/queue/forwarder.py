"""Decides when to accept connections, and recovers connections that no worker has taken.

acceptor.py is the fast path.  This module handles failed accepts; outlet.py and canary.py handle
failed sends.  We choose no worker: each worker takes connections from its generation's queue.

We accept only connections that we can deliver.  If a send fails nevertheless, undelivered.py keeps
the connection, and we send it before all others.  drain() and release() say what becomes of the
connections in an ending generation's channel.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence

from ....core.events import BacklogEmptied
from ....model.lazy_dataclass import mutable
from ....model.records import ForwarderRecord
from ....system.channel import BROKEN
from ....system.inherited import Inherited
from ....system.listener import TRANSIENT_ERRNOS, Listener
from ...runtime import Runtime
from .. import LAST_S, QUIET_S
from . import canary, probe_sender
from .acceptor import Acceptor, Send
from .generation_channel import GenerationChannel
from .listener_drain import DrainingListeners
from .outlet import Outlet
from .queue_watch import QueueWatch
from .shortage import Shortage
from .undelivered import Undelivered, listener_of

ROUNDS = 16  # the most rounds in one accept_waiting()

_QUIET = "forwarder-quiet"


@mutable
class _Closing:
    """How close_listeners() was called, and the result of the last check for new clients."""

    stay: bool  # True: our own listeners (not passed in) stay open, and later clients wait there
    latest: float = 0.0  # when to close at the latest; 0: no limit, because new clients are refused
    forwarded: int = -1  # Forwarder.forwarded at the last check; -1: no check yet


class Forwarder:
    """Accepts connections and sends them to the route; keeps each connection until it is sent."""

    def __init__(
        self,
        runtime: Runtime,
        listeners: Sequence[Listener],
        *,
        broken: Callable[[], None],
        repair: Callable[[Listener], None],
        untaken: Callable[[float, int, bool], None] = lambda seconds, waiting, ever: None,
    ) -> None:
        """Take ownership of the listeners.

        broken: called when the route's channel was shut down.
        repair: repairs a listener that was shut down, or marks the listener lost.  Raises OSError
        if the system is short of descriptors or memory.
        untaken: called, at most once per channel, if the route's workers take no connection.  Its
        arguments: for how long, how many connections wait, whether some may have been taken before.
        """
        self._loop = loop = runtime.loop
        self._post = runtime.post
        self._listeners = list(listeners)
        self._repair = repair
        self._forwarded = 0  # connections accepted before an upgrade or a kill
        self._lost = 0
        self.undelivered = Undelivered(runtime.persist)
        self.queue_watch = QueueWatch(
            loop,
            accepted=self._accepted_for_route,
            send_again=lambda route: self.outlet.send_again(route),
            untaken=untaken,
            save=runtime.persist,
        )
        self._acceptor = Acceptor(
            loop,
            self.queue_watch,
            accept_failed=self._accept_failed,
            send_failed=self._send_failed,
        )
        #: Channels whose connections go to the route, in this order, once the route has room.  The
        #: value is True if the workers have exited; then we close the channel once it is empty.
        self._leftovers: dict[GenerationChannel, bool] = {}
        self._holding = False  # True during a hold: accept nothing
        self._ended_listeners: list[Listener] = []  # we no longer accept from these
        self._closing: _Closing | None = None
        stop = self._acceptor.end_all
        self._shortage = Shortage(runtime, stop=stop, retry=self._resume)
        self.outlet = Outlet(
            *(loop, self.undelivered, self.queue_watch, self._shortage),
            *(stop, self._resume, broken),
        )
        self._drains = DrainingListeners(runtime, self.undelivered, self._shortage)
        self._canary: canary.CanaryQueue | None = None  # None: there was no canary yet
        self._canary_count = 0  # the CanaryQueue.count before an upgrade or a kill

    # -- orders --------------------------------------------------------------

    def route_to(
        self,
        channel: GenerationChannel | None,
        sharing: GenerationChannel | None = None,
        share: int = 0,
    ) -> None:
        """Send new connections to this channel; None: leave them in the backlog.

        sharing, share: see Delivery.route_to().
        """
        if self._canary is None and sharing is not None:
            parts = (self._loop, self._post, self.outlet, self._resume)
            self._canary = canary.CanaryQueue(*parts, count=self._canary_count)
        if self._canary is not None:
            self._canary.lead_to(sharing, share)
        self.outlet.lead_to(channel)
        self._acceptor.end_all()
        self._resume()

    def hold(self, on: bool) -> None:
        """Begin a hold: new clients wait in the backlog.  If `on` is False, end the hold."""
        self._holding = on
        self._acceptor.end_all()
        self._resume()

    def drain(self, channel: GenerationChannel) -> None:
        """Move untaken connections to the route while it has room; then end the channel.

        The channel's workers take the remaining connections.  But if a worker has shut the channel
        down, perhaps no worker reads from it again.  Then the remaining connections also go to the
        route, once the route has room.
        """
        is_shut = channel.is_shut()
        self._reclaim(channel)
        if not is_shut and self._drains.end_channel_later(channel):
            return  # the channel still gets the backlog of a removed listener
        channel.end()
        if is_shut and channel.depth():
            self._leftovers.setdefault(channel, False)  # adopt_drained() may have added the channel

    def release(self, channel: GenerationChannel) -> None:
        """Send the untaken connections of exited workers to the route; then close the channel."""
        self._drains.close_draining(channel)
        channel.end()
        self._leftovers.pop(channel, None)
        if channel.depth():
            self._leftovers[channel] = True
            self._resume()
        else:
            channel.close()  # at once: _resume() closes channels only while there is a route

    def add(self, listener: Listener) -> None:
        """Take ownership of a new listener; generations that know the listener get its clients."""
        self._listeners.append(listener)
        self._resume()

    def remove(self, listener: Listener, to: GenerationChannel | None) -> None:
        """Refuse new clients of a listener, and send its backlog to `to`; None: lose that backlog.

        But if the socket was passed in, its owner keeps listening, and gets the backlog.
        """
        self._listeners.remove(listener)
        self._acceptor.end(listener)
        if to is None:
            self._drains.close(listener)
        else:
            self._drains.begin(listener, to)

    def close_listeners(self, *, quick: bool, stay: bool = False) -> None:
        """Refuse new clients, send the backlog to workers, and close; quick: close at once.

        stay: refuse no new client.  Listeners that were not passed in stay open, so later
        clients wait there for the next start; close() leaves these listeners to the fd store.
        """
        self._closing = _Closing(stay)
        if quick:
            self._close_listeners()
            return
        refused = not stay
        for listener in self._listeners:
            if listener.settings.foreign:
                # The socket was passed in: its owner keeps listening, and gets the backlog.
                self._accept_no_more(listener)
            elif not stay:
                refused = listener.refuse_new() and refused
        if not refused:
            self._closing.latest = time.monotonic() + LAST_S
        self._close_when_quiet(self._closing)

    def _accept_no_more(self, listener: Listener) -> None:
        self._ended_listeners.append(listener)
        self._acceptor.end(listener)

    @property
    def _accepting(self) -> list[Listener]:
        ended = self._ended_listeners
        return [each for each in self._listeners if each not in ended and not each.lost]

    def close(self) -> tuple[str, ...]:
        """Close everything; a connection counts as lost if no living worker can get it.

        Returns the names of the sockets that the fd store must keep for the next start.
        """
        self._close_listeners()
        surviving = tuple(filter(None, [each.leave(0) for each in self._listeners]))
        self._listeners.clear()
        self.route_to(None)
        self._lost += self.undelivered.drop(lambda _: True)
        for channel, is_released in self._leftovers.items():
            if is_released:
                self._lost += probe_sender.drop_all(channel)
                channel.close()
        self._shortage.close()
        return surviving

    @property
    def forwarded(self) -> int:
        """Return how many connections we accepted, including lost clients of removed listeners."""
        return self._forwarded + self._acceptor.accepted + self._drains.accepted

    @property
    def idle_s(self) -> float:
        """Return the time since the last client (see Delivery.idle_s); 0: a client waits."""
        if any(each.has_waiting() for each in self._listeners):
            return 0.0
        return (time.monotonic_ns() - self._acceptor.last_ns) / 1e9

    @property
    def lost(self) -> int:
        """Return how many accepted connections were lost before a worker took them."""
        return self._lost + self.outlet.lost + self._drains.lost

    def watch_of(self, channel: GenerationChannel) -> QueueWatch | None:
        """Return the QueueWatch of a channel; None: the channel gets no new connections."""
        if self._canary is not None and channel is self._canary.channel:
            return self._canary.watch
        return self.queue_watch if channel is self.outlet.route else None

    def met(self, channel: GenerationChannel) -> int:
        """Return how many new connections we accepted for a channel."""
        of_canary = self._canary.watch.new_in(channel) if self._canary is not None else 0
        return channel.met + self.queue_watch.new_in(channel) + of_canary

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return tuple(self._listeners)

    # -- for the next program, which replaces us after an upgrade or a kill ------------

    def record(self) -> ForwarderRecord:
        kept, count = self.undelivered, self._canary.count if self._canary else self._canary_count
        return ForwarderRecord(self.forwarded, self.lost, None, kept.number, kept.waiting, count)

    def adopt(self, record: ForwarderRecord, unclaimed: Inherited, *, closing: bool) -> None:
        """Adopt an earlier program's record (old versions set record.pending) and connections."""
        self._forwarded, self._lost = record.forwarded, record.lost
        self._canary_count, self._closing = record.shared, _Closing(False) if closing else None
        first = ((record.number, record.pending),) if record.pending is not None else ()
        self._lost += self.undelivered.adopt(record.number, (*first, *record.parked), unclaimed)

    def descriptors(self) -> dict[str, int]:
        listeners = (*self._listeners, *self._drains.listeners)
        found = {name: fd for each in listeners for name, fd in each.descriptors().items()}
        return found | self.undelivered.descriptors()

    def adopt_drained(self, channel: GenerationChannel) -> None:
        """Plan to send a draining channel's connections to the route, once the route has room."""
        if channel.depth():  # perhaps the earlier program did not move all connections
            self._leftovers[channel] = False

    # -- accepting and sending ------------------------------------------------------------

    def accept_waiting(self) -> None:
        """Accept the waiting clients; called repeatedly during long work that blocks the loop."""
        self.outlet.resume_if_room()
        for _ in range(ROUNDS):
            before = self.forwarded
            self._acceptor.accept_now(lambda: self.outlet.is_free)
            if self.forwarded == before:
                return

    def _resume(self) -> None:
        """Send kept connections, then the leftovers; then accept, unless a hold is in force."""
        if self._canary is not None:
            self._canary.send_kept()
        if self.outlet.route is not None:
            self.outlet.send_kept()
            while self._leftovers and self.outlet.is_free:
                channel, is_released = next(iter(self._leftovers.items()))
                self._reclaim(channel, exited=is_released)
                if self.outlet.is_free:
                    self._leftovers.pop(channel, None)
                    if is_released:
                        channel.close()
        if self.outlet.is_free and not self._holding:
            try:
                for each in self._accepting:
                    if send := self._sender(each.index):
                        self._acceptor.begin(each, send)
            except OSError as error:  # max_user_watches is reached, or no memory is left
                self._shortage.begin("epoll_ctl", error)

    def _sender(self, index: int) -> Send | None:
        """Return the function that sends a listener's connections; None: do not accept now."""
        send, route = self._canary and self._canary.sender(index), self.outlet.route
        return send or (route.write.sendmsg if route and route.knows_of(index) else None)

    def _accepted_for_route(self) -> int:
        return self._acceptor.accepted - (self._canary.accepted if self._canary else 0)

    def _reclaim(self, channel: GenerationChannel, *, exited: bool = False) -> None:
        """Move a channel's connections to the route, the oldest first, while the route has room.

        If the route does not know a connection's listener:
        * Before channel.end(), the connection goes back to its channel, behind all others there.
        * After channel.end(), while workers live, the connection stays in place.  So do all
          connections behind it.
        * Once the workers have exited (`exited`), undelivered.py keeps the connection.  But if the
          listener was closed, the connection is lost.
        """
        route = self.outlet.route
        has_unknown = route is not None and _may_have_unknown(channel, route)
        remaining = channel.depth() if has_unknown else -1  # -1: no limit, as nothing is put back
        while self.outlet.is_free and self.outlet.route not in (None, channel):
            if not remaining or (has_unknown and not exited and self._head_must_stay(channel)):
                return
            taken = self._shortage.take_back(channel)
            if taken is None:
                if self.outlet.is_free and channel.depth():
                    # recvmsg() has found nothing, but the channel is not empty: retry later.
                    self._shortage.begin("recvmsg", BlockingIOError(errno.EAGAIN, "try again"))
                return
            remaining -= 1
            header, fd = taken
            if fd < 0:  # the kernel has dropped the connection
                self._lost += not probe_sender.is_probe(header)
            elif probe_sender.is_probe(header):
                self.outlet.let_go(fd)  # a probe is only for this channel's generation
            elif has_unknown and route is not None and not route.knows_of(listener_of(header)):
                self._put_back(channel, header, fd)
            elif self.outlet.route is not None:
                self.outlet.send(self.outlet.route, header, fd)

    def _head_must_stay(self, channel: GenerationChannel) -> bool:
        """Return True if a channel has ended and its oldest connection cannot go to the route.

        Also returns True if this connection cannot be read for lack of memory.
        """
        try:
            header = channel.peek() if channel.write.fileno() < 0 else None
        except OSError as error:
            self._shortage.begin("recvmsg", error)
            return True
        route = self.outlet.route
        known = route is None or header is None or route.knows_of(listener_of(header))
        return not known

    def _put_back(self, channel: GenerationChannel, header: bytes, fd: int) -> None:
        """Requeue a connection; if that fails, keep it or lose it.  Takes ownership of fd."""
        try:
            channel.send(header, fd)
        except OSError as error:
            if channel.write.fileno() >= 0 and error.errno not in BROKEN:
                # A full channel, or a lack of memory: end the loop in _reclaim(), and retry later.
                self._shortage.begin("sendmsg", error)
            listeners = (*self._listeners, *self._drains.listeners)
            if listener_of(header) in {each.index for each in listeners}:
                self.undelivered.keep_last(header, fd)
                return
            self._lost += 1  # the listener is gone, so no generation can get this connection
        self.outlet.let_go(fd)

    # -- failures --------------------------------------------------------------

    def _accept_failed(self, listener: Listener, error: OSError) -> None:
        if error.errno in TRANSIENT_ERRNOS:
            if listener.always_readable:  # we shut the listener down for a stop; no client waits
                self._loop.unwatch(listener.fileno())
            elif listener.hangs_up:
                self._repair_shut(listener)
        elif error.errno == errno.EINVAL and not listener.is_alive():
            self._repair_shut(listener)
        else:
            # The system is short of descriptors or memory, or the error is undocumented.  In both
            # cases the listener stays readable.  So stop accepting, and try again after a pause.
            self._shortage.begin("accept", error)

    def _send_failed(self, header: bytes, fd: int, error: OSError) -> None:
        if self._canary is None or not self._canary.only_canary_knows(listener_of(header)):
            self.outlet.send_failed(header, fd, error)
            return
        self._canary.keep(header, fd)
        for each in self._listeners:
            if self._canary.only_canary_knows(each.index):
                self._acceptor.end(each)

    def _repair_shut(self, listener: Listener) -> None:
        """Repair a listener that another process has shut down."""
        self._acceptor.end(listener)
        if self._closing is None:  # otherwise our own stop may have shut it down
            try:
                self._repair(listener)
            except OSError as error:
                self._shortage.begin("socket", error)
            else:
                self._resume()

    # -- the end -------------------------------------------------------------

    def _close_when_quiet(self, closing: _Closing) -> None:
        """Close the listeners if no client came since the last check; otherwise check later."""
        if self.outlet.is_free and not any(self._leftovers.values()):
            self._acceptor.accept_now(lambda: self.outlet.is_free)
            if closing.stay:  # once a backlog is empty, leave later clients in it
                for each in self._accepting:
                    if not each.has_waiting():
                        self._accept_no_more(each)
            quiet = self.forwarded == closing.forwarded
            late = bool(closing.latest) and time.monotonic() > closing.latest
            draining = closing.stay and self._drains.listeners
            done = (quiet or not self._accepting) and not draining
            if self.outlet.is_free and (done or late):
                self._close_listeners()
                self._post(BacklogEmptied())
                return
            closing.forwarded = self.forwarded
        self._loop.call_after(_QUIET, QUIET_S, lambda: self._close_when_quiet(closing))

    def _close_listeners(self) -> None:
        self._loop.cancel(_QUIET)
        self._acceptor.end_all()
        for listener in tuple(self._listeners):
            if self._closing and self._closing.stay and not listener.settings.foreign:
                self._ended_listeners.append(listener)
                continue
            self._drains.close(listener)  # counts the clients that are lost
            self._listeners.remove(listener)
        self._drains.close_draining()


def _may_have_unknown(channel: GenerationChannel, route: GenerationChannel) -> bool:
    """Return whether a channel may have connections whose listener the route does not know."""
    if route.known is None:
        return False
    return channel.known is None or not channel.known <= route.known
