"""Makes the folder of the workers' notify sockets; the folder keeps other users out.

Abstract names would not keep other users out: any local user can find the names in /proc/net/unix,
send messages to the sockets and fill their queues.  In a user namespace that shares the host's
network, even the user of a sender cannot be verified.
The name of a socket in this folder cannot be listed (mode 0711) or guessed, and is not in
/proc/net/unix (system/sd_notify.py).  So a process that can connect is a worker, or got the name
from a worker.

The folder is locked while a process holds its descriptor: the protector, the guard, or systemd
(for the next protector).  After a kill of the last holder, the folder is unlocked, and the next
start removes it.

Source: unix(7), flock(2); tmpfiles.d(5), which skips locked folders.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from string import hexdigits

from ..model.lazy_dataclass import frozen
from ..model.settings import Settings
from ..system import control_path
from ..system.sd_notify import remove_folder
from .user_access import downwards, refuse_unwritable

PREFIX = ".notify-"
#: The place for the folder if no other place is suitable.
_LAST_RESORT = "/tmp"
#: The length of the random number in the folder's name.
_KEY_BYTES = 4
#: The longest path of a UNIX socket, without the final NUL (unix(7)).
_LONGEST = 107
#: The length of `/`, the secret, `-` and a worker's number, which follow the folder's path.
_NAME_BYTES = 1 + 24 + 1 + 10
_TRIES = 20


@frozen
class NotifyFolder:
    """A new folder, and the descriptor that keeps it locked."""

    path: str
    fd: int

    def discard(self) -> None:
        """Close and remove the folder."""
        os.close(self.fd)
        remove_folder(self.path)


def make(
    settings: Settings, notice: Callable[[str], None], *, dry: bool = False
) -> NotifyFolder | None:
    """Make a locked folder for the protector's user; the caller owns it.

    This also removes the folders that killed protectors of that user have left.
    If no folder can be made, returns None and passes the reason to `notice`.
    dry: only check that a folder could be made.
    """
    refused = []
    for place in _places(settings):
        try:
            _check_room(place)
            if dry:
                _check_writable(place, settings)
                return None
            if place in _usual():
                os.makedirs(place, 0o755, exist_ok=True)
            _check(place, settings)
            _sweep(place, settings)
            return _make_locked(place, settings)
        except OSError as error:
            refused.append(f"{place}: {error.strerror}")
    notice(
        f"no private folder for the workers' notify sockets ({'; '.join(refused)}): they are "
        "abstract, so any local user can fill their queues"
    )
    return None


def _check_writable(place: str, settings: Settings) -> None:
    """Raise OSError if no folder could be made in a place.

    A usual place may be missing: it would be made first, so its parent is checked instead.
    """
    while place in _usual() and not os.path.lexists(place):
        place = os.path.dirname(place)
    _check(place, settings)
    refuse_unwritable(place, os.W_OK | os.X_OK)


def _usual() -> list[str]:
    return control_path.folders(os.environ, os.geteuid())


def _places(settings: Settings) -> list[str]:
    """Return the places for the folder, the best place first.

    Places from which the protector's user can later remove the folder come before other places.
    Among equal places, the folder of the control socket comes first.
    """
    control = settings.control
    beside = [os.path.dirname(control.address.removeprefix("unix:"))] if control else []
    places = list(dict.fromkeys([*beside, *_usual(), _LAST_RESORT]))
    return sorted(places, key=lambda place: not _can_remove_from(place, settings))


def _can_remove_from(place: str, settings: Settings) -> bool:
    """Return True if the protector's user can remove its own folder from this place."""
    if settings.identity is None or settings.identity.uid == 0:
        return True
    try:
        found = os.stat(place)
    except OSError:
        return False  # root will make this place, and own it
    return found.st_uid == settings.identity.uid or bool(found.st_mode & stat.S_ISVTX)


def _owners(settings: Settings) -> set[int]:
    return {os.geteuid(), *([settings.identity.uid] if settings.identity else [])}


def _refuse(number: int, why: str = "") -> None:
    """Raise OSError with this errno; why: a reason in place of the usual text."""
    raise OSError(number, why or os.strerror(number))


def _check_room(place: str) -> None:
    name = os.path.join(place, PREFIX) + "0" * 2 * _KEY_BYTES
    if len(os.fsencode(name)) + _NAME_BYTES > _LONGEST:
        _refuse(errno.ENAMETOOLONG)


def _check(folder: str, settings: Settings) -> None:
    """Raise OSError if other users could remove the folder, or workers could not enter it."""
    found = os.stat(folder)
    if not stat.S_ISDIR(found.st_mode):
        _refuse(errno.ENOTDIR)
    if not found.st_mode & stat.S_ISVTX and (
        found.st_mode & stat.S_IWOTH or found.st_uid not in _owners(settings) | {0}
    ):
        _refuse(errno.EPERM, "others could remove it")
    if os.geteuid() == 0:
        # A worker may change its user before it sends READY=1.
        for each in reversed([*downwards(os.path.realpath(folder))]):
            if not os.stat(each).st_mode & stat.S_IXOTH:
                _refuse(errno.EACCES, f"{each} is closed to other users")


def _sweep(place: str, settings: Settings) -> None:
    """Remove unlocked folders, whose protectors are gone."""
    for name in os.listdir(place):
        prefix, key = name[: len(PREFIX)], name[len(PREFIX) :]
        if prefix == PREFIX and len(key) == 2 * _KEY_BYTES and not key.strip(hexdigits):
            with suppress(OSError):  # the folder is locked, or belongs to another user
                _remove_stale(os.path.join(place, name), _owners(settings))


def _remove_stale(path: str, owners: set[int]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid in owners:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for each in os.listdir(fd):
                os.unlink(each, dir_fd=fd)
            os.rmdir(path)
    finally:
        os.close(fd)


def _make_locked(place: str, settings: Settings) -> NotifyFolder:
    for _ in range(_TRIES):
        path = os.path.join(place, PREFIX + os.urandom(_KEY_BYTES).hex())
        fd = -1
        try:
            os.mkdir(path, 0o700)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Before we locked the folder, another start may have removed it as stale.
            if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
                os.fchmod(fd, 0o711)
                if settings.identity is not None:
                    os.fchown(fd, settings.identity.uid, settings.identity.gid)
                return NotifyFolder(path, fd)
        except (FileExistsError, FileNotFoundError, BlockingIOError):
            pass  # another start has removed the folder, or the name is taken
        except OSError:
            if fd >= 0:
                os.close(fd)
            remove_folder(path)
            raise
        if fd >= 0:
            os.close(fd)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), place)
