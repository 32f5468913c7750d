"""The listeners from which workers accept, and SocketSteering's methods for other classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

from ....model.records import RightsRecord
from ....system import socket_file
from ....system.listener import Listener
from ..host import Host


class SharedListeners:
    """All listeners.  Only the delivery adds and removes listeners."""

    def __init__(self, host: Host, listeners: Iterable[Listener]) -> None:
        """Take ownership of the listeners."""
        self.host = host
        self.all = list(listeners)
        #: The removed listeners from which generations still accept the last clients.  The value
        #: holds the numbers (0, 1) of the sockets from which no generation accepts.
        self.removed: dict[Listener, Collection[int]] = {}
        #: Address -> why clients may come to the wrong socket; set by SocketSteering.steer().
        self.not_steered: dict[str, str] = {}

    @property
    def living(self) -> list[Listener]:
        """The listeners that get clients."""
        return [each for each in self.all if each.shared and not each.lost]

    def to_steer(self, *, closing: bool) -> list[Listener]:
        """Return the listeners whose new clients must be steered.

        closing: whether our own listeners refuse new clients.  If they do, return only listeners
        whose socket a service manager passed in (`foreign`).
        """
        return [each for each in self.all if each.settings.foreign or not closing]

    def can_stray(self, listener: Listener) -> bool:
        """Return whether new clients of a listener can come to the wrong socket."""
        return listener.settings.address in self.not_steered and not listener.path_fault

    @property
    def pairs(self) -> list[Listener]:
        """The listeners with two sockets, one for each of two generations."""
        return [each for each in self.all if each.has_sibling]

    def awaited(self, generation: int, leave_out: Collection[int]) -> list[Listener]:
        """Return the listeners whose clients a generation accepts before it is ordered to finish.

        leave_out: indices of listeners to leave out.
        """
        known = self.host.generations.get(generation)
        removed = [each for each in self.removed if known is None or known.knows(each.index)]
        return [each for each in (*self.pairs, *removed) if each.index not in leave_out]

    @property
    def rights_record(self) -> tuple[RightsRecord, ...]:
        """The rights of each socket file.

        After an upgrade or a kill, the program that replaces us (the next program) may find a file
        removed.  Then it makes a new file with these rights.
        """
        found = ((each.index, each.file_rights) for each in self.all)
        return tuple(
            (index, rights.uid, rights.gid, rights.mode, (rights.acl or b"").hex())
            for index, rights in found
            if rights
        )

    def adopt_rights(self, record: Iterable[RightsRecord]) -> None:
        """Adopt the rights_record from before an upgrade or a kill."""
        known = {
            index: socket_file.Rights(uid, gid, mode, bytes.fromhex(acl))
            for index, uid, gid, mode, acl in record
        }
        for each in self.all:
            each.file_rights = known.get(each.index)

    def note_bound(self, listener: Listener) -> None:
        """Record that a listener got another socket, or that one of its two sockets was dropped."""
        if not listener.has_sibling:
            # All generations share one socket, and connections inherit its accept tag
            # (open_counts.py).  So no tag shows any more which generation accepted a connection:
            # forget all tags.
            for each in self.host.generations.values():
                each.update_record(accept_tags=())
        self.host.listener_bound(listener)

    def lose(self, listener: Listener, reason: str) -> None:
        """Record that a listener gets no more clients."""
        listener.lost = True
        self.host.listener_lost(listener, reason)


class Steering(ABC):
    """The methods of SocketSteering that its parts, such as Probes and SocketRepair, call."""

    @abstractmethod
    def steer(self) -> bool:
        """Update the steering of all listeners; return whether that succeeded."""

    @abstractmethod
    def repair(self, listener: Listener, socket_number: int) -> None:
        """Repair a socket that was shut down."""

    @abstractmethod
    def replace(self, listener: Listener, socket_number: int) -> None:
        """Replace a broken socket by a new socket."""

    @abstractmethod
    def adopt_held(self) -> None:
        """Give the held clients of UNIX paths to the next generation.

        Also give it the clients of a UNIX path if some workers of the serving generation lack
        the path's current socket (Turns.lacks_workers()).

        While a hold lasts, do nothing: its clients must continue to wait.  If generations already
        accept from both socket numbers, 0 and 1, no socket is free for the next generation.  In
        this case only post HeldClientsWait, if held clients wait.
        """

    @abstractmethod
    def gets_no_client(self, generation: int) -> bool:
        """Return whether a generation gets no new client; True once a stop closes listeners."""
