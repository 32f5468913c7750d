"""The sockets of a TCP address: one, or a SO_REUSEPORT group of which the kernel selects a member.

The filter that selects one: reuseport.py.

Source: tcp(7); reuseport_select_sock() in net/core/sock_reuseport.c.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from contextlib import suppress

from . import accept_marks, bpf, reuseport, sock_diag, socket_copy
from .listener import NO_MARKS, SCARCE, Listener, is_listening, shut_down


class TcpListener(Listener):
    """A TCP address: knows which member of its group is where, and to which new clients come."""

    #: To which new clients come, None where that is not known; and those with a mark.
    _steered: tuple[int | None, Mapping[bpf.Mark, int]] = None, NO_MARKS
    _second: socket.socket | None = None  # of the two in the group, when that was told
    _last = 1  # which socket was the last to listen, as far as we know

    @property
    def port(self) -> int:
        """That of its address: a socket that was shut down may have another one."""
        return _bound_to(self.settings.address)[1]

    @property
    def local_address(self) -> tuple[str, int]:
        """Where a process of this machine reaches it."""
        host, port = _bound_to(self.settings.address)
        if host == "::" and self.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            return "::1", port
        return ("127.0.0.1" if host in ("0.0.0.0", "::") else host), port

    def swap(self) -> None:
        """Exchange sockets 0 and 1, if there are two; before any generation has one."""
        super().swap()
        self._last = 1 - self._last

    # -- one that was shut down ---------------------------------------------

    def is_alive(self, socket_number: int = 0) -> bool:
        """Whether clients can come to a socket, where it was bound."""
        one = self.socket_for(socket_number)
        return is_listening(one) and bool(one.getsockname()[1] == self.port)

    def is_sound(self, socket_number: int) -> bool:
        """Whether accepted clients can be spoken with: not where it was shut down twice before."""
        one = self.socket_for(socket_number)
        try:
            found = sock_diag.listening(one.family, self.port)
        except OSError:
            return True  # as far as can be told
        return not found.get(os.fstat(one.fileno()).st_ino, 0)

    def note(self) -> None:
        """Remember how many may wait: a worker that listens says it, and so should we then."""
        for number, one in enumerate(self.sockets):
            if self.is_alive(number):
                with suppress(OSError):  # the one before will do
                    self._backlogs[number] = reuseport.backlog(one)

    def listen_again(self, socket_number: int) -> bool:
        """Have a socket listen again that was shut down; False where it does not.

        One that was bound as port 0 comes back on another port.
        """
        one = self.socket_for(socket_number)
        self.joined[socket_number % 2] += 1
        try:
            if not self._silent:
                self._steer_for(socket_number)
            # Shut down twice, it would pass that on to all connections that it accepts, until it
            # is shut down as one that listens.
            one.listen(self._backlogs[socket_number % len(self.sockets)])
            one.shutdown(socket.SHUT_RDWR)
            if not self._silent or self._second is not one:
                # As late as that: from now on all comes to the other one, until this one listens.
                self._end_silence()
                self._steer_for(socket_number)
            one.listen(self._backlogs[socket_number % len(self.sockets)])
            self._end_silence()  # else it has the position of this one, which takes that again
        except OSError:
            return False
        self._last = socket_number % 2
        if not self.is_alive(socket_number):
            shut_down(one)
            return False
        return True

    def _steer_for(self, last: int) -> None:
        """Have clients come where they were steered to as soon as this socket is the last member.

        And none to it before it is its turn.
        """
        other = 1 - last % 2
        if self.has_sibling and self.is_alive(other):
            to, marked = self._steered
            with suppress(OSError):  # its filter is locked
                members = {mark: int(number != other) for mark, number in marked.items()}
                reuseport.steer(self.socket_for(other), int(to not in (other, None)), members)

    def _made_anew(self, socket_number: int) -> socket.socket:
        self._end_silence()
        # Else it would go on in the group as long as a process has a copy.
        shut_down(self.socket_for(socket_number))
        return self._bind_port(socket_number)

    def _withdraw(self, one: socket.socket) -> None:
        """Keep new clients from a socket that is about to be closed, whoever has a copy."""
        if one is not self._reserved:
            self._end_silence()
        shut_down(one)

    def _bind_port(self, socket_number: int) -> socket.socket:
        """Return another socket, bound beside the sibling, or the spare.  Raises OSError."""
        number = socket_number % len(self.sockets)
        one, other = self.socket_for(socket_number), self.socket_for(1 - socket_number)
        backlog, spare = self._backlogs[number], self._reserved
        # Alone, or its sibling has come back on another port.
        beside = None if other is one or other.getsockname()[1] != self.port else other
        if beside is None and spare is None:
            return reuseport.rebind(one, _bound_to(self.settings.address), backlog)
        made = None
        if beside is not None:
            try:
                made = reuseport.make(beside)
            except OSError as error:
                if spare is None or error.errno in SCARCE:
                    raise
            self._last = socket_number % 2
        if made is not None:
            with suppress(OSError):  # then its connections are not counted
                accept_marks.mark(made, accept_marks.mark_of(one))
            return made
        if spare is None:
            raise OSError(errno.EOPNOTSUPP, "the other one waits for data")
        reuseport.enlist(spare, accept_marks.mark_of(one), backlog, beside)
        self._reserved = None
        self._again[2] += 1
        with suppress(OSError):  # now: it gets the options of a socket that no worker has had
            self._reserved = reuseport.reserve(spare, _bound_to(self.settings.address))
        return spare

    def steer(
        self,
        socket_number: int,
        marked: Mapping[bpf.Mark, int] = NO_MARKS,
        *,
        held: bool = False,
    ) -> None:
        """Have new clients come to socket 0 or 1, or where held get no answer.

        marked: and those with a mark to a socket of their own.  As long as there are any, what
        would come to a socket that is shut down gets no answer either: the third one, the last
        member, takes its position then.  Raises OSError.
        """
        if not (self.has_sibling or held or self._silent):
            return  # all come to the one there is
        for each in self.sockets:  # one without it takes all new clients, where it stands first
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if silent := self._silent:
            last = self._order()[-1]
            if last is not silent or not all(is_listening(each) for each in self.sockets):
                self._end_silence()  # it has the position of one that has left
            if last is not silent and last is not None:
                # A server has had it listen again meanwhile: no position is known any more.
                self.listen_again(self.sockets.index(last))
        to = self.socket_for(socket_number)
        guarded = bool(marked) and self.has_sibling and self.can_be_held
        if held:
            if not self._silent:
                with suppress(OSError):  # so that none comes to it before it is silent
                    self._steer_to(to, marked)
            to = self._silence()
        elif guarded:
            with suppress(OSError):  # else what comes to one that is shut down comes to the other
                self._silence()
        try:
            self._steer_to(to, marked)
        except PermissionError:  # servers have locked the filters of theirs
            self._silence()
            self._steer_to(to, marked)
        if not (held or guarded):
            self._end_silence()
        self._steered = None if held else socket_number % 2, dict(marked)

    def _steer_to(self, to: socket.socket, marked: Mapping[bpf.Mark, int]) -> None:
        order, failed = self._order(), OSError(errno.ENOTCONN, "it does not listen")

        def member(one: socket.socket) -> int:
            if one not in order:
                one = self._silent or one
            return order.index(one) if one in order else 0

        its = {mark: member(self.socket_for(number)) for mark, number in marked.items()}
        self._second = order[1] if len(order) > 1 else None
        for each in reversed(order):
            if each is None:
                continue
            try:  # a server may have locked the filters of its own
                reuseport.steer(each, member(to), its)
            except OSError as error:
                failed = error
            else:
                return
        raise failed

    @property
    def has_no_spare(self) -> bool:
        """Whether a socket was bound anew, and the next one cannot be."""
        return self.can_be_held and any(self._again) and self._reserved is None

    # -- during a hold -------------------------------------------------------------

    @property
    def can_be_held(self) -> bool:
        """Whether clients can be left without an answer, though workers accept."""
        return self.shared and not self.settings.foreign and not self.lost

    def reserve(self) -> socket.socket:
        """Have the third socket, which takes the rights to bind the address.  Raises OSError."""
        if self._reserved is None:
            there = (each for n, each in enumerate(self.sockets) if self.is_alive(n))
            one = next(there, self.socket)
            self._reserved = reuseport.reserve(one, one.getsockname())
        return self._reserved

    @property
    def _silent(self) -> socket.socket | None:
        """The third one while it is in the group, always as the last to listen of it."""
        return self._reserved if self._reserved and is_listening(self._reserved) else None

    def _silence(self) -> socket.socket:
        if not self._silent:
            reuseport.silence(self.reserve())
        return self.reserve()

    def _end_silence(self) -> None:
        """Have it leave the group: others that listen again would come to stand before it."""
        if self._silent:
            shut_down(self._silent)

    # -- the group's members -------------------------------------------------------

    def _order(self) -> list[socket.socket | None]:
        """Return the members of the group, as they are counted; None for one that is not ours.

        Raises OSError.
        """
        ours = self.sockets if self._last or not self.has_sibling else self.sockets[::-1]
        if self._silent:
            ours = [*ours, self._silent]
        by_inode = {os.fstat(each.fileno()).st_ino: each for each in ours}
        try:
            found = sock_diag.listening(self.socket.family, self.port, by_inode.keys())
        except OSError as error:
            if error.errno in SCARCE:
                raise  # an earlier program may have known better than we do
            return list(ours)  # sock_diag is not there
        # None of them, where they are of another network namespace.
        return [by_inode.get(each) for each in found] or list(ours)

    def let_in(self) -> None:
        """Have no generation begin on a socket, common to it and others, that lets no client in.

        Time-outs and the like are those of the living; what is passed in is its owner's; and a
        filter that is locked cannot be taken away.
        """
        if self.settings.foreign:
            return
        with suppress(OSError):
            socket_copy.let_in(self.socket)

    def refuse_new(self) -> bool:
        """Refuse new clients; those that have connected can still be accepted.

        Returns whether that could be had: else new ones come until it is closed, and after that,
        where its owner has passed it in and goes on listening.
        """
        if self.settings.foreign:
            return False
        try:
            for each in self.sockets:
                reuseport.refuse_new(each)
        except OSError:
            return False  # optmem_max, or a filter that is locked
        return True


def _bound_to(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    return host.strip("[]"), int(port)
