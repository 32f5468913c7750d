"""The listening sockets in the resident process: accept from them, and end them well.

launch/bind.py and launch/bind_unix.py have bound them before this process begins; they arrive as
descriptors.

Source: tcp(7), unix(7).
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress

from ..model.lazy_dataclass import replace
from ..model.settings import ListenerSettings
from . import accept_marks, inherited, reuseport, sock_diag, socket_file
from .cleanup import on_error
from .dir_lock import give, locked
from .polling import events_of

#: Nothing there, or gone again: the next wake-up brings the next client (accept(2) on Linux
#: passes on errors of the connection itself).
AGAIN = frozenset(
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
#: The system is out of something: what cannot be had now can be later.
SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NO_MARKS: Mapping[reuseport.Mark, int] = {}
#: One that was shut down hangs up; a UNIX one is readable then, too (tcp_poll(), unix_poll()).
_CLIENT_OR_END = select.POLLIN | select.POLLRDHUP


def accept_of(listener: Listener) -> Callable[[], tuple[int, object]]:
    """Return what accepts one connection, as a descriptor, with the priority it is to have."""
    # socket.accept() would build a socket object only for us to take it apart.
    accept: Callable[[], tuple[int, object]]
    accept = listener.socket._accept  # type: ignore[attr-defined]
    priority = listener.settings.priority
    if priority < 0:
        return accept
    family = listener.socket.family

    def accept_and_set() -> tuple[int, object]:
        fd, address = accept()
        one = socket.socket(family, socket.SOCK_STREAM, 0, fd)
        # OSError: a program that drops privileges may lose the right to those above 6.
        with suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
        one.detach()
        return fd, address

    return accept_and_set


class Listener:
    """One listening socket.  Owns its descriptor, and the socket file if it made one."""

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
        """Adopt a bound, listening descriptor.  `index` is for life.

        shared: workers have it too, and accept from it: then it is theirs to the end.  sibling:
        another one for the same address (reuseport.py), so that two generations have one each.
        reserved: a third one, which no worker gets: new clients come there during a hold.  And it
        is the spare where we may not bind the address.
        again: how often each of the three was bound anew, which is part of its name.
        """
        #: Socket 0, and where it has a reuseport sibling socket 1.
        self.sockets = [socket.socket(fileno=each) for each in (fd, sibling) if each >= 0]
        self._again = list(again)
        self._reserved = socket.socket(fileno=reserved) if reserved >= 0 else None
        self.shared = shared
        if not shared:
            # The process that passes it in may have changed that.  On one that workers share
            # nothing may be set: flags and options are those of the living ones, which may rely on
            # them.  An asyncio server would hang in accept() if it blocked.
            self.socket.setblocking(False)
        self.index = index
        self.settings = settings
        #: How many may wait at each of the two, where it is to listen again.
        self._backlogs = [settings.backlog or socket.SOMAXCONN] * 2
        #: How often each of the two has come into its SO_REUSEPORT group again.
        self.joined = [0, 0]
        #: Whether each of the two was made for the generation that accepts there, and for no other.
        self.is_fresh = [False, False]
        #: To which new clients come, None where that is not known; and those with a mark.
        self._steered: tuple[int | None, Mapping[reuseport.Mark, int]] = None, _NO_MARKS
        self._second: socket.socket | None = None  # of the two in the group, when that was told
        self._last = 1  # which socket was the last to listen, as far as we know
        #: It gets no clients any more: it was shut down, and cannot be bound again.
        self.lost = False
        #: It tells of clients whether there are any or not, so it should not be polled.
        self.always_readable = False

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def port(self) -> int:
        """That of its address: a socket that was shut down may have another one."""
        return _bound_to(self.settings.address)[1]

    @property
    def local_address(self) -> tuple[str, int]:
        """Where a process of this machine reaches it; of a UNIX socket path or @name, and 0."""
        if self.socket.family == socket.AF_UNIX:
            return self.settings.address.removeprefix("unix:"), 0
        host, port = _bound_to(self.settings.address)
        if host == "::" and self.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            return "::1", port
        return ("127.0.0.1" if host in ("0.0.0.0", "::") else host), port

    @property
    def path(self) -> str:
        """The path that leads to one of its sockets, each with a file of its own; "" if none can.

        See socket_file.py.
        """
        address = self.settings.address
        ours = self.shared and self.settings.inode and not (self.settings.foreign or self.lost)
        path = address.removeprefix("unix:") if ours else ""
        return path if path and socket_file.has_room(path) else ""

    def address_of(self, socket_number: int) -> tuple[str, int]:
        """Return where a process of this machine reaches one of its sockets, if only by a mark."""
        if self.path and self.has_sibling:
            return socket_file.own_file(self.path, self.socket_for(socket_number)), 0
        return self.local_address

    @property
    def has_sibling(self) -> bool:
        """Whether there are two sockets, so that two generations have one each."""
        return len(self.sockets) == 2

    def socket_for(self, socket_number: int) -> socket.socket:
        """Socket 0 or 1; both are the same one where it has no sibling."""
        return self.sockets[socket_number % len(self.sockets)]

    def swap(self) -> None:
        """Exchange sockets 0 and 1, if there are two; before any generation has one."""
        self.sockets.reverse()
        self._last = 1 - self._last

    @property
    def blocks(self) -> bool:
        """Whether accept() waits, for all processes that have it: each of them can change that."""
        return os.get_blocking(self.fileno())

    @property
    def listens(self) -> bool:
        """Whether it was not shut down yet."""
        return _listens(self.socket)

    def descriptors(self) -> dict[str, int]:
        """Return what an adopter needs, by name.  A name stands for one descriptor for ever."""
        first, second = [*self.sockets, None][:2]
        kinds = (inherited.LISTENER, inherited.SIBLING, inherited.RESERVED)
        return {
            f"{kind}{self.index}{f'.{again}' if again else ''}": each.fileno()
            for kind, each, again in zip(
                kinds, (first, second, self._reserved), self._again, strict=True
            )
            if each is not None
        }

    # -- one that was shut down ---------------------------------------------

    def is_alive(self, socket_number: int = 0) -> bool:
        """Whether clients can come to a socket, where it was bound."""
        one = self.socket_for(socket_number)
        if not _listens(one):
            return False
        if one.family == socket.AF_UNIX:
            return not events_of(one, _CLIENT_OR_END) & (select.POLLRDHUP | select.POLLHUP)
        return bool(one.getsockname()[1] == self.port)

    @property
    def hangs_up(self) -> bool:
        """Whether it is a UNIX one that was shut down: readable for ever, without a client."""
        return self.socket.family == socket.AF_UNIX and not self.is_alive()

    def is_sound(self, socket_number: int) -> bool:
        """Whether accepted clients can be spoken with: not where it was shut down twice before."""
        one = self.socket_for(socket_number)
        if one.family == socket.AF_UNIX:
            return True
        try:
            found = sock_diag.listening(one.family, self.port)
        except OSError:
            return True  # as far as can be told
        return not found.get(os.fstat(one.fileno()).st_ino, 0)

    def note(self) -> None:
        """Remember how many may wait: a worker that listens says it, and so should we then."""
        for number, one in enumerate(self.sockets):
            if one.family != socket.AF_UNIX and self.is_alive(number):
                with suppress(OSError):  # the one before will do
                    self._backlogs[number] = reuseport.backlog(one)

    def listen_again(self, socket_number: int) -> bool:
        """Have a socket listen again that was shut down; False where it does not.

        That of a UNIX address says that it does, and refuses every client; one that was bound
        as port 0 comes back on another port.
        """
        one = self.socket_for(socket_number)
        if one.family == socket.AF_UNIX:
            return False
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
            _shut_down(one)
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

    def renew(self, socket_number: int) -> bool:
        """Make another socket for a generation that is yet to start, and gets no clients yet.

        So it shares its socket with no generation before it.  Where clients come to the one that
        there is, or wait there, it stays.  Returns whether there is another.  Raises OSError.
        """
        self.is_fresh[socket_number % 2] = self._renew(socket_number)
        return self.is_fresh[socket_number % 2]

    def _renew(self, socket_number: int) -> bool:
        if not self.path:
            return False
        if self.has_sibling:
            one = self.socket_for(socket_number)
            if socket_file.leads_to(self.path, one) or self.has_waiting(socket_number):
                return False
            self.bind_anew(socket_number)
            return True
        there = self.socket
        socket_file.keep_file(self.path, there)
        made = self._bind_file(there)
        self.sockets = [made, there] if socket_number == 0 else [there, made]
        self._backlogs = [self._backlogs[0]] * 2
        # A name stands for one descriptor for ever.
        self._again[1] += 1
        if socket_number == 0:
            self._again[0] += 1
        return True

    def bind_anew(self, socket_number: int) -> None:
        """Have another socket in the place of one that is of no use any more.  Raises OSError.

        Workers that have that one do not have this one.
        """
        if self.settings.foreign:
            raise OSError(errno.EPERM, "it was passed in, and is not ours")
        self.joined[socket_number % 2] += 1
        number = socket_number % len(self.sockets)
        one = self.socket_for(socket_number)
        if self.path and self.has_sibling:
            made = self._bind_file(one)
            with on_error(made.close), on_error(socket_file.forget, self.path, made):
                if socket_file.leads_to(self.path, one):
                    socket_file.lead_to(self.path, made, self.sockets)
            socket_file.forget(self.path, one)
        elif one.family == socket.AF_UNIX:
            made = self._bind_path()
        else:
            self._end_silence()
            _shut_down(one)  # else it would go on in the group as long as a process has a copy
            made = self._bind_port(socket_number)
        made.setblocking(os.get_blocking(one.fileno()))
        if not (self.path and self.has_sibling):  # else workers may still accept from it
            _shut_down(one)
        one.close()
        self.sockets[number] = made
        self._again[number] += 1

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

    def go_on_without(self, socket_number: int) -> None:
        """Have the sibling alone, under both numbers."""
        number = socket_number % 2
        if self.path:
            socket_file.forget(self.path, self.sockets[number])
        else:
            self._end_silence()
        one = self.sockets.pop(number)
        del self._backlogs[number]
        _shut_down(one)
        one.close()
        if number == 0:  # a name stands for one descriptor for ever
            self._again[0] += 1

    def steer(
        self,
        socket_number: int,
        marked: Mapping[reuseport.Mark, int] = _NO_MARKS,
        *,
        held: bool = False,
    ) -> None:
        """Have new clients come to socket 0 or 1, or where held get no answer.

        marked: and those with a mark to a socket of their own.  As long as there are any, what
        would come to a socket that is shut down gets no answer either: the third one, the last
        member, takes its position then.  Raises OSError.
        """
        if self.path:
            to = self.reserve() if held else self.socket_for(socket_number)
            socket_file.lead_to(self.path, to, self._all)
            return
        if not (self.has_sibling or held or self._silent):
            return  # all come to the one there is
        for each in self.sockets:  # one without it takes all new clients, where it stands first
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if silent := self._silent:
            last = self._order()[-1]
            if last is not silent or not all(_listens(each) for each in self.sockets):
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

    def _steer_to(self, to: socket.socket, marked: Mapping[reuseport.Mark, int]) -> None:
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
        return not self.path and self.can_be_held and any(self._again) and self._reserved is None

    def can_do_without(self, one: socket.socket) -> bool:
        """Whether one that keeps clients out may be given up: nothing is lost by that.

        There is a spare; or no client reaches it, because it is bound to a device that is gone.
        """
        if not self.can_be_held:
            return False
        with suppress(OSError):
            self.reserve()
            return True
        return reuseport.device_is_gone(one)

    # -- during a hold -------------------------------------------------------------

    @property
    def can_be_held(self) -> bool:
        """Whether clients can be left without an answer, though workers accept."""
        if self.socket.family == socket.AF_UNIX:
            return bool(self.path) and self.has_sibling
        return self.shared and not self.settings.foreign and not self.lost

    def reserve(self) -> socket.socket:
        """Have the third socket, which takes the rights to bind the address.  Raises OSError."""
        if self._reserved is None and self.path:
            self._reserved = self._bind_file(self.socket)
        if self._reserved is None:
            there = (each for n, each in enumerate(self.sockets) if self.is_alive(n))
            one = next(there, self.socket)
            self._reserved = reuseport.reserve(one, one.getsockname())
        return self._reserved

    @property
    def _silent(self) -> socket.socket | None:
        """The third one while it is in the group, always as the last to listen of it."""
        return self._reserved if self._reserved and _listens(self._reserved) else None

    def _silence(self) -> socket.socket:
        if not self._silent:
            reuseport.silence(self.reserve())
        return self.reserve()

    def _end_silence(self) -> None:
        """Have it leave the group: others that listen again would come to stand before it."""
        if self._silent:
            _shut_down(self._silent)

    @property
    def is_reserved_for_clients(self) -> bool:
        """Whether clients may wait at the socket to which they came during a hold."""
        return bool(self.path) and self._reserved is not None

    def adopt_reserved(self, socket_number: int) -> None:
        """Give a socket at which clients have waited during a hold to the next generation.

        socket_number: where that is to accept; if clients wait there, they come first.
        """
        if self._reserved is None or self.has_waiting(socket_number):
            return
        number = socket_number % len(self.sockets)
        before = self.sockets[number]
        if socket_file.leads_to(self.path, before):
            socket_file.lead_to(self.path, self._reserved, self.sockets)
        socket_file.forget(self.path, before)
        before.close()
        self.sockets[number], self._reserved = self._reserved, None
        self.joined[number] += 1
        self._again[number] += 1
        self._again[2] += 1

    def close_reserved(self) -> None:
        """Let go of the third socket."""
        if self._reserved is not None:
            if self.path:
                socket_file.forget(self.path, self._reserved)
            self._end_silence()  # a copy may be kept elsewhere
            self._reserved.close()
            self._reserved = None

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

    def _bind_file(self, like: socket.socket) -> socket.socket:
        """Return another socket of our path, which no client reaches yet.  Raises OSError."""
        rights = socket_file.rights_of(self.path)
        made = socket_file.bind(self.path, self._backlogs[0], rights, _chown)
        made.setblocking(os.get_blocking(like.fileno()))
        return made

    def _bind_path(self) -> socket.socket:
        """Bind a socket file in the place of ours.  Raises OSError."""
        path = self.settings.address.removeprefix("unix:")
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with on_error(made.close):
            if not self.settings.inode:
                made.bind("\0" + path[1:])  # which fails as long as a process has the old one
                made.listen(self._backlogs[0])
                return made
            with locked(path, 0.0):
                old = os.lstat(path)
                if not _is_file_of(self.settings, old):
                    raise OSError(errno.EEXIST, "somebody has put another file in its place")
                # Under another name until it listens: a client always finds one of the two.
                beside = f"{os.path.dirname(path)}/.{os.urandom(2).hex()}"
                if len(os.fsencode(beside)) > socket_file.LONGEST_PATH:
                    os.unlink(path)
                    beside = path
                before = os.umask(0o777 & ~old.st_mode)
                try:
                    made.bind(beside)
                finally:
                    os.umask(before)
                with on_error(os.unlink, beside):
                    uid = -1 if old.st_uid == os.geteuid() else old.st_uid
                    gid = -1 if old.st_gid == os.lstat(beside).st_gid else old.st_gid
                    found = give(beside, uid, gid, _chown)
                    made.listen(self._backlogs[0])
                    os.rename(beside, path)
        self.settings = replace(self.settings, device=found.st_dev, inode=found.st_ino)
        return made

    def let_in(self) -> None:
        """Have no generation begin on a socket, common to it and others, that lets no client in.

        Time-outs and the like are those of the living; what is passed in is its owner's; and a
        filter that is locked cannot be taken away.
        """
        if self.settings.foreign or self.socket.family == socket.AF_UNIX:
            return
        with suppress(OSError):
            reuseport.let_in(self.socket)

    # -- the end -------------------------------------------------------------------

    def claim(self) -> None:
        """Listen once more: clients of a UNIX socket see the process that did it last."""
        for each in self.sockets if self.settings.backlog else ():
            each.listen(self.settings.backlog)

    def refuse_new(self) -> bool:
        """Refuse new clients; those that have connected can still be accepted.

        Returns whether that could be had: else new ones come until it is closed, and after that,
        where its owner has passed it in and goes on listening.
        """
        if self.settings.foreign:
            return False
        if self.socket.family == socket.AF_UNIX:
            self._remove_files()
            if not self.shared:
                self.socket.shutdown(socket.SHUT_RD)
                self.always_readable = True
            return True  # or they would have to know it by another name
        try:
            for each in self.sockets:
                reuseport.refuse_new(each)
        except OSError:
            return False  # optmem_max, or a filter that is locked
        return True

    def close(self) -> None:
        """Stop listening.  shutdown(), because a copy of the descriptor may live elsewhere.

        One that workers share ends with the last of them.
        """
        self._remove_files()
        if not self.settings.foreign and not self.shared:
            _shut_down(self.socket)
        self.close_reserved()
        for each in self.sockets:
            each.close()

    def leave(self, socket_number: int) -> str:
        """Close our copies alone: the fd store has a socket for the next start.

        socket_number: of two, the one to which new clients come.  Returns its name there, ""
        where there is none: then it is closed.
        """
        if self.settings.foreign or not self.is_alive(socket_number):
            self.close()
            return ""
        kept = self.socket_for(socket_number)
        if self.path:
            with suppress(OSError):
                self.steer(socket_number)
        self.close_reserved()
        name = next(name for name, fd in self.descriptors().items() if fd == kept.fileno())
        for each in self.sockets:
            if each is not kept:
                if self.path:
                    socket_file.forget(self.path, each)
                _shut_down(each)  # a process with a copy would get clients that it never accepts
            each.close()
        return name

    @property
    def _all(self) -> list[socket.socket]:
        return [*self.sockets, *((self._reserved,) if self._reserved else ())]

    def _remove_files(self) -> None:
        if self.path:
            socket_file.remove(self.path, self._all)
        remove_file(self.settings)

    def has_waiting(self, socket_number: int | None = None) -> bool:
        """Whether a client has connected and was not accepted yet; socket_number: only there."""
        asked = self.sockets if socket_number is None else (self.socket_for(socket_number),)
        return any(events_of(each, _CLIENT_OR_END) == select.POLLIN for each in asked)

    @property  # the last one: behind it `socket` is no module to a type checker
    def socket(self) -> socket.socket:
        """Socket 0."""
        return self.sockets[0]


def remove_file(settings: ListenerSettings) -> None:
    """Remove the socket file of a listener, if it has one, unless it was replaced by another."""
    if not settings.inode:
        return
    path = settings.address.removeprefix("unix:")
    with suppress(OSError):  # removed already, or the folder is no longer ours: said at start
        if _is_file_of(settings, os.lstat(path)):
            os.unlink(path)


def _is_file_of(settings: ListenerSettings, found: os.stat_result) -> bool:
    return (found.st_dev, found.st_ino) == (settings.device, settings.inode)


def _bound_to(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    return host.strip("[]"), int(port)


def _chown(fd: int, uid: int, gid: int) -> None:
    os.chown(f"/proc/self/fd/{fd}", uid, gid)  # ctypes, which needs no /proc, costs memory


def _listens(one: socket.socket) -> bool:
    return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _shut_down(one: socket.socket) -> None:
    with suppress(OSError):  # it is already
        one.shutdown(socket.SHUT_RDWR)
