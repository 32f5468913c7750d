"""The socket files of a UNIX path from which workers accept: a socket for each generation.

Each socket has its own file beside the path, and the path is a hard link to one of these files.  A
rename makes it a link to another file; at every moment the path leads to a listening socket.

A socket is bound to a temporary name, and its file is renamed at once.  getsockname() still returns
the temporary name.  So a server that removes its socket's file at its exit removes nothing.
Accepted connections have the temporary name, too.

The state has no record of the path's target: files and inodes show it, even if a kill has
interrupted a change.  path_group.py uses that.

Source: unix(7); link(2), rename(2), which replaces a file without a gap.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

from ..model.lazy_dataclass import frozen, replace
from . import path_group
from .cleanup import on_error
from .dir_lock import give
from .sock_diag import file_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .path_group import PathGroup, Step

#: The name of a UNIX socket has 108 bytes, with the terminating zero.
LONGEST_PATH = 107
_TRIES = 16
_OWN = "~"
#: The suffix of the link that is renamed over the path.
_NEW = "new"
#: The name that a socket of a path is bound to, or with `own` the file that it keeps.
_NAME = re.compile(r"(?P<folder>.*/)\.(?P<name>[^/]+)\.sp-[0-9a-f]{6}(?P<own>~?)", re.DOTALL)
_ACL = "system.posix_acl_access"
#: Device and inode of a missing file.
_NONE = (0, 0)

Chown = Callable[[int, int, int], None]
#: The sockets of a path, by their numbers in its value.
Members = Mapping[int, socket.socket]


@frozen
class Rights:
    """The owner, mode and access list of a socket's file."""

    uid: int  # -1: the user that makes the file
    gid: int  # -1: the group that the file gets at first
    mode: int
    acl: bytes | None = None


def path_of(name: str) -> str:
    """Return the path for clients, from the name that one of its sockets is bound to."""
    found = _NAME.fullmatch(name)
    return found["folder"] + found["name"] if found else name


def files_of(name: str) -> list[str]:
    """Return the existing files of a socket, from the name that it is bound to."""
    return [each for each in (name + _OWN, path_of(name)) if os.path.lexists(each)]


def has_room(path: str) -> bool:
    """Return whether the names of files beside a path are short enough to connect to."""
    return len(os.fsencode(_name(path, 0) + _OWN)) <= LONGEST_PATH


def _name(path: str, number: int) -> str:
    return _beside(path, f"{number:06x}")


def _beside(path: str, what: str) -> str:
    folder, name = os.path.split(path)
    return f"{folder.removesuffix('/')}/.{name}.sp-{what}"


def _drawn(path: str) -> str:
    return _name(path, int.from_bytes(os.urandom(3), "big") or 1)


def _bound_as(sock: socket.socket) -> str:
    name = sock.getsockname()
    return os.fsdecode(name) if name else ""


def own_file(path: str, sock: socket.socket) -> str:
    """Return the name of a socket's own file."""
    name = _bound_as(sock)
    # A socket that is bound to the path itself gets its own file only when it loses the path.
    return (_name(path, 0) if name == path else name) + _OWN


def identity_of(path: str, sock: socket.socket) -> tuple[int, int]:
    """Return device and inode of a socket's own file.

    Raises OSError if the file is missing, or belongs to another program.
    """
    found = os.lstat(own_file(path, sock))
    try:
        inode = file_of(sock)
    except OSError:  # without sock_diag
        inode = found.st_ino & 0xFFFFFFFF
    if inode != found.st_ino & 0xFFFFFFFF:
        raise OSError(errno.ESTALE, "another program has replaced the file of its socket")
    return found.st_dev, found.st_ino


