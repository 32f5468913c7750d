"""Finds the executable file of a command, and our own.

Source: execve(2), binfmt_misc of the kernel's documentation.
"""

from __future__ import annotations

import os
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # a program that is to stay small uses this, too
    from collections.abc import Sequence

#: Descriptors that a starting program opens at a time: a folder, a module, the loop's own.
_NEEDED = 6
#: The bytes that the kernel examines (BINPRM_BUF_SIZE), and where its extra formats are listed.
_HEAD_BYTES, _FORMATS = 256, "/proc/sys/fs/binfmt_misc"


def resolve(command: Sequence[str], directory: str, search: str) -> tuple[str, tuple[str, ...]]:
    """Return (real path, argv) of a command as it is now.

    Symlinks are followed, so that a generation that was started from one release never
    starts a process of the next; the last one only where the name stays the same or the
    file is no script, because such a script goes by the name it was called by.
    Raises FileNotFoundError, or PermissionError where it is no executable file.
    """
    name = command[0]
    found = os.path.join(directory, name) if "/" in name else _search(name, search)
    if not stat.S_ISREG(os.stat(found).st_mode) or not os.access(found, os.X_OK):
        raise PermissionError(13, "not executable", found)
    by_name = os.path.join(os.path.realpath(os.path.dirname(found)), os.path.basename(found))
    real = os.path.realpath(found)
    if os.path.basename(real) != os.path.basename(found) and _is_script(real):
        real = by_name
    return real, (by_name if "/" in name else name, *command[1:])


def refuse_format(path: str, directory: str = "") -> None:
    """Raise OSError for an executable file that the kernel would not execute.

    directory: where it would be executed.  What cannot be known is not refused.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return  # executable without being readable: a binary
    if head[:2] == b"#!":
        line = head[2:].partition(b"\n")[0].split(maxsplit=1)
        try:
            if line:
                os.stat(os.path.join(os.fsencode(directory), line[0]))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                2, "the interpreter in its first line is missing", path
            ) from None
        except (OSError, ValueError):
            pass  # it may be there for another user
    elif not head:
        raise OSError(8, "it is empty", path)
    elif head[:4] != b"\x7fELF" and not _other_formats(head):
        raise OSError(8, "neither a program nor a script that begins with #!", path)


def _other_formats(head: bytes) -> bool:
    """Return whether binfmt_misc may know how to execute such a file."""
    try:
        found = set(os.listdir(_FORMATS))
    except FileNotFoundError:
        return not os.path.exists("/proc/self")
    except OSError:
        found = set()
    # A container does not see which there are; none is for a shell's script without `#!`.
    return bool(found - {"register", "status"}) or (not found and b"\0" in head)


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
