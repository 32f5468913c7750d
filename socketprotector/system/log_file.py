"""Opens the log file so that a user with write access to its folder cannot trick root.

Root opens the file, often in a folder of the daemon's user.  A symbolic link or hard link there
must not make root write to a file that this user cannot write.  Root's own links, in folders that
only root may write, are followed.

daemon/log_output.py opens the file again after a rotation.

Source: open(2), symlink(7), fifo(7).
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from ..model.settings import Identity
from .cleanup import on_error
from .peer_credentials import unmistakable_users
from .trusted_path import only_lead

#: O_NONBLOCK, because opening a FIFO without a reader would block.
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_LINKED = "a symbolic link that users other than root may change"
_MODE = 0o640


def open_log(path: str, identity: Identity | None = None) -> int:
    """Open or make a log file for appending; the caller owns the descriptor.

    identity: the owner of a new file.  Raises OSError.
    """
    try:
        if os.geteuid() != 0 or only_lead(path, {0}):
            fd, made = _open(path)
        else:
            fd, made = _open_strictly(path, identity)
    except OSError as error:
        if error.errno == errno.ENXIO:
            is_fifo = stat.S_ISFIFO(os.stat(path).st_mode)
            error.strerror = "no process reads that FIFO" if is_fifo else "that is a socket"
        raise
    with on_error(os.close, fd):
        if made and identity is not None:
            try:
                os.fchown(fd, identity.uid, identity.gid)  # this user will reopen the file
            except PermissionError as error:
                # root lacks CAP_CHOWN, or the file system keeps no owners (vfat).
                error.strerror = f"cannot make {identity.user} its owner (CAP_CHOWN missing?)"
                raise
        os.set_blocking(fd, True)
    return fd


def _open(path: str, folder: int | None = None, flags: int = 0) -> tuple[int, bool]:
    try:
        new = os.O_CREAT | os.O_EXCL
        return os.open(path, _FLAGS | new | flags, _MODE, dir_fd=folder), True
    except FileExistsError:
        return os.open(path, _FLAGS | flags, dir_fd=folder), False


def _open_strictly(path: str, identity: Identity | None) -> tuple[int, bool]:
    """Open a file in exactly this folder, and refuse symbolic links and hard links."""
    parent, name = os.path.split(os.path.normpath(path))
    folder = _open_folder(parent)
    try:
        around = os.fstat(folder)
        with suppress(FileNotFoundError):  # check first, because even opening may have an effect
            _refuse(os.lstat(name, dir_fd=folder), around, identity, path)
        try:
            fd, made = _open(name, folder, os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ELOOP:
                error.strerror = _LINKED
            raise
    finally:
        os.close(folder)
    with on_error(os.close, fd):
        _refuse(os.fstat(fd), around, identity, path)  # another user may have replaced the file
    return fd, made


def _refuse(
    found: os.stat_result, around: os.stat_result, identity: Identity | None, path: str
) -> None:
    """Raise OSError for a file that another user may have made; around: its folder's stat."""
    trusted = unmistakable_users((0, around.st_uid, *((identity.uid,) if identity else ())))
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        raise OSError(errno.EPERM, "it has another name (a hard link)", path)
    if around.st_mode & stat.S_IWOTH and found.st_uid not in trusted:
        why = f"user {found.st_uid} owns it; remove it or choose another path"
        raise OSError(errno.EPERM, why, path)


def _open_folder(path: str) -> int:
    """Open a folder by a path without symbolic links; the caller owns the descriptor."""
    folder = os.open("/", _FOLDER)
    for name in path.split("/"):
        try:
            inner = os.open(name or ".", _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
        except NotADirectoryError as error:
            if stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode):
                raise OSError(errno.ELOOP, _LINKED, path) from error
            raise
        finally:
            os.close(folder)
        folder = inner
    return folder
