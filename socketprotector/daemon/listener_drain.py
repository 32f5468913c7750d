"""A listener that a reload has removed: refuses new clients, serves those that have connected.

These go to the generation that knows the listener, not to the route.  This is off the path of
all other connections: a timer checks the backlog, until none came between two checks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from socketprotector_client import wire

from ..system.channel import BROKEN, Channel
from ..system.listener import AGAIN, Listener, accept_of
from ..system.loop import Loop
from .undelivered import Undelivered

#: Handshakes that are under way finish in so long, or begin again.
QUIET_S = 0.2
#: Where the system does not let us refuse new ones (system/listener.py) they might come for ever:
#: it is closed after so long all the same.
LAST_S = 10.0
#: Connections in one go; then others come in between.
BURST = 64


class DrainingListener:
    """Owns the listener until it is closed; the channel is its generation's."""

    def __init__(
        self,
        listener: Listener,
        channel: Channel,
        loop: Loop,
        undelivered: Undelivered,
        over: Callable[[DrainingListener], None],
    ) -> None:
        """`over` is called back once the listener is closed."""
        self.listener = listener
        self.channel = channel
        self.accepted = 0
        self.lost = 0
        self._loop = loop
        self._undelivered = undelivered
        self._over = over
        self._foreign = listener.settings.foreign
        self._timer = "listener-drain", listener.index
        self._quiet = False  # no client came since the last look
        self._until = 0.0  # to be closed then, though new ones may still come

    def begin(self) -> None:
        """Refuse new clients; a socket that was passed in is left as it is, with its backlog."""
        if not self._foreign and not self.listener.refuse_new():
            self._until = time.monotonic() + LAST_S
        self._loop.call_after(self._timer, 0.0, self._look)

    def end(self) -> None:
        """Close the listener, with what its backlog still holds."""
        self._loop.cancel(self._timer)
        self.lost += self._undelivered.drop(self.listener.index)
        self.listener.close()
        self._over(self)

    def _look(self) -> None:
        moved = 0
        try:
            while moved < BURST and self._move():
                moved += 1
        except OSError:  # the channel is broken: its generation takes nothing any more
            self.end()
            return
        kept = self._undelivered.has(self._is_ours)
        empty = not moved and not kept and not self._is_full()
        late = bool(self._until) and time.monotonic() > self._until
        if (empty and self._quiet) or (late and not kept):
            self.end()
            return
        self._quiet = empty
        self._loop.call_after(self._timer, 0.0 if moved == BURST else QUIET_S, self._look)

    def _is_ours(self, index: int) -> bool:
        return index == self.listener.index

    def _is_full(self) -> bool:
        return self.channel.depth() >= self.channel.capacity()

    def _move(self) -> bool:
        """Accept one and send it; False where there is none, or no room.  Raises OSError."""
        if self._is_full():
            return False
        if self._undelivered.has(self._is_ours):  # it goes first
            kept = self._undelivered.take(self._is_ours)
        elif self._foreign:
            return False
        else:
            kept = self._accept()
        if kept is None:
            return False
        header, fd = kept
        try:
            self.channel.send(header, fd)
        except OSError as error:
            self._undelivered.keep_first(header, fd)
            if error.errno in BROKEN:
                raise
            return False  # no room after all, or the system is short of something
        os.close(fd)
        return True

    def _accept(self) -> tuple[bytes, int] | None:
        """Accept one, header and descriptor; None where there is none."""
        try:
            fd, _ = accept_of(self.listener)()
        except OSError as error:
            # None there; or out of descriptors: tried again at the next look.
            self._quiet = self._quiet and error.errno in AGAIN
            return None
        self.accepted += 1
        index, now = self.listener.index, time.monotonic_ns()
        return wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, index, 0, now), fd


class DrainingListeners:
    """All listeners that were removed and are not closed yet."""

    def __init__(
        self, loop: Loop, undelivered: Undelivered, over: Callable[[DrainingListener], None]
    ) -> None:
        """`over` is called back each time that one is closed."""
        self._loop = loop
        self._undelivered = undelivered
        self._over = over
        self._drains: list[DrainingListener] = []
        self._to_end: list[Channel] = []  # when nothing drains to them any more

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return tuple(each.listener for each in self._drains)

    def begin(self, listener: Listener, to: Channel) -> None:
        """Send the backlog to the channel, then close the listener; takes ownership."""
        drain = DrainingListener(listener, to, self._loop, self._undelivered, self._closed)
        self._drains.append(drain)
        drain.begin()

    def end_after(self, channel: Channel) -> bool:
        """End a channel when nothing drains to it any more; False: nothing does."""
        if not self._to(channel):
            return False
        self._to_end.append(channel)
        return True

    def end(self, channel: Channel | None = None) -> None:
        """Close all those that drain to a channel, or all there are."""
        for each in self._to(channel) if channel is not None else tuple(self._drains):
            each.end()

    def _to(self, channel: Channel) -> list[DrainingListener]:
        return [each for each in self._drains if each.channel is channel]

    def _closed(self, drain: DrainingListener) -> None:
        self._drains.remove(drain)
        self._over(drain)
        if drain.channel in self._to_end and not self._to(drain.channel):
            self._to_end.remove(drain.channel)
            drain.channel.end()
        self._undelivered.persist()