def bind(path: str, backlog: int, rights: Rights, chown: Chown) -> socket.socket:
    """Return a new listening socket with its own file beside the path.  Raises OSError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with on_error(made.close):
        bound_as = _bind(made, path, rights.mode)
        with on_error(_unlink, bound_as):
            give(made, bound_as, rights.uid, rights.gid, chown)
            if rights.acl:
                os.setxattr(bound_as, _ACL, rights.acl, follow_symlinks=False)
            made.listen(backlog)
            os.rename(bound_as, bound_as + _OWN)
    return made


def _bind(sock: socket.socket, path: str, mode: int) -> str:
    """Bind a socket to an unused name, and return the name.  Raises OSError."""
    before = os.umask(0o777 & ~mode)
    try:
        for tries_left in reversed(range(_TRIES)):
            name = _drawn(path)
            if os.path.lexists(name + _OWN):
                continue
            try:
                sock.bind(name)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not tries_left:
                    raise
            else:
                return name
    finally:
        os.umask(before)
    raise OSError(errno.EADDRINUSE, "there are too many socket files beside it")


def rights_of(path: str) -> Rights:
    """Return the rights of a path's file, for bind().  Raises OSError."""
    found = os.lstat(path)
    folder = os.lstat(os.path.dirname(path))
    setgid = bool(folder.st_mode & stat.S_ISGID)
    gid = folder.st_gid if setgid else os.getegid()
    acl = None
    with suppress(OSError):  # there is no access list, or the file system has none
        acl = os.getxattr(path, _ACL, follow_symlinks=False)
    # A group without write permission cannot connect, so the group need not be copied.
    matters = os.geteuid() == 0 or found.st_mode & stat.S_IWGRP
    same = found.st_gid == gid or not matters
    return Rights(
        -1 if found.st_uid == os.geteuid() else found.st_uid,
        -1 if same else found.st_gid,
        stat.S_IMODE(found.st_mode),
        acl,
    )


def leads_to(path: str, sock: socket.socket) -> bool:
    """Return whether a path leads to a socket."""
    return _is_file_of(path, sock, _identity(path))


def has_file(path: str, sock: socket.socket) -> bool:
    """Return whether a path can lead to a socket: other programs may remove the socket's file."""
    return look(path, {0: sock}).can_lead_to(0)


def keep_file(path: str, sock: socket.socket) -> None:
    """Give the socket to which the path leads its own file, if it has none.

    An earlier program may have bound the socket to the path itself.  Raises OSError.
    """
    for step in look(path, {0: sock}).keep():
        perform(path, step, {0: sock})


def lead_to(path: str, sock: socket.socket, ours: Iterable[socket.socket]) -> None:
    """Lead a path, and so its new clients, to a socket.

    ours: all sockets of the path.  A file that a closed socket has left at the path is replaced.
    Raises OSError, also if another program's file is at the path.
    """
    members = dict(enumerate([sock, *(each for each in ours if each is not sock)]))
    for step in examine(path, look(path, members)).lead_to(0):
        perform(path, step, members)


def forget(path: str, sock: socket.socket) -> None:
    """Remove the file of a socket that is about to be closed, unless the path leads to it."""
    for step in look(path, {0: sock}).withdraw(0):
        perform(path, step, {0: sock})


def remove(path: str, ours: Iterable[socket.socket]) -> None:
    """Remove the path, unless it is another program's file, and all our files beside it."""
    members = dict(enumerate(ours))
    try:
        group = look(path, members)
    except OSError:
        return  # the folder is closed to us, so we can remove no file there
    with suppress(OSError):
        group = examine(path, group, members)
    for step in group.remove():
        perform(path, step, members)


# -- the value of a path: path_group.py ------------------------------------------------


def look(path: str, members: Members) -> PathGroup:
    """Return the value of a path, as the file system shows it.  Raises OSError."""
    found = _identity(path)
    target = next((n for n, sock in members.items() if _is_file_of(path, sock, found)), None)
    if target is None:
        target = path_group.MISSING if found == _NONE else path_group.OTHER
    return path_group.PathGroup(
        frozenset(members),
        target,
        frozenset(n for n, sock in members.items() if _identity(own_file(path, sock)) != _NONE),
        path=path,
    )


