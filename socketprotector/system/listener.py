"""The listening sockets in the resident process: accepts from them, and closes them.

launch/bind.py and launch/bind_unix.py bind the sockets.  The resident process inherits their
descriptors.  tcp_listener.py and unix_listener.py have the two families.

Source: tcp(7), unix(7).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from ..model.settings import ListenerSettings
from . import bpf, inherited, reuseport, socket_copy, socket_file
from .polling import events_of

#: No client waits, or the client has disconnected: wait for the next wake-up.  On Linux, accept(2)
#: also returns errors of the connection itself.
TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EINTR,
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
        errno.EPERM,
    }
)
#: The system is out of descriptors or memory: a later try may succeed.
RESOURCE_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
NO_MARKS: Mapping[bpf.Mark, int] = {}
#: A socket that was shut down reports a hang-up; a UNIX socket is also readable then (tcp_poll(),
#: unix_poll()).
CLIENT_OR_END = select.POLLIN | select.POLLRDHUP


def accept_of(listener: Listener) -> Callable[[], tuple[int, object]]:
    """Return a function that accepts one connection as a descriptor, and sets its priority."""
    # socket.accept() would build a socket object that we do not need.
    accept: Callable[[], tuple[int, object]]
    accept = listener.socket._accept  # type: ignore[attr-defined]
    priority = listener.settings.priority
    if priority < 0:
        return accept
    family = listener.socket.family

    def accept_and_set() -> tuple[int, object]:
        fd, address = accept()
        sock = socket.socket(family, socket.SOCK_STREAM, 0, fd)
        # OSError: a program without privileges may not set a priority above 6.
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
        sock.detach()
        return fd, address

    return accept_and_set


class Listener:
    """The listening sockets of an address: one socket, or two for two generations.

    Owns the descriptors, and the socket files that it made.
    """

    def __init__(
        self,
        fd: int,
        index: int,
        settings: ListenerSettings,
        *,
        shared: bool = False,
        sibling: int = -1,
        reserved: int = -1,
        again: tuple[int, ...] = (0, 0, 0),
    ) -> None:
        """Adopt a bound, listening descriptor.  `index` never changes.

        shared: workers have the socket, too, and accept from it until they exit.
        sibling: another socket of the same address, so that two generations have one socket each.
        reserved: a third socket, which no worker gets; new clients go to it during a hold.  It also
        replaces a broken socket if we may not bind the address.
        again: for each socket, the number in its descriptor's name; it grows: no name is reused.
        """
        #: Socket 0, and its sibling, socket 1, if there is one.
        self.sockets = [socket.socket(fileno=each) for each in (fd, sibling) if each >= 0]
        self._again = list(again)
        self._reserved = socket.socket(fileno=reserved) if reserved >= 0 else None
        self.shared = shared
        if not shared:
            # The process that passed the socket in may have made it blocking.  A socket shared with
            # workers must not be changed: living workers may rely on its flags and options,
            # for example on a blocking accept().
            self.socket.setblocking(False)
        self.index = index
        self.settings = settings
        self.group_record: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        #: The rights of its path's files, kept because another program may remove the files.
        self.file_rights: socket_file.Rights | None = None
        #: The backlog of each of the two sockets, for listening again.
        self._backlogs = [settings.backlog or socket.SOMAXCONN] * 2
        #: For each of the two sockets, whether it was made only for the generation that accepts
        #: from it.
        self.is_fresh = [False, False]
        #: Whether the listener gets no more clients: it was shut down, and cannot be bound again.
        self.lost = False
        #: Whether the socket is readable without a client, so that polling it is useless.
        self.always_readable = False

    def fileno(self) -> int:
        return self.socket.fileno()

    # -- different in each family -------------------------------------------------

    @property
    def port(self) -> int:
        """The port of the TCP address; a socket that was shut down may have another port."""
        return 0

    @property
    def local_address(self) -> tuple[str, int]:
        """Host and port for local clients; for a UNIX socket the path or @name, and 0."""
        raise NotImplementedError

    def is_alive(self, socket_number: int = 0) -> bool:
        """Return True if clients can connect to this socket at the listener's address."""
        raise NotImplementedError

    def is_sound(self, socket_number: int) -> bool:
        """Return True if accepted connections work; two shutdowns of a socket break them."""
        raise NotImplementedError

    def listen_again(self, socket_number: int) -> bool:
        """Listen again on a socket that was shut down; return whether that succeeded."""
        raise NotImplementedError

    def steer(
        self,
        socket_number: int,
        marked: Mapping[bpf.Mark, int] = NO_MARKS,
        *,
        held: bool = False,
        share: int = 0,
    ) -> None:
        """Steer new clients to socket 0 or 1; if held, leave them without an answer.

        marked: the socket of each probe mark.  share: the part of new clients, in ten thousandths,
        that the other socket gets.  Raises OSError.
        """
        raise NotImplementedError

    @property
    def can_be_held(self) -> bool:
        """Whether a hold can leave new clients without an answer while workers accept."""
        raise NotImplementedError

    def reserve(self) -> socket.socket:
        """Return the third socket; make it if it is missing.

        Making it needs the permission to bind the address.  Raises OSError.
        """
        raise NotImplementedError

    def refuse_new(self) -> bool:
        """Refuse new clients; clients that have connected can still be accepted.

        Returns whether that is possible.  If it is not, new clients come until the socket is
        closed, and even later if another process owns the socket and keeps listening.
        """
        raise NotImplementedError

    def _made_anew(self, socket_number: int) -> socket.socket:
        """Return a new socket to replace this socket.  Raises OSError."""
        raise NotImplementedError

    def _withdraw(self, sock: socket.socket) -> None:
        """Keep new clients from a socket before it is closed; other processes may have it."""
        raise NotImplementedError

    # -- in one family only ---------------------------------------------------------

    @property
    def path(self) -> str:
        """The path, if each socket can have a file of its own beside it; otherwise "".

        See socket_file.py.
        """
        return ""

    def ensure_address(self, socket_number: int) -> tuple[str, int]:
        """Return a socket's address for local clients; over TCP a probe mark selects the socket."""
        return self.local_address

    def identity(self, socket_number: int) -> tuple[int, int]:
        """Return a value that changes if clients of a socket's address may have gone elsewhere.

        Raises OSError if they go elsewhere now: another program has the socket's file.
        """
        return 0, 0

    @property
    def is_cut_off(self) -> bool:
        """Whether no client can connect any more, because another program has removed its files."""
        return False

    @property
    def path_fault(self) -> str:
        """Why no client comes by its path; "" if clients come, or if we cannot know."""
        return ""

    def is_out_of_reach(self, socket_number: int) -> bool:
        """Return whether a socket must be replaced, because the address cannot lead to it."""
        return False

    def is_passed_by(self, socket_number: int) -> bool:
        """Return whether a socket can get clients although its address no longer leads to it."""
        return False

    @property
    def hangs_up(self) -> bool:
        """Whether this is a UNIX socket that was shut down: always readable, without a client."""
        return False

    def note(self) -> None:
        """Remember the backlog that a worker has set, to set it again when listening again."""

    def renew(self, socket_number: int) -> bool:
        """Make a new socket, without clients yet, for a generation that has not started.

        Returns whether a socket was made.  Raises OSError.
        """
        return False

    @property
    def has_no_spare(self) -> bool:
        """Whether a socket was bound again, and no further socket can be bound."""
        return False

    @property
    def is_reserved_for_clients(self) -> bool:
        """Whether clients of a hold may wait at the third socket."""
        return False

    @property
    def has_held_client(self) -> bool:
        """Whether a client of a hold waits at the third socket."""
        return False

    def adopt_reserved(self, socket_number: int) -> None:
        """Give the third socket, at which clients of a hold wait, to the next generation.

        socket_number: the socket of that generation; clients that wait there come first.
        """

    def let_in(self) -> None:
        """Remove filters and devices that keep clients out, before a generation starts."""

    def remove_files(self) -> None:
        """Remove the socket files that this listener made."""

    # -- the sockets ------------------------------------------------------------------

    @property
    def has_sibling(self) -> bool:
        """Whether there are two sockets, so that each of two generations has its own."""
        return len(self.sockets) == 2

    def socket_for(self, socket_number: int) -> socket.socket:
        """Return socket 0 or 1; without a sibling both are the same socket."""
        return self.sockets[socket_number % len(self.sockets)]

    def swap(self) -> None:
        """Exchange sockets 0 and 1, if there are two; only before a generation has a socket."""
        self.sockets.reverse()

    @property
    def lacks_interface(self) -> bool:
        """Whether its interface was removed: no socket, not even the reserved one, has it."""
        return all(map(socket_copy.interface_is_gone, self._sockets_except(())))

    @property
    def blocks(self) -> bool:
        """Whether accept() blocks; any process that has the socket can change this for all."""
        return os.get_blocking(self.fileno())

    @property
    def is_ending(self) -> bool:
        """Whether an earlier program had shut the listener down, and was about to close it."""
        return not (self.shared or self.settings.foreign or is_listening(self.socket))

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors for the next program, by name; a name is never reused."""
        first, second = [*self.sockets, None][:2]
        kinds = (inherited.LISTENER, inherited.SIBLING, inherited.RESERVED)
        return {
            f"{kind}{self.index}{f'.{again}' if again else ''}": each.fileno()
            for kind, each, again in zip(
                kinds, (first, second, self._reserved), self._again, strict=True
            )
            if each is not None
        }

    def bind_anew(self, socket_number: int) -> None:
        """Replace a broken socket with a new one, which no worker has yet.  Raises OSError."""
        if self.settings.foreign:
            raise OSError(errno.EPERM, "it was passed in, and is not ours")
        sock, made = self.socket_for(socket_number), self._made_anew(socket_number)
        made.setblocking(os.get_blocking(sock.fileno()))
        self._replace(socket_number, made)

    def _replace(self, socket_number: int, made: socket.socket) -> None:
        """Replace a socket by another socket, and close the old one."""
        number = socket_number % len(self.sockets)
        self._withdraw(self.sockets[number])
        self.sockets[number].close()
        self.sockets[number] = made
        self._again[number] += 1

    def drop_socket(self, socket_number: int) -> None:
        """Close a socket for good; its sibling then has both numbers."""
        number = socket_number % 2
        sock = self.sockets.pop(number)
        del self._backlogs[number]
        self._withdraw(sock)
        shut_down(sock)
        sock.close()
        if number == 0:  # a name must never get another descriptor
            self._again[0] += 1

    def can_do_without(self, sock: socket.socket) -> bool:
        """Return True if a socket that keeps clients out can be dropped without a loss.

        It can be dropped if there is a spare socket.  It can also be dropped if it is bound to a
        missing device, because no client reaches it.
        """
        if not self.can_be_held:
            return False
        with suppress(OSError):
            self.reserve()
            return True
        return socket_copy.device_is_gone(sock)

    def close_reserved(self) -> None:
        """Close the third socket."""
        if self._reserved is not None:
            self._withdraw(self._reserved)  # another process may have a copy
            self._reserved.close()
            self._reserved = None

    # -- the end -------------------------------------------------------------------

    def claim(self, *, resumed: bool) -> None:
        """Listen again, because clients of a UNIX socket see the pid of the last listen().

        resumed: an earlier program had the socket, so workers may have set its options.
        """
        if resumed and self.shared:
            return
        for each in self.sockets if self.settings.backlog else ():
            each.listen(self.settings.backlog)

    def close(self) -> None:
        """Stop listening.  This uses shutdown(), because another process may have a copy.

        A socket that workers share listens until the last worker exits.
        """
        self.remove_files()
        if not self.settings.foreign and not self.shared:
            shut_down(self.socket)
        self.close_reserved()
        for each in self.sockets:
            each.close()

    def leave(self, socket_number: int) -> str:
        """Close only our copies of the sockets: the fd store keeps a socket for the next start.

        socket_number: the socket that gets new clients.  Returns its name in the store.  Returns ""
        if the store keeps no socket; then everything is closed.
        """
        if self.settings.foreign or not self.is_alive(socket_number):
            self.close()
            return ""
        kept = self.socket_for(socket_number)
        with suppress(OSError):  # on failure the same socket as before gets new clients
            self._steer_last(socket_number)
        self.close_reserved()
        name = next(name for name, fd in self.descriptors().items() if fd == kept.fileno())
        for each in self.sockets:
            if each is not kept:
                self._withdraw(each)
                shut_down(each)  # otherwise a copy in another process would get clients
            each.close()
        return name

    def _steer_last(self, socket_number: int) -> None:
        """Steer clients to the socket that the next start gets.  Raises OSError."""

    def backlog(self, socket_number: int, exclude: Collection[int] = ()) -> tuple[int, int] | None:
        """Return how many clients wait at the sockets, and how many can; None if unknown.

        socket_number: the socket whose limit counts.  exclude: sockets that do not count.
        """
        try:
            waiting = sum(reuseport.queue(each)[0] for each in self._sockets_except(exclude))
            return waiting, reuseport.backlog(self.socket_for(socket_number))
        except (OSError, struct.error):
            return None

    def _sockets_except(self, numbers: Collection[int]) -> list[socket.socket]:
        """Return all sockets, also the socket of a hold, except those with these numbers."""
        excluded = [*map(self.socket_for, numbers)]
        return [each for each in (*self.sockets, self._reserved) if each and each not in excluded]

    def has_waiting(self, socket_number: int | None = None) -> bool:
        """Return True if a connected client waits to be accepted.  None: at any of the sockets."""
        polled = self.sockets if socket_number is None else (self.socket_for(socket_number),)
        return any(map(has_client, polled))

    @property  # last in the class: below it a type checker takes `socket` for this property
    def socket(self) -> socket.socket:
        """Socket 0."""
        return self.sockets[0]


def has_client(sock: socket.socket) -> bool:
    """Return True if a client waits at a socket."""
    return events_of(sock, CLIENT_OR_END) == select.POLLIN


def is_listening(sock: socket.socket) -> bool:
    """Return True if a socket is listening: it was not shut down."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def shut_down(sock: socket.socket) -> None:
    """Shut a socket down for all processes that have it."""
    with suppress(OSError):  # the socket was shut down already
        sock.shutdown(socket.SHUT_RDWR)
