"""The sockets of a TCP address: one, or a SO_REUSEPORT group from which the kernel selects one.

The plans for the group: reuseport_group.py; its programs and system calls: reuseport.py.

Source: tcp(7); reuseport_select_sock() in net/core/sock_reuseport.c.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Collection, Mapping
from contextlib import suppress

from . import accept_tags, bpf, reuseport, reuseport_group, scoped, sock_diag, socket_copy
from .cleanup import on_error
from .listener import NO_MARKS, RESOURCE_ERRNOS, Listener, is_listening, shut_down

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .reuseport_group import Group, Plan, Record, Step

#: After this time each look-up that found a socket before has usually ended.
_LOOKUP_S = 0.0001


class TcpListener(Listener):
    """The listener of a TCP address; it carries out the plans of its group."""

    _known: Group | None = None
    #: How often socket 0 and socket 1 have listened again.
    _listened_again: tuple[int, ...] = (0, 0)

    @property
    def _group(self) -> Group:
        """The value of its group, made at its first use, because most listeners need no group."""
        if self._known is None:
            self._known = reuseport_group.Group.of(len(self.sockets))
        return self._known

    @property
    def group_record(self) -> Record | None:
        """The orders of its group's members, if the next program cannot derive them."""
        return None if self._known is None else self._known.record

    @group_record.setter
    def group_record(self, record: Record | None) -> None:
        if record is not None:
            self._group.listed, self._group.order = record

    @property
    def port(self) -> int:
        """The port of its address; a socket that was shut down may have another one."""
        return _bound_to(self.settings.address)[1]

    @property
    def _bind_address(self) -> scoped.SocketAddress:
        """Its address as bind() takes it.  Raises OSError."""
        return scoped.sockaddr(*_bound_to(self.settings.address))

    @property
    def local_address(self) -> tuple[str, int]:
        """Its address for processes of this machine."""
        host, port = _bound_to(self.settings.address)
        if host == "::" and self.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            return "::1", port
        if "." in host:  # perhaps an IPv4 address in the form of IPv6, which ::1 cannot reach
            host = host.removeprefix("::ffff:")
        return ("127.0.0.1" if host in ("0.0.0.0", "::") else host), port

    def swap(self) -> None:
        """Exchange sockets 0 and 1, if there are two; only before a generation has a socket."""
        super().swap()
        if self.has_sibling:
            self._group.swap()

    def identity(self, socket_number: int) -> tuple[int, int]:
        """Return a socket's inode, and how often it has listened again.

        While it does not listen, the kernel gives its clients to the other socket.
        """
        inode = os.fstat(self.socket_for(socket_number).fileno()).st_ino
        return inode, self._listened_again[socket_number % len(self.sockets)]

    # -- a socket that was shut down ----------------------------------------

    def is_alive(self, socket_number: int = 0) -> bool:
        """Return whether clients can connect to a socket at its address."""
        sock = self.socket_for(socket_number)
        return is_listening(sock) and bool(sock.getsockname()[1] == self.port)

    def is_sound(self, socket_number: int) -> bool:
        """Return whether accepted connections work; two shutdowns of a socket break them."""
        sock = self.socket_for(socket_number)
        try:
            found = sock_diag.listening(sock.family, self.port)
        except OSError:
            return True  # unknown: assume that it is sound
        return not found.get(os.fstat(sock.fileno()).st_ino, 0)

    def note(self) -> None:
        """Remember the backlog that a worker has set, to set it again when listening again."""
        for number, sock in enumerate(self.sockets):
            if self.is_alive(number):
                with suppress(OSError):  # on failure the earlier value stays
                    self._backlogs[number] = reuseport.backlog(sock)

    def listen_again(self, socket_number: int) -> bool:
        """Listen again on a socket that was shut down; return whether that succeeded.

        A socket that was bound as port 0 would get another port.
        """
        number = socket_number % len(self.sockets)
        counts = enumerate(self._listened_again)
        self._listened_again = tuple(count + (n == number) for n, count in counts)
        try:
            self._look(or_guess=True)
            self._carry_out(self._group.listen_again(number))
        except OSError:
            return False
        if not self.is_alive(number):
            shut_down(self.sockets[number])
            self._group.left(number)
            return False
        return True

    def _made_anew(self, socket_number: int) -> socket.socket:
        number = socket_number % len(self.sockets)
        self._look(or_guess=True)
        # Otherwise the old socket would stay in the group while a process has a copy.
        self._carry_out(self._group.make_room(number))
        made = self._bind_port(number)
        self._group.joined(number)
        return made

    def _withdraw(self, sock: socket.socket) -> None:
        """Keep new clients from a socket before it is closed; other processes may have it."""
        if sock is not self._reserved:
            self._end_silence()
        shut_down(sock)

    def drop_socket(self, socket_number: int) -> None:
        """Close a socket for good; its sibling then has both numbers."""
        super().drop_socket(socket_number)
        self._known = None

    def _bind_port(self, socket_number: int) -> socket.socket:
        """Return another socket, bound beside the sibling, or the spare.  Raises OSError."""
        if self._reserved is not None:
            with suppress(OSError):
                self.reserve()  # this replaces a spare that an earlier program has retired
        number = socket_number % len(self.sockets)
        sock, other = self.socket_for(socket_number), self.socket_for(1 - socket_number)
        backlog, spare = self._backlogs[number], self._reserved
        # None: there is no sibling, or the sibling has another port after a shutdown.
        beside = None if other is sock or other.getsockname()[1] != self.port else other
        if beside is None and spare is None:
            return reuseport.rebind(sock, self._bind_address, backlog)
        made = None
        if beside is not None:
            try:
                made = reuseport.make(beside, backlog)
            except OSError as error:
                if spare is None or error.errno in RESOURCE_ERRNOS:
                    raise
        if made is not None:
            with suppress(OSError):  # on failure its connections are not counted
                accept_tags.tag(made, accept_tags.tag_of(sock))
            return made
        if spare is None:
            raise OSError(errno.EOPNOTSUPP, "the other socket waits for data (TCP_DEFER_ACCEPT)")
        reuseport.enlist(spare, accept_tags.tag_of(sock), backlog, beside)
        self._reserved = None
        self._again[2] += 1
        with suppress(OSError):  # now, before workers can change the options
            self._reserved = reuseport.reserve(spare, self._bind_address)
        return spare

    def steer(
        self,
        socket_number: int,
        marked: Mapping[bpf.Mark, int] = NO_MARKS,
        *,
        held: bool = False,
        share: int = 0,
    ) -> None:
        """Steer new clients to socket 0 or 1; if held, leave them without an answer.

        marked: the socket of each probe mark.  While there are marks, clients of a socket that is
        shut down get no answer either: the third socket, the last member, takes its position.
        share: the part of new clients, in ten thousandths, that the other socket gets.
        Raises OSError.
        """
        if not (self.has_sibling or held or self._is_silent):
            return  # there is only one socket
        for each in self.sockets:  # a first socket without the option would get all new clients
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._look()
        guarded = bool(marked) and self.has_sibling and self.can_be_held
        count = len(self.sockets)
        socket_of_mark = {mark: number % count for mark, number in marked.items()}
        to, both = socket_number % count, self.has_sibling
        self._carry_out(
            self._group.steer(
                to, socket_of_mark, held=held, guarded=guarded, share=share if both else 0
            )
        )

    @property
    def has_no_spare(self) -> bool:
        """Whether a socket was bound again, but no further socket can be bound."""
        return self.can_be_held and any(self._again[:2]) and self._reserved is None

    # -- during a hold -------------------------------------------------------------

    @property
    def can_be_held(self) -> bool:
        """Whether a hold can leave new clients without an answer while workers accept."""
        return self.shared and not self.settings.foreign and not self.lost

    def reserve(self) -> socket.socket:
        """Return the third socket; if it is missing, make it, which needs the right to bind.

        Raises OSError.
        """
        used = self._reserved
        if used is not None and socket_copy.has_left_devices(used) and not is_listening(used):
            # An earlier program was killed in _retire(), or before it could store the fresh socket.
            used.close()
            self._reserved = None
            self._again[2] += 1
        if self._reserved is None:
            alive = (each for n, each in enumerate(self.sockets) if self.is_alive(n))
            sock = next(alive, self.socket)
            self._reserved = reuseport.reserve(sock, sock.getsockname())
        return self._reserved

    @property
    def _is_silent(self) -> bool:
        """Whether the third socket is in the group."""
        return self._reserved is not None and is_listening(self._reserved)

    def _end_silence(self) -> None:
        if self._is_silent:
            self._carry_out(self._group.end_silence())
            if self._is_silent:  # the group did not know this member
                self._retire()

    # -- the group's members -------------------------------------------------------

    def _member(self, number: int) -> socket.socket:
        return self.reserve() if number == reuseport_group.SILENT else self.sockets[number]

    def _carry_out(self, plan: Plan) -> None:
        """Carry out a plan, and send each step's error back.  Raises the plan's OSError."""
        error: OSError | None = None
        while True:
            try:
                step = plan.send(error) if error is not None else next(plan)
            except StopIteration:
                return
            try:
                self._perform(step)
            except OSError as failed:
                error = failed
            else:
                error = None

    def _perform(self, step: Step) -> None:
        match step:
            case reuseport_group.Attach(to, position, marked, drawn, share):
                reuseport.steer(self._member(to), position, marked, drawn, share)
            case reuseport_group.Join(reuseport_group.SILENT):
                reuseport.silence(self.reserve())
            case reuseport_group.Join(number):
                self.sockets[number].listen(self._backlogs[number])
            case reuseport_group.Leave(reuseport_group.SILENT):
                self._retire()
            case reuseport_group.Leave(number):
                shut_down(self.sockets[number])

    def _retire(self) -> None:
        """Remove the third socket from the group, and put a fresh one in its place if possible.

        While a socket leaves, the kernel can still find it.  Over IPv4 it finds the newest socket
        first, so a client's first packet would be lost.  A socket that is bound to a missing device
        is not found.  Undoing that needs CAP_NET_RAW, so the socket cannot be used again.  Source:
        inet_lhash2_lookup(); inet_unhash(), which calls reuseport_stop_listen_sock() first, both in
        net/ipv4/inet_hashtables.c.
        """
        silent, fresh = self._reserved, None
        assert silent is not None
        if silent.family == socket.AF_INET:
            # We may not bind the address, or not change the device.  Then a client can wait 1 s.
            with suppress(OSError):
                made = reuseport.reserve(silent, self._bind_address)
                with on_error(made.close):
                    socket_copy.leave_devices(silent)
                time.sleep(_LOOKUP_S)
                fresh = made
        shut_down(silent)
        if fresh is not None:
            silent.close()
            self._reserved = fresh
            self._again[2] += 1

    def _look(self, *, or_guess: bool = False) -> None:
        """Update the group's members from the kernel.

        Raises OSError if memory or descriptors are short: then an earlier program may have known
        more than we do.  or_guess: in that case rely on what we know.
        """
        members = dict(enumerate(self.sockets))
        if self._reserved is not None:
            members[reuseport_group.SILENT] = self._reserved
        by_inode = {os.fstat(each.fileno()).st_ino: n for n, each in members.items()}
        found: Collection[int] = ()
        try:
            found = sock_diag.listening(self.socket.family, self.port, by_inode.keys())
        except OSError as error:
            if error.errno in RESOURCE_ERRNOS and not or_guess:
                raise
        # The kernel lists none of our sockets if they are of another network namespace, or without
        # sock_diag.
        if by_inode.keys().isdisjoint(found):
            alive = [number for number in range(len(self.sockets)) if self.is_alive(number)]
            if self._is_silent:
                alive.append(reuseport_group.SILENT)
            before = [number for number in self._group.listed if number in alive]
            self._group.found((*before, *(n for n in alive if n not in before)))
        else:
            self._group.found(tuple(by_inode.get(each, reuseport_group.OTHER) for each in found))

    def let_in(self) -> None:
        """Remove filters and devices that keep clients out, before a generation starts.

        Timeouts and other options stay, because living workers use them.  A socket that was passed
        in belongs to its owner, and a locked filter cannot be removed.
        """
        if self.settings.foreign:
            return
        with suppress(OSError):
            socket_copy.let_in(self.socket)

    def refuse_new(self) -> bool:
        """Refuse new clients; clients that have connected can still be accepted.

        Returns whether that is possible.  If it is not, new clients come until the socket is
        closed, and even later if another process owns the socket and keeps listening.
        """
        if self.settings.foreign:
            return False
        try:
            for each in self.sockets:
                reuseport.refuse_new(each)
        except OSError:
            return False  # because of optmem_max, or a locked filter
        return True


def _bound_to(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    return host.strip("[]"), int(port)
