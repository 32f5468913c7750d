"""The socket files of a UNIX path from which workers accept: a socket for each generation.

Each socket has a file of its own beside the path, and the path is a hard link to one of them.  A
rename makes it lead to another one: at every moment it is a socket that listens.

A socket is bound under a name that no file keeps.  getsockname() shows that name, and a server that
removes its socket's file at its end removes nothing.  What the socket accepts has that name, too.

No record says where the path leads: files and inodes do, also after a kill in between.

Source: unix(7); link(2), rename(2): what a rename replaces is never missing.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from .cleanup import on_error
from .dir_lock import give
from .sock_diag import accepted_unix, file_of

#: The name of a UNIX socket has 108 bytes, with the terminating zero.
LONGEST_PATH = 107
_TRIES = 16
_OWN = "~"
#: What is renamed over the path.
_NEW = "new"
#: What a socket of a path is bound as, and whether it is the file that it keeps.
_NAME = re.compile(
    r"(?P<folder>.*/)\.(?P<name>[^/]+)\.sp-(?P<number>[0-9a-f]{6})(?P<own>~?)", re.DOTALL
)
_ACL = "system.posix_acl_access"
#: Device and inode of a file that is not there.
_NONE = (0, 0)

Chown = Callable[[int, int, int], None]
#: User and group (-1: as it comes), mode and access list of a file.
Rights = tuple[int, int, int, bytes | None]


def path_of(name: str) -> str:
    """Return the path that clients connect to, from what a socket of that path is bound as."""
    found = _NAME.fullmatch(name)
    return found["folder"] + found["name"] if found else name


def files_of(name: str) -> list[str]:
    """Return the files that there may be of a socket, from what it is bound as."""
    return [each for each in (name + _OWN, path_of(name)) if os.path.lexists(each)]


def number_of(one: socket.socket) -> int:
    """Return what distinguishes a socket's connections from others of its path; 0: nothing does."""
    found = _NAME.fullmatch(_bound_as(one))
    return int(found["number"], 16) if found else 0


def connections(path: str) -> Counter[int]:
    """Return how many accepted connections processes have open, by number_of() the socket.

    Raises OSError where the kernel does not tell.
    """
    found = Counter[int]()
    for name, _, _ in accepted_unix():
        its = _NAME.fullmatch(name)
        if its and path_of(name) == path:
            found[int(its["number"], 16)] += 1
    return found


def has_room(path: str) -> bool:
    """Return whether the files beside a path have names that clients can connect to."""
    return len(os.fsencode(_name(path, 0) + _OWN)) <= LONGEST_PATH


def _name(path: str, number: int) -> str:
    return _beside(path, f"{number:06x}")


def _beside(path: str, what: str) -> str:
    folder, name = os.path.split(path)
    return f"{folder.removesuffix('/')}/.{name}.sp-{what}"


def _drawn(path: str) -> str:
    return _name(path, int.from_bytes(os.urandom(3), "big") or 1)


def _bound_as(one: socket.socket) -> str:
    name = one.getsockname()
    return os.fsdecode(name) if name else ""


def own_file(path: str, one: socket.socket) -> str:
    """Return the name of a socket's own file."""
    name = _bound_as(one)
    # One that is bound as the path had it for itself, and gets a file when it loses that.
    return (_name(path, 0) if name == path else name) + _OWN


def bind(path: str, backlog: int, rights: Rights, chown: Chown) -> socket.socket:
    """Return a socket that listens, with a file of its own beside the path.  Raises OSError."""
    uid, gid, mode, acl = rights
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with on_error(made.close):
        bound_as = _bind(made, path, mode)
        with on_error(_unlink, bound_as):
            give(bound_as, uid, gid, chown)
            if acl:
                os.setxattr(bound_as, _ACL, acl, follow_symlinks=False)
            made.listen(backlog)
            os.rename(bound_as, bound_as + _OWN)
    return made


def _bind(one: socket.socket, path: str, mode: int) -> str:
    """Bind a socket under a name that no file has.  Raises OSError."""
    before = os.umask(0o777 & ~mode)
    try:
        for tries_left in reversed(range(_TRIES)):
            name = _drawn(path)
            if os.path.lexists(name + _OWN):
                continue
            try:
                one.bind(name)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not tries_left:
                    raise
            else:
                return name
    finally:
        os.umask(before)
    raise OSError(errno.EADDRINUSE, "there are too many socket files beside it")


def rights_of(path: str) -> Rights:
    """Return what bind() takes, to give another socket the rights that a path has.

    Raises OSError.
    """
    found = os.lstat(path)
    folder = os.lstat(os.path.dirname(path))
    setgid = bool(folder.st_mode & stat.S_ISGID)
    gid = folder.st_gid if setgid else os.getegid()
    acl = None
    with suppress(OSError):  # it has none, or the file system has not
        acl = os.getxattr(path, _ACL, follow_symlinks=False)
    # A group that may not write cannot connect, so no client misses it.
    matters = os.geteuid() == 0 or found.st_mode & stat.S_IWGRP
    same = found.st_gid == gid or not matters
    return (
        -1 if found.st_uid == os.geteuid() else found.st_uid,
        -1 if same else found.st_gid,
        stat.S_IMODE(found.st_mode),
        acl,
    )


