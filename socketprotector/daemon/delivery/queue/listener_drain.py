"""A listener that a reload has removed: refuses new clients, serves those that have connected.

These go to the generation that knows the listener, not to the route.  This is off the path of
all other connections: a timer checks the backlog, until none came between two checks.  Where no
such generation is left, they are counted as lost, and the log says so.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from functools import partial

from socketprotector_client import wire

from ....model.lazy_dataclass import mutable
from ....system.channel import BROKEN, Channel
from ....system.listener import AGAIN, Listener, accept_of
from ...runtime import Runtime
from .. import LAST_S, QUIET_S
from .shortage import Shortage
from .undelivered import Undelivered

#: Connections in one go; then others come in between.
BURST = 64
#: Lost clients counted at most: where new ones cannot be refused, they may come as fast.
MOST_LOST = 4096


@mutable
class _Draining:
    """A listener that is drained."""

    listener: Listener
    channel: Channel  # its generation's
    until: float = 0.0  # to be closed then, though new ones may still come; 0: they are refused
    quiet: bool = False  # no client came since the last look

    @property
    def timer(self) -> tuple[str, int]:
        return "listener-drain", self.listener.index

    def is_its(self, index: int) -> bool:
        return index == self.listener.index

    @property
    def is_full(self) -> bool:
        return self.channel.depth() >= self.channel.capacity()


class DrainingListeners:
    """Owns those that were removed until they are closed; each channel is its generation's."""

    def __init__(
        self,
        runtime: Runtime,
        undelivered: Undelivered,
        shortage: Shortage,
        end_channel: Callable[[Channel], None],
    ) -> None:
        """end_channel: lets the workers of one read end of file, and notes that."""
        self._loop, self._log = runtime.loop, runtime.log
        self._undelivered = undelivered
        self._shortage = shortage
        self._end_channel = end_channel
        #: Connections that came by these listeners, and those that could not be delivered.
        self.accepted = self.lost = 0
        self._draining: list[_Draining] = []
        self._to_end: list[Channel] = []  # when nothing drains to them any more

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return tuple(each.listener for each in self._draining)

    def begin(self, listener: Listener, to: Channel) -> None:
        """Send the backlog to the channel, then close the listener; takes ownership.

        New clients are refused; a socket that was passed in is left as it is, with its backlog.
        """
        each = _Draining(listener, to)
        self._draining.append(each)
        if not listener.settings.foreign and not listener.refuse_new():
            each.until = time.monotonic() + LAST_S
        self._loop.call_after(each.timer, 0.0, partial(self._look, each))

    def end_after(self, channel: Channel) -> bool:
        """End a channel when nothing drains to it any more; False: nothing does."""
        if not self._to(channel):
            return False
        self._to_end.append(channel)
        return True

    def end(self, channel: Channel | None = None) -> None:
        """Close those that drain to a channel, or all, with what their backlogs still hold."""
        for each in self._to(channel) if channel is not None else tuple(self._draining):
            self._end(each)

    def close(self, listener: Listener) -> None:
        """Close one that drains to no channel; clients that still wait are lost, which is said."""
        lost = self._undelivered.drop(lambda index: index == listener.index)
        if not listener.settings.foreign:  # else others accept them
            dropped = self._drop_backlog(listener)
            self.accepted += dropped
            lost += dropped
        self.lost += lost
        if lost:
            address = listener.settings.address
            self._log.write("warning", "clients-lost", address=address, lost=lost)
        listener.close()

    def _drop_backlog(self, listener: Listener) -> int:
        """Accept all that have connected and close them at once; return how many."""
        self._shortage.spend_reserve()  # they are counted without a free descriptor, too
        found, accept = 0, accept_of(listener)
        for _ in range(MOST_LOST):
            try:
                fd, _address = accept()
            except OSError as error:
                if error.errno == errno.EAGAIN or error.errno not in AGAIN:
                    break
            else:
                os.close(fd)
                found += 1
        self._shortage.take_reserve()
        return found

    def _to(self, channel: Channel) -> list[_Draining]:
        return [each for each in self._draining if each.channel is channel]

    def _end(self, each: _Draining) -> None:
        self._loop.cancel(each.timer)
        self.close(each.listener)
        self._draining.remove(each)
        if each.channel in self._to_end and not self._to(each.channel):
            self._to_end.remove(each.channel)
            self._end_channel(each.channel)
        self._undelivered.persist()

    def _look(self, each: _Draining) -> None:
        moved = 0
        try:
            while moved < BURST and self._move(each):
                moved += 1
        except OSError:  # the channel is broken: its generation takes nothing any more
            self._end(each)
            return
        kept = self._undelivered.has(each.is_its)
        empty = not moved and not kept and not each.is_full
        late = bool(each.until) and time.monotonic() > each.until
        if (empty and each.quiet) or (late and not kept):
            self._end(each)
            return
        each.quiet = empty
        delay_s = 0.0 if moved == BURST else QUIET_S
        self._loop.call_after(each.timer, delay_s, partial(self._look, each))

    def _move(self, each: _Draining) -> bool:
        """Send one on; False where there is none, or no room.  Raises OSError."""
        if each.is_full:
            return False
        if self._undelivered.has(each.is_its):  # it goes first
            found = self._undelivered.take(each.is_its)
        elif each.listener.settings.foreign:
            return False
        else:
            found = self._accept(each)
        if found is None:
            return False
        header, fd = found
        try:
            each.channel.send(header, fd)
        except OSError as error:
            self._undelivered.keep_first(header, fd)
            if error.errno in BROKEN:
                raise
            return False  # no room after all, or the system is short of something
        os.close(fd)
        return True

    def _accept(self, each: _Draining) -> tuple[bytes, int] | None:
        """Accept one; None where there is none."""
        try:
            fd, _ = accept_of(each.listener)()
        except OSError as error:
            # None there; or out of descriptors: tried again at the next look.
            each.quiet = each.quiet and error.errno in AGAIN
            return None
        self.accepted += 1
        index, now = each.listener.index, time.monotonic_ns()
        return wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, index, 0, now), fd
