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

from .channel import BROKEN, SEND_FLAGS, Channel
from .listener import AGAIN, Listener
from .loop import Loop

#: Handshakes that are under way finish in so long, or begin again.
QUIET_S = 0.2
#: Where the system does not let us refuse new ones (listener.py) they might come for ever: it is
#: closed after so long all the same.
LAST_S = 10.0
#: Connections in one go; then others come in between.
BURST = 64
_PACK_DESCRIPTOR = struct.Struct("i").pack


class Emptying:
    """Owns the listener until it is closed; the channel is its generation's."""

    def __init__(
        self, listener: Listener, channel: Channel, loop: Loop, over: Callable[[Emptying], None]
    ) -> None:
        """`over` is called back once the listener is closed."""
        self.listener = listener
        self.channel = channel
        self.moved = 0
        self.lost = 0
        self._loop = loop
        self._over = over
        self._hand: tuple[bytes, int] | None = None  # accepted, and the channel had no room
        self._quiet = False  # nobody came since the last look
        self._until = 0.0  # to be closed then, though new ones may still come

    @property
    def _timer(self) -> tuple[str, int]:
        return "emptying", self.listener.index

    def begin(self, hand: tuple[bytes, int] | None = None) -> None:
        """Let nobody new in.  hand: one that was accepted already; takes ownership."""
        self._hand = hand
        if not self.listener.refuse_new():
            self._until = time.monotonic() + LAST_S
        self._loop.call_after(self._timer, 0.0, self._look)

    def end(self) -> None:
        """Close the listener, whoever may still wait there."""
        self._loop.cancel(self._timer)
        if self._hand is not None:
            os.close(self._hand[1])
            self.lost += 1
            self._hand = None
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
        nobody = not moved and self._hand is None and not self._is_full()
        late = bool(self._until) and time.monotonic() > self._until
        if (nobody and self._quiet) or (late and self._hand is None):
            self.end()
            return
        self._quiet = nobody
        self._loop.call_after(self._timer, 0.0 if moved == BURST else QUIET_S, self._look)

    def _is_full(self) -> bool:
        return self.channel.depth() >= self.channel.capacity()

    def _move(self) -> bool:
        """Accept one and send it; False where there is none, or no room.  Raises OSError."""
        if self._hand is None:
            if self._is_full():
                return False
            try:
                # As in forwarder.py: no socket object only to be taken apart.
                fd, _ = self.listener.socket._accept()  # type: ignore[attr-defined]
            except OSError as error:
                # None there; or out of descriptors: tried again at the next look.
                self._quiet = self._quiet and error.errno in AGAIN
                return False
            index, now = self.listener.index, time.monotonic_ns()
            self._hand = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, index, 0, now), fd
        header, fd = self._hand
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _PACK_DESCRIPTOR(fd))]
        try:
            self.channel.write.sendmsg([header], rights, SEND_FLAGS)
        except OSError as error:
            if error.errno in BROKEN:
                raise
            return False  # no room after all, or the system is short of something
        self._hand = None
        os.close(fd)
        return True
