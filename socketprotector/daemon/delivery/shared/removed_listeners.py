"""Closes listeners; a removed listener stays open while a generation accepts from it.

The generations that know a removed listener finish soon after its removal.  They are ordered to
finish once Quiescing has seen that no client waits any more, also at the removed listener.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from contextlib import suppress

from ....system.listener import Listener
from .shared_listeners import SharedListeners
from .socket_steering import SocketSteering


class RemovedListeners:
    """The removed listeners from which generations still accept."""

    def __init__(self, shared: SharedListeners, steering: SocketSteering) -> None:
        self._host, self._steering = shared.host, steering
        self._removed = shared.removed

    @property
    def listeners(self) -> tuple[Listener, ...]:
        return tuple(self._removed)

    def add(self, listener: Listener) -> None:
        """Take ownership of a listener; close it once its generations have been ordered to finish.

        If no generation accepts from it, close it now.  At a passed-in socket the owner accepts.
        So of a passed-in listener only the second socket, which we bound, needs a generation.
        """
        taken = self._taken(listener)
        self.report_lost(listener, taken)
        if listener.settings.foreign:
            taken &= {1} if listener.has_sibling else set()
            # If this fails, new clients come to the second socket until it is closed.
            with suppress(OSError):
                listener.steer(0)
        if taken:
            self._unwatch(listener)
            listener.close_reserved()
            self._removed[listener] = {0, 1} - taken
        else:
            self.close(listener)

    def _taken(self, listener: Listener) -> set[int]:
        """Return the socket numbers at which a generation accepts a listener's clients."""
        turns, generations = self._steering.turns, self._host.generations.items()
        know = {number for number, each in generations if each.knows(listener.index)}
        return {n for n in (0, 1) if know & turns.takers(listener, n)}

    def close_unaccepted(self) -> None:
        """Close the listeners from which no generation accepts any more."""
        self._close([each for each in self._removed if not self._taken(each)])

    def close_all(self) -> None:
        """Close all listeners."""
        self._close(self.listeners)

    def _close(self, listeners: Collection[Listener]) -> None:
        for each in listeners:
            self.report_lost(each, self._removed.pop(each))
            self.close(each)

    def _unwatch(self, listener: Listener) -> None:
        for each in listener.sockets:
            self._host.runtime.loop.unwatch(each.fileno())

    def close(self, listener: Listener) -> None:
        """Close a listener, which need not be a removed one."""
        self._unwatch(listener)
        listener.close()

    def report_lost(self, listener: Listener, leave_out: Collection[int] = ()) -> None:
        """Report how many clients are lost when a listener is closed.

        leave_out: socket numbers (0, 1).  We do not report clients that wait at these sockets:
        workers or the next start will accept them, or an earlier call has reported them.
        """
        left_out, probes = set(leave_out), 0
        if listener.settings.foreign:
            left_out.add(0)  # its owner accepts
        for number in {n % len(listener.sockets) for n in (0, 1)} - left_out:
            with suppress(OSError):  # if the probes cannot be counted, they count as clients
                waiting, waiting_probes = self._steering.probes.waiting_at(listener, number)
                if waiting <= waiting_probes:
                    left_out.add(number)
                elif listener.socket.family != socket.AF_UNIX:
                    # backlog() counts probes that wait at a TCP address: subtract them below.  Not
                    # at a UNIX socket: our probes have disconnected, and backlog() omits those.
                    probes += waiting_probes
        found = listener.backlog(0, left_out)
        lost = found[0] - probes if found else 0
        if lost > 0:
            address = listener.settings.address
            self._host.runtime.log.write("warning", "clients-lost", address=address, lost=lost)
