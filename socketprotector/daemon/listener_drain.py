"""A listener that a reload has removed: nobody new gets in, and who has connected is served.

They go to the generation that knows the listener, not to the route.  This is off the path of
every other connection: it looks from time to time, and is over when nobody came in between.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable

from socketprotector_client import wire

from ..system.channel import BROKEN, SEND_FLAGS, Channel
from ..system.listener import AGAIN, Listener, accept_of
from ..system.loop import Loop

#: Handshakes that are under way finish in so long, or begin again.
QUIET_S = 0.2
#: Where the system does not let us refuse new ones (system/listener.py) they might come for ever:
#: it is closed after so long all the same.
LAST_S = 10.0
#: Connections in one go; then others come in between.
BURST = 64
_PACK_DESCRIPTOR = struct.Struct("i").pack


class Parked:
    """Connections that were accepted, could not be sent, and are not for the route.

    Owns their descriptors.
    """

    def __init__(self, number: Callable[[], int], held: Callable[[], bool]) -> None:
        """number: one that no other ever had.  held: writes down what there is; False: cannot."""
        self._number = number
        self._held = held
        #: By their number: header and descriptor.
        self.hands: dict[int, tuple[bytes, int]] = {}

    def has(self, listener: int) -> bool:
        """Whether one is there that came by a listener."""
        return any(listener_of(header) == listener for header, _ in self.hands.values())

    def put(self, header: bytes, fd: int) -> None:
        """Take ownership of one."""
        self.hands[self._number()] = header, fd
        self._held()

    def put_first(self, header: bytes, fd: int) -> None:
        """Take ownership of one that was given before it could be sent: its turn is the next."""
        self.hands = {self._number(): (header, fd), **self.hands}
        self._held()

    def take(self, listener: int) -> tuple[bytes, int] | None:
        """Give one that came by a listener to the caller, who may send it: it is written down.

        None where there is none, or where it cannot be.
        """
        for number, hand in self.hands.items():
            if listener_of(hand[0]) == listener:
                before = dict(self.hands)
                del self.hands[number]
                # Killed from here on we lose it, but never send it twice.
                if self._held():
                    return hand
                self.hands = before
                return None
        return None

    def drop(self, listener: int | None = None) -> int:
        """Close all, or those that came by a listener; return how many."""
        gone = [n for n, (h, _) in self.hands.items() if listener in (None, listener_of(h))]
        for number in gone:
            os.close(self.hands.pop(number)[1])
        return len(gone)


class ListenerDrain:
    """Owns the listener until it is closed; the channel is its generation's."""

    def __init__(
        self,
        listener: Listener,
        channel: Channel,
        loop: Loop,
        parked: Parked,
        over: Callable[[ListenerDrain], None],
    ) -> None:
        """`over` is called back once the listener is closed."""
        self.listener = listener
        self.channel = channel
        self.moved = 0
        self.lost = 0
        self._loop = loop
        self._parked = parked
        self._over = over
        self._quiet = False  # nobody came since the last look
        self._until = 0.0  # to be closed then, though new ones may still come

    @property
    def _foreign(self) -> bool:
        return self.listener.settings.foreign

    @property
    def _timer(self) -> tuple[str, int]:
        return "listener-drain", self.listener.index

    def begin(self) -> None:
        """Let nobody new in; one of somebody else is left as it is, with those who wait there."""
        if not self._foreign and not self.listener.refuse_new():
            self._until = time.monotonic() + LAST_S
        self._loop.call_after(self._timer, 0.0, self._look)

    def end(self) -> None:
        """Close the listener, whoever may still wait there."""
        self._loop.cancel(self._timer)
        self.lost += self._parked.drop(self.listener.index)
        self.listener.close()
        self._over(self)

    def _look(self) -> None:
        moved = 0
        try:
            while moved < BURST and self._move():
                moved += 1
        except OSError:  # the channel is broken: whoever knew the listener takes nothing any more
            self.end()
            return
        self.moved += moved
        parked = self._parked.has(self.listener.index)
        nobody = not moved and not parked and not self._is_full()
        late = bool(self._until) and time.monotonic() > self._until
        if (nobody and self._quiet) or (late and not parked):
            self.end()
            return
        self._quiet = nobody
        self._loop.call_after(self._timer, 0.0 if moved == BURST else QUIET_S, self._look)

    def _is_full(self) -> bool:
        return self.channel.depth() >= self.channel.capacity()

    def _move(self) -> bool:
        """Accept one and send it; False where there is none, or no room.  Raises OSError."""
        if self._is_full():
            return False
        hand = self._parked.take(self.listener.index)
        if hand is None and self._parked.has(self.listener.index):
            return False  # it goes first
        if hand is None and self._foreign:
            return False
        if hand is None:
            try:
                fd, _ = accept_of(self.listener)()
            except OSError as error:
                # None there; or out of descriptors: tried again at the next look.
                self._quiet = self._quiet and error.errno in AGAIN
                return False
            index, now = self.listener.index, time.monotonic_ns()
            hand = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, index, 0, now), fd
        header, fd = hand
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _PACK_DESCRIPTOR(fd))]
        try:
            self.channel.write.sendmsg([header], rights, SEND_FLAGS)
        except OSError as error:
            self._parked.put_first(header, fd)
            if error.errno in BROKEN:
                raise
            return False  # no room after all, or the system is short of something
        os.close(fd)
        return True


def listener_of(header: bytes) -> int:
    """The index of the listener that a connection came by."""
    index: int = wire.HEADER.unpack_from(header)[2]
    return index
