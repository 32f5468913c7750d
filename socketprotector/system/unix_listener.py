"""The sockets of a UNIX address: one, or one for each of two generations, and its path's target.

Their files: socket_file.py.

Source: unix(7).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from ..model.lazy_dataclass import replace
from ..model.settings import ListenerSettings
from . import bpf, path_group, sock_diag, socket_file
from .cleanup import on_error
from .dir_lock import give, locked
from .listener import (
    CLIENT_OR_END,
    NO_MARKS,
    Listener,
    has_client,
    is_listening,
    shut_down,
)
from .polling import events_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .path_group import PathGroup, Plan, Step


class UnixListener(Listener):
    """The listener of a path or abstract name."""

    #: A socket that has no place yet.
    _made: socket.socket | None = None
    #: The value of its path at the last look.
    _known: PathGroup | None = None

    @property
    def local_address(self) -> tuple[str, int]:
        """Its path or @name, and 0."""
        return self.settings.address.removeprefix("unix:"), 0

    @property
    def path(self) -> str:
        """The path, if each socket can have a file of its own beside it; otherwise "".

        See socket_file.py.
        """
        return "" if self.lost else self._path

    @property
    def _path(self) -> str:
        """The listener's path, even if the listener is lost."""
        ours = self.shared and self.settings.inode and not self.settings.foreign
        path, _ = self.local_address if ours else ("", 0)
        return path if path and socket_file.has_room(path) else ""

    def ensure_address(self, socket_number: int) -> tuple[str, int]:
        """Return the address at which local processes reach one of its sockets.

        Make the socket's file again if another program has removed it and the path leads there.
        """
        if self.path and self.has_sibling:
            with suppress(OSError):  # a connection to the address then fails
                self._carry_out(self._look().keep())
            return socket_file.own_file(self.path, self.socket_for(socket_number)), 0
        return self.local_address

    def identity(self, socket_number: int) -> tuple[int, int]:
        """Return device and inode of a socket's own file.  Raises OSError if it is not ours."""
        if self.path and self.has_sibling:
            return socket_file.identity_of(self.path, self.socket_for(socket_number))
        return super().identity(socket_number)

    # -- a socket that was shut down ----------------------------------------

    def is_alive(self, socket_number: int = 0) -> bool:
        """Return whether clients can connect to a socket at its address."""
        sock = self.socket_for(socket_number)
        hung_up = events_of(sock, CLIENT_OR_END) & (select.POLLRDHUP | select.POLLHUP)
        return is_listening(sock) and not hung_up

    @property
    def is_cut_off(self) -> bool:
        """Whether no client can connect any more, because another program has removed its files."""
        if not self.settings.inode or self.settings.foreign or self.always_readable:
            return False
        if self.path:
            return self._says(lambda group: group.is_cut_off)
        try:  # not lstat(): clients follow a link to our file
            found = os.stat(self.local_address[0])
        except OSError as error:
            return error.errno == errno.ENOENT
        # Not under --handoff listener, where a reload leaves out a listener that is cut off.
        return not self.shared and not is_file_of(self.settings, found)

    @property
    def path_fault(self) -> str:
        """Why no client comes by its path; "" if clients come, or if we cannot know."""
        with suppress(OSError):
            return self._look().fault if self.path else ""
        return ""

    def is_out_of_reach(self, socket_number: int) -> bool:
        """Return whether a socket must be replaced: another program has removed its file."""
        number = socket_number % 2
        return bool(self.path) and self._says(lambda group: group.is_out_of_reach(number))

    def is_passed_by(self, socket_number: int) -> bool:
        """Return whether a socket can get clients although its path no longer leads to it.

        They can if the file is mounted elsewhere, because a mount keeps its original file.
        """
        was_left = self._known is not None and bool(self._known.left_empty)
        return was_left and self._says(lambda group: group.is_passed_by(socket_number % 2))

    def note(self) -> None:
        """Remember the sockets without clients to which the path does not lead.

        Clients that reach such a socket later have not come by the path.
        """
        if self.path and self.has_sibling:
            with suppress(OSError):
                self._known = self._look().noted()

    @property
    def hangs_up(self) -> bool:
        """Whether it was shut down, and so is always readable, even without a client."""
        return not self.is_alive()

    def is_sound(self, socket_number: int) -> bool:
        """Return True: accepted connections always work."""
        return True

    def listen_again(self, socket_number: int) -> bool:
        """Return False, because after a shutdown the kernel refuses all clients."""
        return False

    # -- where the path leads ---------------------------------------------------

    def steer(
        self,
        socket_number: int,
        marked: Mapping[bpf.Mark, int] = NO_MARKS,
        *,
        held: bool = False,
        share: int = 0,
    ) -> None:
        """Steer new clients to socket 0 or 1; if held, to a socket that no worker has.

        marked: unused, because each UNIX socket has an address of its own.  share: unused, because
        a path leads to one socket.  Raises OSError.
        """
        if self.path:
            if held:
                self.reserve()
            self._carry_out(self._examine().steer(socket_number % len(self.sockets), held=held))
            with suppress(FileNotFoundError, PermissionError):
                self.file_rights = socket_file.rights_of(self.path)

    def _steer_last(self, socket_number: int) -> None:
        self.steer(socket_number)

    def renew(self, socket_number: int) -> bool:
        """Make a new socket, without clients yet, for a generation that has not started.

        So that generation shares its socket with no earlier generation.  The old socket stays if
        the path leads to it, or if clients wait there.  Returns whether a socket was made.  Raises
        OSError.
        """
        plan = self._examine().renew(socket_number % 2) if self.path else ()
        self.is_fresh[socket_number % 2] = bool(plan)
        self._carry_out(plan)
        if plan and not self.settings.beside:
            self.settings = replace(self.settings, beside=True)
        return bool(plan)

    def bind_anew(self, socket_number: int) -> None:
        """Replace a broken socket with a new socket, which no worker has yet.  Raises OSError."""
        if not self.path:
            super().bind_anew(socket_number)
            return
        self._carry_out(self._examine().bind_anew(socket_number % len(self.sockets)))

    def _made_anew(self, socket_number: int) -> socket.socket:
        made = self._bind_path()
        shut_down(self.socket_for(socket_number))
        return made

    def _withdraw(self, sock: socket.socket) -> None:
        """Keep new clients from a socket; its workers can still accept waiting clients."""
        if self.path:
            socket_file.forget(self.path, sock)

    # -- during a hold -------------------------------------------------------------

    @property
    def can_be_held(self) -> bool:
        """Whether a hold can leave new clients without an answer while workers accept."""
        return bool(self.path) and self.has_sibling

    def reserve(self) -> socket.socket:
        """Return the third socket, at which clients wait during a hold.  Raises OSError."""
        self._carry_out(self._examine().reserve())
        assert self._reserved is not None
        return self._reserved

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
        number = socket_number % 2
        plan = self._examine().adopt_reserve(number)
        self._carry_out(plan)
        if path_group.Switch(path_group.RESERVE) in plan:
            plan = self._examine().adopt_reserve(number, led=True)
            self._carry_out(plan)
        if path_group.Place(path_group.RESERVE, number) in plan:
            self.is_fresh[number] = True

    def backlog(self, socket_number: int, exclude: Collection[int] = ()) -> tuple[int, int] | None:
        """Return how many clients wait, without those that have disconnected, and how many can."""
        found = super().backlog(socket_number, exclude)
        with suppress(OSError):  # the kernel lists up to about 900 clients
            lines = map(sock_diag.unaccepted, self._sockets_except(exclude))
            left = sum(not client for line in lines for client in line)
            return found and (found[0] - left, found[1])
        return found

    # -- the value of the path -----------------------------------------------------

    def _members(self) -> dict[int, socket.socket]:
        others = {path_group.RESERVE: self._reserved, path_group.MADE: self._made}
        members = dict(enumerate(self.sockets))
        return members | {n: each for n, each in others.items() if each is not None}

    def _look(self) -> PathGroup:
        """Return the value of the path now.  Raises OSError."""
        members = self._members()
        waiting = frozenset(n for n, sock in members.items() if has_client(sock))
        left_empty = frozenset[int]() if self._known is None else self._known.left_empty
        try:
            found = socket_file.look(self._path, members)
        except PermissionError:
            if len(members) > 1:
                raise
            # The folder is closed to us, but not to clients: they still come to the only socket.
            found = path_group.PathGroup(frozenset(members), leads_to=0, path=self._path)
        self._known = replace(found, waiting=waiting, left_empty=left_empty)
        return self._known

    def _says(self, what: Callable[[PathGroup], bool]) -> bool:
        """Return a fact about the path; False if the folder is closed to us."""
        try:
            return what(self._look())
        except OSError:
            return False

    def _examine(self) -> PathGroup:
        """Return the value of the path with the files of closed sockets.  Raises OSError."""
        return socket_file.examine(self.path, self._look())

    def _carry_out(self, plan: Plan) -> None:
        """Carry out a plan; undo what a failed step leaves.  Raises OSError."""
        for at, step in enumerate(plan):
            try:
                self._perform(step)
            except OSError:
                for each in path_group.undo(plan[:at]):
                    self._perform(each)
                raise

    def _perform(self, step: Step) -> None:
        match step:
            case path_group.Bind(number):
                made = self._bind_file()
                if number == path_group.RESERVE:
                    self._reserved = made
                else:
                    self._made = made
            case path_group.ShutDown(number):
                shut_down(self._members()[number])
            case path_group.Close(number):
                self._members()[number].close()
                self._vacate(number)
            case path_group.Place(member, number):
                self._place(self._members()[member], number)
                self._vacate(member)
            case _:
                socket_file.perform(self._path, step, self._members())

    def _vacate(self, member: int) -> None:
        if member == path_group.RESERVE:
            self._reserved = None
            self._again[2] += 1
        elif member == path_group.MADE:
            self._made = None

    def _place(self, made: socket.socket, number: int) -> None:
        """Put a socket in the place of a closed socket, or beside a single socket."""
        # A name must never get another descriptor.
        self._known = None if self._known is None else self._known.replaced()
        if self.sockets[number % len(self.sockets)].fileno() < 0:
            self.sockets[number] = made
            self._again[number] += 1
            return
        there = self.socket
        self.sockets = [made, there] if number == 0 else [there, made]
        self._backlogs = [self._backlogs[0]] * 2
        self._again[1] += 1
        if number == 0:
            self._again[0] += 1

    # -- files ---------------------------------------------------------------------

    def _bind_file(self) -> socket.socket:
        """Return a new socket of our path, which no client reaches yet.  Raises OSError."""
        with suppress(FileNotFoundError):
            self.file_rights = socket_file.rights_of(self.path)
        if self.file_rights is None:
            raise FileNotFoundError(errno.ENOENT, "its file was removed", self.path)
        try:
            made = socket_file.bind(self.path, self._backlogs[0], self.file_rights, _chown)
        except OSError as error:
            error.filename = os.path.dirname(self.path)
            raise
        made.setblocking(os.get_blocking(self.fileno()))
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
                    raise OSError(errno.EEXIST, "another file has replaced it")
                # Use another name until it listens, so that clients always find a listening socket.
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
                    found = give(made, beside, uid, gid, _chown)
                    made.listen(self._backlogs[0])
                    os.rename(beside, path)
        self.settings = replace(self.settings, device=found.st_dev, inode=found.st_ino)
        return made

    def refuse_new(self) -> bool:
        """Refuse new clients; clients that have connected can still be accepted.

        Returns whether that is possible.  It is impossible for a socket that was passed in, and for
        an abstract name whose socket workers have: after shutdown() their accept() would fail.
        """
        if self.settings.foreign:
            return False
        self.remove_files()
        if not self.shared:
            self.socket.shutdown(socket.SHUT_RD)
            self.always_readable = True
        # A shared socket of a path: only clients that know another name still reach it.
        return not self.shared or bool(self.settings.inode)

    def remove_files(self) -> None:
        """Remove the path, and the file of each socket, if they are ours."""
        if self._path:
            socket_file.remove(self._path, self._members().values())
        # Without files beside the path, only device and inode show that the path is ours.
        if not (self._path and self.settings.beside):
            remove_file(self.settings)


