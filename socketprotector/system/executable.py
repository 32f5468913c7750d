"""Finds the executable file of a command, and the command that executes SocketProtector again.

Source: execve(2), binfmt_misc of the kernel's documentation.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # the guard, which must stay small, imports this module
    from collections.abc import Sequence

#: The descriptors that a starting program has open at once: a folder, a module, the event loop's.
_NEEDED = 6
#: The bytes that the kernel examines (BINPRM_BUF_SIZE), and the folder that lists extra formats.
_HEAD_BYTES, _FORMATS = 256, "/proc/sys/fs/binfmt_misc"


def resolve(command: Sequence[str], directory: str, search: str) -> tuple[str, tuple[str, ...]]:
    """Return (real path, argv) of a command, with symbolic links followed.

    So a generation keeps its release even if a link is changed later.  A final link to a script of
    another name is not followed, because such a script may depend on the name by which it was
    called.
    Raises OSError: FileNotFoundError, IsADirectoryError, or PermissionError for a file that is not
    executable.
    """
    name = command[0]
    found = os.path.join(directory, name) if "/" in name else _search(name, search)
    mode = os.stat(found).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", found)
    if not stat.S_ISREG(mode) or not os.access(found, os.X_OK):
        raise PermissionError(13, "not executable", found)
    by_name = os.path.join(os.path.realpath(os.path.dirname(found)), os.path.basename(found))
    real = os.path.realpath(found)
    if os.path.basename(real) != os.path.basename(found) and _is_script(real):
        real = by_name
    return real, (by_name if "/" in name else name, *command[1:])


def refuse_format(path: str, directory: str = "") -> None:
    """Raise OSError for a file that the kernel certainly cannot execute, despite its permissions.

    directory: the working directory of the execution.
    """
    try:
        head = head_of(path)
    except OSError:
        return  # the file is executable but not readable, so it is a binary
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
            pass  # another user may be able to see the interpreter
    elif not head:
        raise OSError(8, "it is empty", path)
    elif head[:4] != b"\x7fELF" and not _other_formats(head):
        raise OSError(8, "neither a program nor a script that begins with #!", path)


def _other_formats(head: bytes) -> bool:
    """Return True if binfmt_misc may know how to execute such a file."""
    try:
        found = set(os.listdir(_FORMATS))
    except FileNotFoundError:
        return not os.path.exists("/proc/self")
    except OSError:
        found = set()
    # A container cannot list the formats: assume that only a file with NUL bytes has one.
    return bool(found - {"register", "status"}) or (not found and b"\0" in head)


def command_of(label: tuple[str, ...], safe: Sequence[str] = ("-P",)) -> tuple[str, ...]:
    """Return the command that executes this program again.

    A script is executed by the path by which it was called, so that a link to another release is
    followed.  Without a script, the command is the interpreter with -m.
    label: words for the process list.  safe: the interpreter's options, unless it is isolated.
    """
    script = sys.argv[0]
    if os.path.basename(script) != "__main__.py" and os.access(script, os.X_OK):
        return (os.path.abspath(script), *label)
    if sys.flags.ignore_environment:  # otherwise the next program would use PYTHONPATH
        safe = ("-I",) if sys.flags.isolated else (*safe, "-E")
    return (sys.executable, *safe, "-m", "socketprotector", *label)


def _search(name: str, search: str) -> str:
    """Return the path of an executable file, by its name in the folders of a PATH.

    Raises FileNotFoundError.
    """
    for folder in search.split(":"):
        path = os.path.join(folder or ".", name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.abspath(path)
    raise FileNotFoundError(2, "not found in PATH", name)


def head_of(path: str) -> bytes:
    """Return the bytes of a regular file that the kernel examines; none of another file.

    Raises OSError.  Opens nothing but a regular file: another user may have put a FIFO or a device
    in its place, and opening these can wait, or have effects.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            return b""
        by_place = f"/proc/self/fd/{place}"
        found = by_place if os.path.exists(by_place) else path  # path: there is no /proc
        fd = os.open(found, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            return os.read(fd, _HEAD_BYTES)
        finally:
            os.close(fd)
    finally:
        os.close(place)


def _is_script(path: str) -> bool:
    try:
        return head_of(path).startswith(b"#!")
    except OSError:
        return False  # executable without being readable: a binary


def need_descriptors() -> None:
    """Raise OSError if too few descriptors are free to load a program, before the exec."""
    opened: list[int] = []
    try:
        for _ in range(_NEEDED):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401
    finally:
        for fd in opened:
            os.close(fd)
