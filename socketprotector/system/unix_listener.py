"""The sockets of a UNIX address: one, or one for each generation; the path leads to one of them.

Their files: socket_file.py.

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
    """The listener of a path or abstract name."""

    #: The rights of its path's files, kept because another program may remove the files.
    _rights: socket_file.Rights | None = None
    #: For sockets 0 and 1: whether no client waited there at a moment when the path led elsewhere.
    _left_empty = (False, False)

    @property
    def local_address(self) -> tuple[str, int]:
        """Its path or @name, and 0."""
        return self.settings.address.removeprefix("unix:"), 0

    @property
    def path(self) -> str:
        """The path that leads to one of its sockets, each with its own file; "" if impossible.

        See socket_file.py.
        """
        return "" if self.lost else self._path

    @property
    def _path(self) -> str:
        """The same path, even if the listener is lost."""
        ours = self.shared and self.settings.inode and not self.settings.foreign
        path, _ = self.local_address if ours else ("", 0)
        return path if path and socket_file.has_room(path) else ""

    def address_of(self, socket_number: int) -> tuple[str, int]:
        """Return the address of one of its sockets for processes of this machine."""
        if self.path and self.has_sibling:
            return socket_file.own_file(self.path, self.socket_for(socket_number)), 0
        return self.local_address

    # -- a socket that was shut down ----------------------------------------

    def is_alive(self, socket_number: int = 0) -> bool:
        """Return whether clients can connect to a socket at its address."""
        one = self.socket_for(socket_number)
        hung_up = events_of(one, CLIENT_OR_END) & (select.POLLRDHUP | select.POLLHUP)
        return is_listening(one) and not hung_up

    def can_be_led_to(self, socket_number: int) -> bool:
        """Return whether the path can lead to a socket: another program may remove its file."""
        if not (self.path and self.has_sibling):
            return True
        return socket_file.has_file(self.path, self.socket_for(socket_number))

    def is_passed_by(self, socket_number: int) -> bool:
        """Return whether clients can come to a socket to which its path no longer leads.

        They can if the file is mounted elsewhere, because a mount keeps its original file.
        """
        if not (self.path and self.has_sibling and self._left_empty[socket_number % 2]):
            return False
        return not socket_file.leads_to(self.path, self.socket_for(socket_number))

    def note(self) -> None:
        """Remember the sockets without clients to which the path does not lead.

        Clients that come to such a socket later have not come by the path.
        """
        if self.path and self.has_sibling:
            with suppress(OSError):
                targets = [socket_file.leads_to(self.path, each) for each in self.sockets]
                before = zip(self.sockets, targets, self._left_empty, strict=True)
                first, second = (
                    not leads and (was or not has_client(one)) for one, leads, was in before
                )
                self._left_empty = first, second

    @property
    def hangs_up(self) -> bool:
        """Whether it was shut down: always readable, without a client."""
        return not self.is_alive()

    def is_sound(self, socket_number: int) -> bool:
        """Return True: accepted connections always work."""
        return True

    def listen_again(self, socket_number: int) -> bool:
        """Return False: after a shutdown listen() succeeds, but the kernel refuses all clients."""
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
                return  # another program has removed the only socket's file: no path can lead to it
            socket_file.lead_to(self.path, to, self._all)
            self._rights = socket_file.rights_of(self.path)

    def _steer_last(self, socket_number: int) -> None:
        self.steer(socket_number)

    def renew(self, socket_number: int) -> bool:
        """Make a new socket, without clients yet, for a generation that has not started.

        So that generation shares its socket with no earlier one.  The old socket stays if the
        path leads to it, or if clients wait there.  Returns whether a socket was made.  Raises
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
            socket_file.found_at(self.path, self._all)  # raises before a release starts in vain
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
        # A name must never get another descriptor.
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
        if not self.has_sibling:  # otherwise workers may still accept from it
            shut_down(one)
        return made

    def _withdraw(self, one: socket.socket) -> None:
        """Keep new clients from a socket; its workers can still accept waiting clients."""
        if self.path:
            socket_file.forget(self.path, one)

    # -- during a hold -------------------------------------------------------------

    @property
    def can_be_held(self) -> bool:
        """Whether a hold can leave new clients without an answer, though workers accept."""
        return bool(self.path) and self.has_sibling

    def reserve(self) -> socket.socket:
        """Return the third socket, at which clients wait during a hold.  Raises OSError."""
        if self._reserved is not None and self._is_lost(self._reserved):
            self._reserved.close()
            self._reserved = None
            self._again[2] += 1
        if self._reserved is None:
            self._reserved = self._bind_file(self.socket)
        return self._reserved

    def _is_lost(self, one: socket.socket) -> bool:
        """Return whether no client can come to a socket any more, and none waits there."""
        return not (socket_file.has_file(self.path, one) or has_client(one))

    @property
    def is_reserved_for_clients(self) -> bool:
        """Whether clients of a hold may wait at the third socket."""
        return bool(self.path) and self._reserved is not None

    @property
    def has_held_client(self) -> bool:
        """Whether a client of a hold waits at the third socket."""
        held = self._reserved if self.path else None
        return held is not None and has_client(held)

    def adopt_reserved(self, socket_number: int) -> None:
        """Give the third socket, at which clients of a hold wait, to the next generation.

        socket_number: the socket of that generation; clients that wait there come first.
        """
        if self._reserved is None or (self.has_sibling and self.has_waiting(socket_number)):
            return
        if not self.has_sibling:  # the sibling was lost during the hold
            self._add_sibling(socket_number, self._reserved)
            self._reserved = None
            self._again[2] += 1
            self.is_fresh[socket_number % 2] = True
            return
        one = self.socket_for(socket_number)
        if socket_file.leads_to(self.path, one):
            socket_file.lead_to(self.path, self._reserved, self.sockets)
            if self.has_waiting(socket_number):  # a client has come just before
                socket_file.lead_to(self.path, one, self._all)
                return
        self.joined[socket_number % 2] += 1
        self._replace(socket_number, self._reserved)
        self._reserved = None
        self._again[2] += 1
        self.is_fresh[socket_number % 2] = True

    # -- files ---------------------------------------------------------------------

    def _bind_file(self, like: socket.socket) -> socket.socket:
        """Return a new socket of our path, which no client reaches yet.  Raises OSError."""
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
        """Return a new socket whose file replaces ours at the path.  Raises OSError."""
        path = self.settings.address.removeprefix("unix:")
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with on_error(made.close):
            if not self.settings.inode:
                made.bind("\0" + path[1:])  # fails while a process has the old socket
                made.listen(self._backlogs[0])
                return made
            with locked(path, 0.0):
                old = os.lstat(path)
                if not is_file_of(self.settings, old):
                    raise OSError(errno.EEXIST, "somebody has put another file in its place")
                # Under another name until it listens, so that a client always finds a socket.
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
        return True  # a shared socket: without its path only a client with another name reaches it

    @property
    def _all(self) -> list[socket.socket]:
        return [*self.sockets, *((self._reserved,) if self._reserved else ())]

    def remove_files(self) -> None:
        """Remove the path, and the file of each socket, if they are ours."""
        if self._path:
            socket_file.remove(self._path, self._all)
        # Without files beside the path, only device and inode show that the path is ours.
        if not (self._path and self.settings.beside):
            remove_file(self.settings)


def _chown(fd: int, uid: int, gid: int) -> None:
    os.chown(f"/proc/self/fd/{fd}", uid, gid)  # by /proc, because ctypes costs memory