def remove_file(settings: ListenerSettings) -> None:
    """Remove the socket file of a listener, unless another file has replaced it."""
    if not settings.inode:
        return
    path = settings.address.removeprefix("unix:")
    with suppress(OSError):  # removed already, or no write access, which was reported at the start
        if is_file_of(settings, os.lstat(path)):
            os.unlink(path)


def close_control(listener: Listener) -> None:
    """Close a control socket, and remove its file.

    A protector that has changed its user cannot remove the file from root's folder.  Then this
    removes the file's read permissions: control_path.sockets() leaves out such a file, because its
    protector has not crashed.  (connect() needs only write permission.)  Do this while the socket
    listens: later, another protector may replace the file.
    """
    listener.remove_files()
    path = listener.settings.address.removeprefix("unix:")
    with suppress(OSError):  # removed
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if is_file_of(listener.settings, found := os.fstat(fd)):
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(found.st_mode) & ~0o444)
        finally:
            os.close(fd)
    listener.close()


def is_file_of(settings: ListenerSettings, found: os.stat_result) -> bool:
    """Return whether a listener made this file."""
    return (found.st_dev, found.st_ino) == (settings.device, settings.inode)


def _chown(fd: int, uid: int, gid: int) -> None:
    os.chown(f"/proc/self/fd/{fd}", uid, gid)  # through /proc, because ctypes costs memory