def examine(path: str, group: PathGroup, members: Members | None = None) -> PathGroup:
    """Return the value with the files of closed sockets; look() does not search for them.

    members: search for all files beside the path that belong to none of these; None: search only
    for the files of the socket that the path leads to.  Raises OSError.
    """
    leftovers: list[str] = []
    target = group.leads_to
    if target == path_group.OTHER and (leftovers := _stale_files(path, _identity(path))):
        target = path_group.STALE
    if members is not None:
        own = {own_file(path, sock) for sock in members.values()}
        known = {_identity(each) for each in own}
        for each in left_beside(path):
            if each not in own and (_identity(each) in known or _is_leftover(each)):
                leftovers.append(each)
    return replace(group, leads_to=target, leftovers=tuple(dict.fromkeys(leftovers)))


def remove_leftovers(path: str) -> None:
    """Remove the files beside a path that killed programs have left.

    Files of other programs stay, and files of other users that we cannot remove.  Raises OSError.
    """
    for each in left_beside(path):
        if _is_leftover(each):
            _unlink(each)


def _is_leftover(name: str) -> bool:
    try:
        return is_stale(name)
    except OSError:
        return False  # a process listens there, maybe a worker


def perform(path: str, step: Step, members: Members) -> None:
    """Carry out a step that changes files.  Raises OSError, but ignores a failed removal."""
    match step:
        case path_group.Keep(number):
            os.link(path, own_file(path, members[number]), follow_symlinks=False)
        case path_group.Switch(number):
            _unlink(staged := _beside(path, _NEW))  # a program that was killed here left it
            if os.path.lexists(staged):  # another user's file, in a folder such as /tmp
                staged = _drawn(path) + _OWN
            os.link(own_file(path, members[number]), staged, follow_symlinks=False)
            with on_error(_unlink, staged):
                os.rename(staged, path)
        case path_group.RemovePath():
            _unlink(path)
        case path_group.RemoveStaged():
            _unlink(_beside(path, _NEW))
        case path_group.RemoveFile(number):
            _unlink(own_file(path, members[number]))
        case path_group.RemoveLeftover(name):
            _unlink(name)


def left_beside(path: str) -> Iterator[str]:
    """Yield the files that a killed program may have left beside a path.  Raises OSError."""
    with os.scandir(os.path.dirname(path) or "/") as entries:
        for each in entries:
            found = _NAME.fullmatch(each.path)
            if found and path_of(each.path.removesuffix(_OWN)) == path:
                yield each.path


def is_stale(path: str) -> bool:
    """Return whether a path is a socket file on which no process listens.

    Raises OSError(EADDRINUSE) if a process listens, and OSError(EEXIST) for another kind of file.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        what = "directory" if stat.S_ISDIR(mode) else "file that is no socket"
        raise OSError(errno.EEXIST, f"a {what} is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        error = probe.connect_ex(path)
    if error == errno.ECONNREFUSED:
        return True
    # EAGAIN: its backlog is full; EPROTOTYPE: a process has a datagram socket open.
    number = errno.EADDRINUSE if error in (0, errno.EAGAIN, errno.EPROTOTYPE) else error
    raise OSError(number, os.strerror(number))


def _stale_files(path: str, found: tuple[int, int]) -> list[str]:
    """Return the links beside a path to the file at the path, if no process listens on it.

    The socket was closed, or its process was killed.  Raises OSError.
    """
    links = [each for each in left_beside(path) if _identity(each) == found]
    return links if links and is_stale(path) else []


def _is_file_of(path: str, sock: socket.socket, found: tuple[int, int]) -> bool:
    """Return whether a file, by device and inode, belongs to a socket of a path."""
    own = _identity(own_file(path, sock))
    if own != _NONE or found == _NONE:
        return own == found != _NONE
    try:
        return file_of(sock) == found[1] & 0xFFFFFFFF
    except OSError:
        return False  # unknown


def _identity(path: str) -> tuple[int, int]:
    """Return device and inode of a file, (0, 0) if it is missing."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return _NONE
    return found.st_dev, found.st_ino


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
