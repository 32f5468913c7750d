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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from ..model.settings import ListenerSettings
from . import inherited, reuseport
from .cleanup import on_error
from .dir_lock import give, locked
from .polling import events_of
from .sock_diag import listening

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
        again: tuple[int, int] = (0, 0),
    ) -> None:
        """Adopt a bound, listening descriptor.  `index` is for life.

        shared: workers have it too, and accept from it: then it is theirs to the end.  sibling:
        another one for the same address (reuseport.py), so that two generations have one each.
        again: how often each of the two was bound anew, which is part of its name.
        """
        #: Socket 0, and where it has a reuseport sibling socket 1.
        self.sockets = [socket.socket(fileno=each) for each in (fd, sibling) if each >= 0]
        self.shared = shared
        if not shared:
            # The process that passes it in may have changed that.  On one that workers share
            # nothing may be set: flags and options are those of the living ones, which may rely on
            # them.  An asyncio server would hang in accept() if it blocked.
            self.socket.setblocking(False)
        self.index = index
        self.settings = settings
        self._again = list(again)
        self._backlog = settings.backlog or socket.SOMAXCONN
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
        """Where a process of this machine reaches it."""
        host, port = _bound_to(self.settings.address)
        if host == "::" and self.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            return "::1", port
        return ("127.0.0.1" if host in ("0.0.0.0", "::") else host), port

    @property
    def has_sibling(self) -> bool:
        """Whether there are two sockets, so that two generations have one each."""
        return len(self.sockets) == 2

    def socket_for(self, socket_number: int) -> socket.socket:
        """Socket 0 or 1; both are the same one where it has no sibling."""
        return self.sockets[socket_number % len(self.sockets)]

    @property
    def blocks(self) -> bool:
        """Whether accept() waits, for all processes that have it: each of them can change that."""
        return os.get_blocking(self.fileno())

    @property
    def listens(self) -> bool:
        """Whether it was not shut down yet."""
        return bool(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def descriptors(self) -> dict[str, int]:
        """Return what an adopter needs, by name.  A name stands for one descriptor for ever."""
        kinds = zip(
            (inherited.LISTENER, inherited.SIBLING), self.sockets, self._again, strict=False
        )
        return {
            f"{kind}{self.index}{f'.{again}' if again else ''}": each.fileno()
            for kind, each, again in kinds
        }

    # -- one that was shut down ---------------------------------------------

    def is_alive(self, socket_number: int = 0) -> bool:
        """Whether clients can come to a socket, where it was bound."""
        one = self.socket_for(socket_number)
        if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
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
            found = listening(one.family, self.port)
        except OSError:
            return True  # as far as can be told
        return not found.get(os.fstat(one.fileno()).st_ino, 0)

    def note(self) -> None:
        """Remember how many may wait: a worker that listens says it, and so should we then."""
        if self.socket.family != socket.AF_UNIX and self.is_alive():
            with suppress(OSError):  # the one before will do
                self._backlog = reuseport.backlog(self.socket)

    def listen_again(self, socket_number: int) -> bool:
        """Have a socket listen again that was shut down; False where it does not.

        That of a UNIX address says that it does, and refuses every client; one that was bound
        as port 0 comes back on another port.
        """
        one = self.socket_for(socket_number)
        if one.family == socket.AF_UNIX:
            return False
        try:
            if self.has_sibling and self.is_alive(1 - socket_number):
                # So that no client comes here before it is its turn.
                reuseport.steer_if_can(self.socket_for(1 - socket_number))
            # Shut down twice, it would pass that on to all connections that it accepts, until it
            # is shut down as one that listens.
            one.listen(self._backlog)
            one.shutdown(socket.SHUT_RDWR)
            one.listen(self._backlog)
        except OSError:
            return False
        self._last = socket_number % 2
        if not self.is_alive(socket_number):
            _shut_down(one)
            return False
        return True

    def bind_anew(self, socket_number: int) -> None:
        """Have another socket in the place of one that is of no use any more.  Raises OSError.

        Workers that have that one do not have this one.
        """
        if self.settings.foreign:
            raise OSError(errno.EPERM, "it was passed in, and is not ours")
        number = socket_number % len(self.sockets)
        one, other = self.socket_for(socket_number), self.socket_for(1 - socket_number)
        if one.family == socket.AF_UNIX:
            made = self._bind_path()
        else:
            _shut_down(one)  # else it would go on in the group as long as a process has a copy
            if other is one or other.getsockname()[1] != self.port:
                # Alone, or its sibling has come back on another port.
                made = reuseport.rebind(one, _bound_to(self.settings.address), self._backlog)
            else:
                sibling = reuseport.make(other)
                if sibling is None:
                    raise OSError(errno.EOPNOTSUPP, "the other one waits for data")
                made = sibling
                self._last = socket_number % 2
        made.setblocking(os.get_blocking(one.fileno()))
        _shut_down(one)
        one.close()
        self.sockets[number] = made
        self._again[number] += 1

    def go_on_without(self, socket_number: int) -> None:
        """Have the sibling alone, under both numbers."""
        number = socket_number % 2
        one = self.sockets.pop(number)
        _shut_down(one)
        one.close()
        if number == 0:  # a name stands for one descriptor for ever
            self._again[0] += 1

    def steer(self, socket_number: int, question: tuple[reuseport.Mark, int] | None = None) -> None:
        """Have new clients come to socket 0 or 1, and those with a mark maybe to another one.

        Raises OSError.
        """
        member, failed = self._member(socket_number), OSError(errno.ENOTCONN, "it does not listen")
        marked = (question[0], self._member(question[1])) if question is not None else None
        for each in self.sockets:  # one without it takes all new clients, where it stands first
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for number in (0, 1):  # a worker may have locked the filters of its own
            if self.is_alive(number):
                try:
                    reuseport.steer(self.socket_for(number), member, marked)
                except OSError as error:
                    failed = error
                else:
                    return
        raise failed

    @property
    def dropping(self) -> int | None:
        """Which socket leaves new clients without an answer."""
        found = (n for n, each in enumerate(self.sockets) if reuseport.drops_new(each))
        return next(found, None)

    def drop_new(self, socket_number: int) -> None:
        """Have a socket at which no handshake is under way leave new clients without an answer.

        Raises OSError.
        """
        reuseport.drop_new(self.socket_for(socket_number))

    def answer_new(self) -> None:
        """Undo that.  Raises OSError."""
        for each in self.sockets:
            reuseport.answer_new(each)

    def _member(self, socket_number: int) -> int:
        """Return which member of the group a socket is.  Raises OSError where that is unknown."""
        inodes = [os.fstat(each.fileno()).st_ino for each in self.sockets]
        try:
            found = listening(self.socket.family, self.port)
            ours = [each for each in found if each in inodes]
        except OSError as error:
            if error.errno in SCARCE:
                raise  # an earlier program may have known better than we do
            ours = inodes if self._last else inodes[::-1]  # sock_diag is not there
        wanted = inodes[socket_number % 2]
        return ours.index(wanted) if wanted in ours else 0

    def _bind_path(self) -> socket.socket:
        """Bind a socket file in the place of ours.  Raises OSError."""
        path = self.settings.address.removeprefix("unix:")
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with on_error(made.close):
            if not self.settings.inode:
                made.bind("\0" + path[1:])  # which fails as long as a process has the old one
                made.listen(self._backlog)
                return made
            with locked(path, 0.0):
                old = os.lstat(path)
                if not _is_file_of(self.settings, old):
                    raise OSError(errno.EEXIST, "somebody has put another file in its place")
                os.unlink(path)
                before = os.umask(0o777 & ~old.st_mode)
                try:
                    made.bind(path)
                finally:
                    os.umask(before)
                uid = -1 if old.st_uid == os.geteuid() else old.st_uid
                gid = -1 if old.st_gid == os.lstat(path).st_gid else old.st_gid
                found = give(path, uid, gid, _chown)
                made.listen(self._backlog)
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
        if self.settings.backlog:
            self.socket.listen(self.settings.backlog)

    def refuse_new(self) -> bool:
        """Refuse new clients; those that have connected can still be accepted.

        Returns whether that could be had: else new ones come until it is closed, and after that,
        where its owner has passed it in and goes on listening.
        """
        if self.settings.foreign:
            return False
        if self.socket.family == socket.AF_UNIX:
            remove_file(self.settings)
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
        remove_file(self.settings)
        if not self.settings.foreign and not self.shared:
            _shut_down(self.socket)
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
        name = next(name for name, fd in self.descriptors().items() if fd == kept.fileno())
        for each in self.sockets:
            if each is not kept:
                _shut_down(each)  # a process with a copy would get clients that it never accepts
            each.close()
        return name

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


def _shut_down(one: socket.socket) -> None:
    with suppress(OSError):  # it is already
        one.shutdown(socket.SHUT_RDWR)
