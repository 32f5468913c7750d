"""The sockets of a UNIX address: one, or one for each generation, to one of which the path leads.

The files: socket_file.py.

Source: unix(7).
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Mapping
from contextlib import suppress

from ..model.lazy_dataclass import replace
from . import bpf, socket_file
from .cleanup import on_error
from .dir_lock import give, locked
from .listener import (
    CLIENT_OR_END,
    NO_MARKS,
    Listener,
    has_client,
    is_file_of,
    is_listening,
    remove_file,
    shut_down,
)
from .polling import events_of


class UnixListener(Listener):
    """A path or abstract name."""

    #: Of the files of its path, which others may remove.
    _rights: socket_file.Rights | None = None
    #: Sockets 0 and 1: whether the path led elsewhere at a moment at which no client waited there.
    _left_empty = (False, False)

    @property
    def local_address(self) -> tuple[str, int]:
        """Its path or @name, and 0."""
        return self.settings.address.removeprefix("unix:"), 0

    @property
    def path(self) -> str:
        """The path that leads to one of its sockets, each with a file of its own; "" if none can.

        See socket_file.py.
        """
        return "" if self.lost else self._path

    @property
    def _path(self) -> str:
        """The same, also where no client comes any more."""
        ours = self.shared and self.settings.inode and not self.settings.foreign
        path, _ = self.local_address if ours else ("", 0)
        return path if path and socket_file.has_room(path) else ""

    def address_of(self, socket_number: int) -> tuple[str, int]:
        """Return where a process of this machine reaches one of its sockets."""
        if self.path and self.has_sibling:
            return socket_file.own_file(self.path, self.socket_for(socket_number)), 0
        return self.local_address

    # -- a socket that was shut down ----------------------------------------

    def is_alive(self, socket_number: int = 0) -> bool:
        """Whether clients can come to a socket, where it was bound."""
        one = self.socket_for(socket_number)
        hung_up = events_of(one, CLIENT_OR_END) & (select.POLLRDHUP | select.POLLHUP)
        return is_listening(one) and not hung_up

    def can_be_led_to(self, socket_number: int) -> bool:
        """Whether clients of its path can come to a socket: others may have removed its file."""
        if not (self.path and self.has_sibling):
            return True
        return socket_file.has_file(self.path, self.socket_for(socket_number))

    def is_passed_by(self, socket_number: int) -> bool:
        """Whether clients can come to a socket to which its path leads no more.

        As where its file is mounted elsewhere: a mount stays at the file that it was made of.
        """
        if not (self.path and self.has_sibling and self._left_empty[socket_number % 2]):
            return False
        return not socket_file.leads_to(self.path, self.socket_for(socket_number))

    def note(self) -> None:
        """Remember where no client waits as the path leads elsewhere: later ones pass it by."""
        if self.path and self.has_sibling:
            with suppress(OSError):
                there = [socket_file.leads_to(self.path, each) for each in self.sockets]
                before = zip(self.sockets, there, self._left_empty, strict=True)
                first, second = (
                    not leads and (was or not has_client(one)) for one, leads, was in before
                )
                self._left_empty = first, second

    @property
    def hangs_up(self) -> bool:
        """Whether it was shut down: readable for ever, without a client."""
        return not self.is_alive()

    def is_sound(self, socket_number: int) -> bool:
        """Whether accepted clients can be spoken with: they always can."""
        return True

    def listen_again(self, socket_number: int) -> bool:
        """Return False: the kernel says that it listens, and refuses every client."""
        return False

    # -- where the path leads ---------------------------------------------------

    def steer(
        self,
        socket_number: int,
        marked: Mapping[bpf.Mark, int] = NO_MARKS,
        *,
        held: bool = False,
    ) -> None:
        """Route new clients to socket 0 or 1; if held, to a socket that no worker has.

        marked: unused, because each UNIX socket has an address of its own.  Raises OSError.
        """
        if self.path:
            to = self.reserve() if held else self.socket_for(socket_number)
            if not self.has_sibling and not socket_file.has_file(self.path, to):
                return  # others have removed the file of the only one: nothing can lead to it
            socket_file.lead_to(self.path, to, self._all)
            self._rights = socket_file.rights_of(self.path)

    def _steer_last(self, socket_number: int) -> None:
        self.steer(socket_number)

    def renew(self, socket_number: int) -> bool:
        """Make another socket for a generation that is yet to start, and gets no clients yet.

        The generation then shares its socket with no earlier generation.  A socket stays if the
        path leads to it or clients wait there.  Returns whether a socket was made.  Raises
        OSError.
        """
        is_new = self.is_fresh[socket_number % 2] = self._renew(socket_number)
        if is_new and not self.settings.beside:
            self.settings = replace(self.settings, beside=True)
        return is_new

    def _renew(self, socket_number: int) -> bool:
        if not self.path:
            return False
        if self.has_sibling:
            one = self.socket_for(socket_number)
            if socket_file.leads_to(self.path, one) or self.has_waiting(socket_number):
                return False
            socket_file.found_at(self.path, self._all)  # before a release starts for nothing
            self.bind_anew(socket_number)
            return True
        there = self.socket
        socket_file.keep_file(self.path, there)
        self._add_sibling(socket_number, self._bind_file(there))
        return True

    def _add_sibling(self, socket_number: int, made: socket.socket) -> None:
        there = self.socket
        self.sockets = [made, there] if socket_number == 0 else [there, made]
        self._left_empty = (False, False)
        self._backlogs = [self._backlogs[0]] * 2
        # A name stands for one descriptor for ever.
        self._again[1] += 1
        if socket_number == 0:
            self._again[0] += 1

    def _replace(self, socket_number: int, made: socket.socket) -> None:
        super()._replace(socket_number, made)
        self._left_empty = (False, False)

    def _made_anew(self, socket_number: int) -> socket.socket:
        one = self.socket_for(socket_number)
        if not self.path:
            made = self._bind_path()
            shut_down(one)
            return made
        made = self._bind_file(one)
        with on_error(made.close), on_error(socket_file.forget, self.path, made):
            if socket_file.leads_to(self.path, one):
                socket_file.lead_to(self.path, made, self.sockets)
        if not self.has_sibling:  # else workers may still accept from it
            shut_down(one)
        return made

    def _withdraw(self, one: socket.socket) -> None:
        """Keep new clients from a socket; its workers can still accept waiting clients."""
        if self.path:
            socket_file.forget(self.path, one)

    # -- during a hold -------------------------------------------------------------

    @property
    def can_be_held(self) -> bool:
        """Whether clients can be left without an answer, though workers accept."""
        return bool(self.path) and self.has_sibling

    def reserve(self) -> socket.socket:
        """Return the third socket, at which clients wait.  Raises OSError."""
        if self._reserved is not None and self._is_lost(self._reserved):
            self._reserved.close()
            self._reserved = None
            self._again[2] += 1
        if self._reserved is None:
            self._reserved = self._bind_file(self.socket)
        return self._reserved

    def _is_lost(self, one: socket.socket) -> bool:
        """Whether no client can come to a socket any more, and none waits there."""
        return not (socket_file.has_file(self.path, one) or has_client(one))

    @property
    def is_reserved_for_clients(self) -> bool:
        """Whether clients may wait at the socket to which they came during a hold."""
        return bool(self.path) and self._reserved is not None

    @property
    def has_held_client(self) -> bool:
        """Whether one waits there."""
        held = self._reserved if self.path else None
        return held is not None and has_client(held)

    def adopt_reserved(self, socket_number: int) -> None:
        """Give a socket at which clients have waited during a hold to the next generation.

        socket_number: where that is to accept; if clients wait there, they come first.
        """
        if self._reserved is None or (self.has_sibling and self.has_waiting(socket_number)):
            return
        if not self.has_sibling:  # lost during the hold
            self._add_sibling(socket_number, self._reserved)
            self._reserved = None
            self._again[2] += 1
            self.is_fresh[socket_number % 2] = True
            return
        one = self.socket_for(socket_number)
        if socket_file.leads_to(self.path, one):
            socket_file.lead_to(self.path, self._reserved, self.sockets)
            if self.has_waiting(socket_number):  # until then one could come
                socket_file.lead_to(self.path, one, self._all)
                return
        self.joined[socket_number % 2] += 1
        self._replace(socket_number, self._reserved)
        self._reserved = None
        self._again[2] += 1
        self.is_fresh[socket_number % 2] = True

    # -- files ---------------------------------------------------------------------

    def _bind_file(self, like: socket.socket) -> socket.socket:
        """Return another socket of our path, which no client reaches yet.  Raises OSError."""
        with suppress(FileNotFoundError):
            self._rights = socket_file.rights_of(self.path)
        if self._rights is None:
            raise FileNotFoundError(errno.ENOENT, "its file was removed", self.path)
        try:
            made = socket_file.bind(self.path, self._backlogs[0], self._rights, _chown)
        except OSError as error:
            error.filename = os.path.dirname(self.path)
            raise
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
                if not is_file_of(self.settings, old):
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

    def refuse_new(self) -> bool:
        """Refuse new clients; clients that have connected can still be accepted.

        Returns whether that is possible: not if the socket's owner passed it in.
        """
        if self.settings.foreign:
            return False
        self.remove_files()
        if not self.shared:
            self.socket.shutdown(socket.SHUT_RD)
            self.always_readable = True
        return True  # or they would have to know it by another name

    @property
    def _all(self) -> list[socket.socket]:
        return [*self.sockets, *((self._reserved,) if self._reserved else ())]

    def remove_files(self) -> None:
        """Remove the path, and the file of each socket, if they are ours."""
        if self._path:
            socket_file.remove(self._path, self._all)
        # Also where no file is beside it, because then the kernel has to say whose the path is.
        if not (self._path and self.settings.beside):
            remove_file(self.settings)


def _chown(fd: int, uid: int, gid: int) -> None:
    os.chown(f"/proc/self/fd/{fd}", uid, gid)  # ctypes, which needs no /proc, costs memory
