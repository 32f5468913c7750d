"""The folder of releases, and `current`: the symbolic link that names the release to start.

`current` changes by rename(2) only, so it always names the old or the new release.  Everything
beside it that we make begins with its name: `current.lock`, `current.next` (the link before its
rename), `current.history` and, before its rename, `current.history.next.RANDOM`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Collection
from contextlib import suppress

from ..model.errors import what_failed
from ..model.release import MOST_BYTES, NAME_IS, Fingerprint, is_name

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class ReleaseError(Exception):
    """A release, or `current`, cannot be used; the message says why."""


def named(current: str, releases: str) -> str:
    """Return the name of the release to which `current` leads.

    Raises ReleaseError if it does not lead to a direct child of the folder of releases.
    """
    link = f"{os.path.join(releases, 'NAME')} {current}"
    try:
        target = os.path.join(os.path.dirname(current), os.readlink(current))
    except OSError as error:
        why = error.strerror if error.errno != errno.EINVAL else "it is no symbolic link"
        raise ReleaseError(f"{current}: {why}; make it once: ln -s {link}") from error
    folder, name = os.path.split(target.rstrip("/"))
    why = f"which is no direct child of {releases}"
    try:
        if is_name(name) and os.path.samestat(os.stat(folder), os.stat(releases)):
            return name
    except OSError as error:
        why = f"but {what_failed(error)}"
    raise ReleaseError(f"{current} leads to {target}, {why}; change it: ln -sfn {link}")


def check(releases: str, name: str, owners: Collection[int]) -> str:
    """Return the absolute path of a release.

    Raises ReleaseError unless it is a direct child of the folder of releases, and both belong to
    one of the owners, and no other user can write them.
    """
    if not is_name(name):
        raise ReleaseError(f"release {name!r}: write {NAME_IS}")
    path = os.path.join(releases, name)
    try:
        parent = os.open(releases, _FOLDER)
        try:
            _refuse_others(releases, os.fstat(parent), owners)
            # Opened by descriptor, so that it is a child of the folder that was checked.
            child = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
            try:
                _refuse_others(path, os.fstat(child), owners)
            finally:
                os.close(child)
        finally:
            os.close(parent)
    except OSError as error:
        why = error.strerror
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            why = "it is no folder; a link is not followed"
        raise ReleaseError(f"release {path}: {why}") from error
    return path


def _refuse_others(path: str, found: os.stat_result, owners: Collection[int]) -> None:
    if found.st_uid not in owners:
        known = ", ".join(map(str, sorted(owners)))
        raise ReleaseError(
            f"{path} belongs to uid {found.st_uid}, not to {known}; change its owner, or set "
            "--deployer"
        )
    if found.st_mode & _OTHERS_WRITE:
        mode = stat.filemode(found.st_mode)
        raise ReleaseError(f"{path} ({mode}): other users can write it; chmod go-w {path}")


def fingerprint(path: str, program: str) -> Fingerprint | None:
    """Return the fingerprint of a release with this program; None: they cannot be read."""
    try:
        folder, file = os.stat(path), os.stat(program)
    except (OSError, ValueError):
        return None
    return Fingerprint(
        device=folder.st_dev,
        inode=folder.st_ino,
        program=program,
        program_inode=file.st_ino,
        program_size=file.st_size,
        program_mtime_ns=file.st_mtime_ns,
    )


def lock(current: str) -> int | None:
    """Return the descriptor that holds the lock of `current`; None: another process has it.

    Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    # 0600: any user who can open the file could take the lock first.
    fd = os.open(f"{current}.lock", flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    return fd


def is_lock(current: str, fd: int) -> bool:
    """Return whether this descriptor's file is still the lock; False: the file was removed."""
    try:
        return os.path.samestat(os.lstat(f"{current}.lock"), os.fstat(fd))
    except OSError as error:
        return error.errno != errno.ENOENT


def unlock(fd: int) -> None:
    """Release the lock, also of copies of its descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def in_the_way(current: str) -> str:
    """Return why `current` must not be replaced (it is no symbolic link); "" if it may."""
    if not os.path.lexists(current) or os.path.islink(current):
        return ""
    return f"{current} is no symbolic link, and is not replaced; move it away"


def prepare(current: str, target: str) -> None:
    """Make the link that move() renames, so that a missing permission shows before the switch.

    Raises OSError.
    """
    following = f"{current}.next"
    if found := in_the_way(current) or in_the_way(following):
        raise OSError(errno.EEXIST, found)
    for _ in range(2):
        try:
            os.symlink(target, following)
            return
        except FileExistsError:
            if os.readlink(following) == target:
                return
            os.unlink(following)
    os.symlink(target, following)


def move(current: str, releases: str, name: str) -> None:
    """Let `current` lead to a release, unless it does already.

    Raises OSError, also if the release's folder is gone: a restart would fail.
    """
    folder = os.path.join(releases, name)
    if leads_to(current, releases) != name:
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is gone")
        prepare(current, folder)
        os.rename(f"{current}.next", current)
    else:
        discard(current)


def leads_to(current: str, releases: str) -> str:
    """Return the name of the release to which `current` leads; "": to none."""
    try:
        return named(current, releases)
    except ReleaseError:
        return ""


def discard(current: str) -> None:
    """Remove the link of a release that has failed, if it is there."""
    following = f"{current}.next"
    with suppress(OSError):  # on failure the next prepare() replaces the link
        if os.path.islink(following):  # an operator's file stays
            os.unlink(following)


def history(current: str) -> bytes | None:
    """Return the contents of the history's file; None: there is none yet.

    Raises ReleaseError.
    """
    path = f"{current}.history"
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ReleaseError(f"{path}: it is no regular file")
            return os.pread(fd, MOST_BYTES, 0)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        why = what_failed(OSError(error.errno, error.strerror))  # without the path again
        raise ReleaseError(f"{path}: {why}") from error


def withdraw_writers(current: str) -> None:
    """Remove the temporary files of all earlier writers of the history.

    A writer whose protector was killed, and that has not renamed its file yet, then fails.  So
    only the owner of `current` changes the history.  An operator's copy, such as
    current.history.20261125, stays.  Raises OSError.
    """
    folder, name = os.path.split(current)
    for each in os.listdir(folder):
        if each.startswith(f"{name}.history.next."):
            # The file is gone, or is a folder, which we have not made.
            with suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(os.path.join(folder, each))


def new_history(current: str) -> tuple[int, str]:
    """Create the temporary file of the only writer; return its descriptor and name.

    No earlier writer has the same name, or it could rename this file too soon.  Raises OSError.
    """
    withdraw_writers(current)
    name = f"{os.path.basename(current)}.history.next.{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(os.path.join(os.path.dirname(current), name), flags, 0o600), name


def unreadable_name(current: str) -> str:
    """Return the free name that an unreadable history gets."""
    first = found = f"{current}.history.unreadable"
    number = 1
    while os.path.lexists(found):
        number += 1
        found = f"{first}.{number}"
    return found


def keep_unreadable(current: str) -> None:
    """Give an unreadable history another name, so that the next one does not replace it.

    Raises OSError.
    """
    with suppress(FileNotFoundError):
        os.rename(f"{current}.history", unreadable_name(current))
