"""Finds out which files this user can write, and which files another user can execute.

A child process becomes the other user and calls access(2).  Mode bits are not enough: groups,
access lists, mounts and security modules matter, too.  Only root can become another user; at a
reload without root, as_user() returns "".

Source: access(2), which checks for the real user; path_resolution(7); execve(2) for scripts.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Callable, Iterator, Mapping

from ..model.settings import Identity, Settings
from ..system.executable import head_of
from ..system.privileges import change_user
from ..system.spawn import in_child


def as_user(identity: Identity, check: Callable[[], str]) -> str:
    """Call `check` as that user, and return its result; "" if we cannot become that user."""

    def check_as_user() -> bytes:
        change_user(identity)
        return check().encode("utf-8", "surrogateescape")

    try:
        return in_child(check_as_user).decode("utf-8", "surrogateescape")
    except (OSError, ValueError):
        return ""


def as_worker(settings: Settings, check: Callable[[], str]) -> str:
    """Call `check` as the workers' user, if we are root; return its result.

    For files that a deployer, or the workers' user, may have put there: root opens none of them.
    """
    worker = settings.worker_identity or settings.identity
    return as_user(worker, check) if worker is not None and os.geteuid() == 0 else check()


def executed(path: str) -> dict[str, int]:
    """Return the files needed to execute a program, each with its access mode (access(2)).

    A script must be readable, and its interpreter executable.  Call this as the user who executes
    the program, because it opens scripts and interpreters.
    """
    needed: dict[str, int] = {}
    while path and path not in needed:
        interpreter = _interpreter(path)
        needed[path] = os.X_OK | os.R_OK if interpreter else os.X_OK
        path = interpreter
    return needed


def closed(needed: Mapping[str, int]) -> str:
    """Return what denies the caller the needed access to these files; "" if nothing does.

    A path that ends in / is a folder, which the caller must be able to enter.  A missing file is
    ignored: other checks report it.
    """
    for path, mode in needed.items():
        target = os.path.realpath(path)
        for part in dict.fromkeys((*downwards(path), *downwards(target))):
            wanted = mode if part in (path, target) else os.X_OK
            if not os.access(part, wanted) and os.path.exists(part):
                what = "enter" if path.endswith("/") else "read" if mode == os.R_OK else "execute"
                leads = "" if part in downwards(path) else f", a link to {target}"
                return f"cannot {what} {path}{leads}: {_whose(part)}"
    return ""


def _interpreter(script: str) -> str:
    """Return the interpreter that a script names; "" if the file is no script or unreadable."""
    try:
        line, _, _ = head_of(script).partition(b"\n")
    except OSError:
        return ""
    words = line.removeprefix(b"#!").split()
    return os.fsdecode(words[0]) if line.startswith(b"#!") and words else ""


def refuse_unwritable(path: str, mode: int = os.W_OK) -> None:
    """Raise OSError if this user cannot write a file or directory, with the reason."""
    if not os.access(path, mode):
        protected = os.statvfs(path).f_flag & os.ST_RDONLY
        number = errno.EROFS if protected else errno.EACCES
        raise OSError(number, os.strerror(number), path)


def downwards(path: str) -> Iterator[str]:
    """Yield each folder on a path, beginning at the root, and the path itself."""
    if path != os.path.dirname(path):
        yield from downwards(os.path.dirname(path))
    yield path


def _whose(path: str) -> str:
    """Return the owner and permissions of a file or folder, as ls(1) shows them."""
    found = os.stat(path)
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        owner = str(found.st_uid)
    what = "the folder " if stat.S_ISDIR(found.st_mode) else ""
    return f"{what}{path} is closed to that user ({stat.filemode(found.st_mode)} {owner})"