def leads_to(path: str, one: socket.socket) -> bool:
    """Return whether clients of a path come to a socket."""
    return _is_file_of(path, one, _known(path))


def has_file(path: str, one: socket.socket) -> bool:
    """Return whether clients of a path can be led to a socket: others may have removed its file."""
    return _known(own_file(path, one)) != _NONE or leads_to(path, one)


def keep_file(path: str, one: socket.socket) -> None:
    """Give a socket to which its path leads a file of its own, if it has none.

    A program before this one may have bound it as the path.  Raises OSError.
    """
    own = own_file(path, one)
    if _known(own) == _NONE and leads_to(path, one):
        os.link(path, own, follow_symlinks=False)


def lead_to(path: str, one: socket.socket, ours: Iterable[socket.socket]) -> None:
    """Route clients of a path to a socket from now on.

    ours: all sockets of the path.  A file that a closed socket has left there is replaced.
    Raises OSError, also where another program's file is there.
    """
    if leads_to(path, one):
        return
    before, left = found_at(path, ours)
    if before is not None:
        keep_file(path, before)
    new = _beside(path, _NEW)
    _unlink(new)  # of a program that was killed here
    if os.path.lexists(new):  # of another user, where many may write, as in /tmp
        new = _drawn(path) + _OWN
    os.link(own_file(path, one), new, follow_symlinks=False)
    with on_error(_unlink, new):
        os.rename(new, path)
    for each in left:
        _unlink(each)


def found_at(path: str, ours: Iterable[socket.socket]) -> tuple[socket.socket | None, list[str]]:
    """Return to which socket a path leads, or else the files of a closed one to which it leads.

    Raises OSError(EEXIST) where another program's file is there.
    """
    there = _known(path)
    one = next((each for each in ours if _is_file_of(path, each, there)), None)
    left: list[str] = []
    if one is None and there != _NONE and not (left := _left_by_a_socket(path, there)):
        raise OSError(errno.EEXIST, "another program has put its file there; remove it", path)
    return one, left


def forget(path: str, one: socket.socket) -> None:
    """Remove the file of a socket that is about to be closed.

    While its path leads to it the file stays: by that lead_to() knows that the path is ours.
    """
    if not leads_to(path, one):
        _unlink(own_file(path, one))


def remove(path: str, ours: Iterable[socket.socket]) -> None:
    """Remove the path, unless another program's file is there, and the file of each socket."""
    _unlink(_beside(path, _NEW))  # of a program that was killed there
    for each in ours:
        if leads_to(path, each):
            _unlink(path)
        forget(path, each)
    if (there := _known(path)) != _NONE:
        with suppress(OSError):
            for left in _left_by_a_socket(path, there):
                _unlink(path)
                _unlink(left)


def left_beside(path: str) -> Iterator[str]:
    """Yield what a killed program may have left beside a path.  Raises OSError."""
    with os.scandir(os.path.dirname(path) or "/") as entries:
        for each in entries:
            found = _NAME.fullmatch(each.path)
            if found and path_of(each.path.removesuffix(_OWN)) == path:
                yield each.path


def is_stale(path: str) -> bool:
    """Return whether a socket file is there on which no process listens.

    Raises OSError(EADDRINUSE) when one does, and OSError(EEXIST) for what is no socket.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "a file that is no socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        error = probe.connect_ex(path)
    if error == errno.ECONNREFUSED:
        return True
    # EAGAIN: its backlog is full; EPROTOTYPE: a process has a datagram socket open.
    number = errno.EADDRINUSE if error in (0, errno.EAGAIN, errno.EPROTOTYPE) else error
    raise OSError(number, os.strerror(number))


def _left_by_a_socket(path: str, found: tuple[int, int]) -> list[str]:
    """Return the files beside a path that are the file at the path, if no process listens on it.

    The socket was closed, or its process was killed.  Raises OSError.
    """
    left = [each for each in left_beside(path) if _known(each) == found]
    return left if left and is_stale(path) else []


def _is_file_of(path: str, one: socket.socket, found: tuple[int, int]) -> bool:
    """Return whether a file is what a socket of a path is bound to."""
    own = _known(own_file(path, one))
    if own != _NONE or found == _NONE:
        return own == found != _NONE
    try:
        return file_of(one) == found[1] & 0xFFFFFFFF
    except OSError:
        return False  # unknown: assume that it does not


def _known(path: str) -> tuple[int, int]:
    """Return device and inode of a file, 0 and 0 where there is none."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return _NONE
    return found.st_dev, found.st_ino


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
