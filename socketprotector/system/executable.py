"""Finds the executable file of a command, and our own."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # a program that is to stay small uses this, too
    from collections.abc import Sequence

#: Descriptors that a starting program opens at a time: a folder, a module, the loop's own.
_NEEDED = 6


def resolve(command: Sequence[str], directory: str, search: str) -> tuple[str, tuple[str, ...]]:
    """Return (real path, argv) of a command as it is now.

    Symlinks are followed, so that a generation that was started from one release never
    starts a process of the next; the last one only where the name stays the same or the
    file is no script, because such a script goes by the name it was called by.
    Raises FileNotFoundError, or PermissionError where it is no executable file.
    """
    name = command[0]
    found = os.path.join(directory, name) if "/" in name else _search(name, search)
    os.stat(found)
    if os.path.isdir(found) or not os.access(found, os.X_OK):
        raise PermissionError(13, "not executable", found)
    by_name = os.path.join(os.path.realpath(os.path.dirname(found)), os.path.basename(found))
    real = os.path.realpath(found)
    if os.path.basename(real) != os.path.basename(found) and _is_script(real):
        real = by_name
    return real, (by_name if "/" in name else name, *command[1:])


def command_of(label: tuple[str, ...], safe: Sequence[str] = ("-P",)) -> tuple[str, ...]:
    """Return how this very program is executed again, by the path it was called by.

    A script is taken by that path, so that a symlink to another release is followed; else
    it is the interpreter with -m.  `label` is shown in the process list.
    """
    script = sys.argv[0]
    if os.path.basename(script) != "__main__.py" and os.access(script, os.X_OK):
        return (os.path.abspath(script), *label)
    return (sys.executable, *safe, "-m", "socketprotector", *label)


def _search(name: str, search: str) -> str:
    """Find an executable file by name in the folders of a PATH."""
    for folder in search.split(":"):
        path = os.path.join(folder or ".", name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.abspath(path)
    raise FileNotFoundError(2, "not found in PATH", name)


def _is_script(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return False  # executable without being readable: a binary


def need_descriptors() -> None:
    """Raise OSError if a program could not even be loaded: after the exec it would be too late."""
    opened: list[int] = []
    try:
        for _ in range(_NEEDED):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401
    finally:
        for fd in opened:
            os.close(fd)
