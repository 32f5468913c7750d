"""Drains listeners that a reload has removed: refuses new clients, and delivers connected clients.

Connected clients go to the newest generation that was opened with the listener, has had clients,
and is not finishing.  A timer looks at the backlog until two looks in a row find no client.

If new clients cannot be refused, the drain also ends when LAST_S has passed and every accepted
client has been sent.  Clients that are still in the backlog when the drain ends are lost.

All remaining clients are lost in three cases:

* No generation can get the clients.
* The channel that gets the clients breaks, or its generation's last worker exits.
* A stop closes all listeners before the drain has ended.

Exception: the backlog of a passed-in socket goes to the socket's owner, such as systemd.

We count and log lost clients.
"""

from __future__ import annotations

import errno
import os
import time
from functools import partial

from socketprotector_client import wire

from ....model.lazy_dataclass import mutable
from ....system.channel import BROKEN, Channel
from ....system.listener import TRANSIENT_ERRNOS, Listener, accept_of
from ...runtime import Runtime
from .. import LAST_S, QUIET_S
from .shortage import Shortage
from .undelivered import Undelivered

#: How many connections to send before the loop handles other events.
BURST = 64
#: How many lost clients to count at most.  Without this limit we might never finish: clients that
#: we cannot refuse may come as fast as we count.
MOST_LOST = 4096


@mutable
class _Draining:
    """A listener, and the channel to which its backlog goes."""

    listener: Listener
    channel: Channel
    #: After this time, the drain ends once the kept connections (undelivered.py) are sent, even if
    #: clients are in the backlog.  0: no limit, because we get no new client.
    until: float = 0.0
    #: Whether the last _look() found no client.  Also False if the channel was full, because then a
    #: client could still be in the backlog.
    quiet: bool = False

    @property
    def timer(self) -> tuple[str, int]:
        return "listener-drain", self.listener.index

    def has_index(self, index: int) -> bool:
        return index == self.listener.index

    @property
    def is_full(self) -> bool:
        return self.channel.depth() >= self.channel.capacity()


class DrainingListeners:
    """The removed listeners that still have connected clients to deliver."""

    def __init__(self, runtime: Runtime, undelivered: Undelivered, shortage: Shortage) -> None:
        self._loop, self._log = runtime.loop, runtime.log
        self._undelivered = undelivered
        self._shortage = shortage
        #: How many connections we accepted from these listeners, and how many clients were lost.
        self.accepted = self.lost = 0
        self._draining: list[_Draining] = []
        self._channels_to_end: list[Channel] = []  # end these once no listener drains to them

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return tuple(each.listener for each in self._draining)

    def begin(self, listener: Listener, to: Channel) -> None:
        """Refuse new clients, send the backlog to a channel, then close the listener.

        Exception: the owner of a passed-in socket keeps listening, and gets the backlog.  From
        such a socket we send only connections that we accepted earlier and kept (undelivered.py).

        Takes ownership of the listener.
        """
        each = _Draining(listener, to)
        self._draining.append(each)
        if not listener.settings.foreign and not listener.refuse_new():
            each.until = time.monotonic() + LAST_S
        self._loop.call_after(each.timer, 0.0, partial(self._look, each))

    def end_channel_later(self, channel: Channel) -> bool:
        """End a channel later, when the last drain to it has ended.

        Returns False if no listener drains to the channel: the caller must end the channel now.
        """
        if not self._draining_to(channel):
            return False
        self._channels_to_end.append(channel)
        return True

    def close_draining(self, channel: Channel | None = None) -> None:
        """Close the listeners that drain to a channel, and lose their clients.

        channel: None: close all draining listeners.  The backlog of a passed-in socket is not lost:
        the socket's owner gets it.
        """
        for each in self._draining_to(channel) if channel is not None else tuple(self._draining):
            self._end(each)

    def close(self, listener: Listener) -> None:
        """Close a listener, and log how many of its waiting clients are lost."""
        lost = self._undelivered.drop(lambda index: index == listener.index)
        if not listener.settings.foreign:  # otherwise the socket's owner gets the clients
            dropped = self._drop_backlog(listener)
            self.accepted += dropped
            lost += dropped
        self.lost += lost
        if lost:
            address = listener.settings.address
            self._log.write("warning", "clients-lost", address=address, lost=lost)
        listener.close()

    def _drop_backlog(self, listener: Listener) -> int:
        """Accept all connected clients (at most MOST_LOST), close them, and return their number."""
        self._shortage.spend_reserve()  # accept() needs a free descriptor
        found, accept = 0, accept_of(listener)
        for _ in range(MOST_LOST):
            try:
                fd, _address = accept()
            except OSError as error:
                if error.errno == errno.EAGAIN or error.errno not in TRANSIENT_ERRNOS:
                    break
            else:
                os.close(fd)
                found += 1
        self._shortage.open_reserve()
        return found

    def _draining_to(self, channel: Channel) -> list[_Draining]:
        return [each for each in self._draining if each.channel is channel]

    def _end(self, each: _Draining) -> None:
        self._loop.cancel(each.timer)
        self.close(each.listener)
        self._draining.remove(each)
        if each.channel in self._channels_to_end and not self._draining_to(each.channel):
            self._channels_to_end.remove(each.channel)
            each.channel.end()
        self._undelivered.persist()

    def _look(self, each: _Draining) -> None:
        """Send what can be sent; end the drain, or look again later."""
        moved = 0
        try:
            while moved < BURST and self._move(each):
                moved += 1
        except OSError:  # the channel is broken, so its workers take nothing more
            self._end(each)
            return
        kept = self._undelivered.has(each.has_index)
        empty = not moved and not kept and not each.is_full
        late = bool(each.until) and time.monotonic() > each.until
        if (empty and each.quiet) or (late and not kept):
            self._end(each)
            return
        each.quiet = empty
        delay_s = 0.0 if moved == BURST else QUIET_S
        self._loop.call_after(each.timer, delay_s, partial(self._look, each))

    def _move(self, each: _Draining) -> bool:
        """Send one connection; return False if none can be sent now.

        Raises OSError if the channel is broken.
        """
        if each.is_full:
            return False
        if self._undelivered.has(each.has_index):  # kept connections go first
            found = self._undelivered.take(each.has_index)
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
            return False  # perhaps the channel is full, or memory is short
        os.close(fd)
        return True

    def _accept(self, each: _Draining) -> tuple[bytes, int] | None:
        """Accept one connection; None: no client waits, or the system is short of resources."""
        try:
            fd, _ = accept_of(each.listener)()
        except OSError as error:
            # If descriptors or memory are short, clients may still wait.  These errors are not in
            # TRANSIENT_ERRNOS, so they clear `quiet`: then this look does not end the drain, unless
            # `until` has passed.
            each.quiet = each.quiet and error.errno in TRANSIENT_ERRNOS
            return None
        self.accepted += 1
        index, now = each.listener.index, time.monotonic_ns()
        return wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, index, 0, now), fd
