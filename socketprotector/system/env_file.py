"""Reads environment files: lines of NAME=VALUE, as in systemd's EnvironmentFile=.

Blank lines and lines that begin with # or ; are skipped.  A value may have
single or double quotes.  A leading `export ` is allowed, so that a shell can read the file, too.
"""

from __future__ import annotations

import errno
import os
import re
import stat

#: The limit of a file's size: more does not fit into the environment of a process (execve(2)).
MAX_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
#: The characters that are stripped from a value's ends.  By default, Python would also strip U+0085
#: and U+00A0.
_BLANK = " \t"
#: Some editors write these bytes before the first line, and do not show them.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def parse(text: str, name: str) -> dict[str, str]:
    """Return the assignments in a text.  Raises ValueError with `name` and the line."""
    found = {}
    # Not splitlines(): for Python, U+0085, U+2028 or a form feed would end a line, too.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        line = line.lstrip()
        if not line or line[0] in "#;":
            continue
        variable, separator, value = line.removeprefix("export ").partition("=")
        variable, value = variable.strip(), value.strip(_BLANK)
        if not separator or not _NAME.match(variable):
            raise ValueError(f"{name} line {number}: not NAME=VALUE")
        if value[:1] in ("'", '"'):
            if len(value) < 2 or value[-1] != value[0]:
                raise ValueError(f"{name} line {number}: the quote is not closed")
            value = value[1:-1]
        if "\0" in value:
            raise ValueError(f"{name} line {number}: a NUL cannot be in a variable")
        found[variable] = value
    return found


def contents(path: str) -> bytes:
    """Return a file's contents, without a byte order mark.

    The file is read again later.  So this raises ValueError if it cannot be read twice, such as a
    FIFO, or is too long.  Raises OSError.
    """
    # The workers' user may own the file, so it must not make the protector wait or grow.
    # Check first, because even opening a device may have an effect.
    refuse_kind(os.stat(path), path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        refuse_kind(os.fstat(fd), path)
        with open(fd, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    finally:
        os.close(fd)
    if data is None:  # for example /proc/kmsg, which claims to be a regular file
        raise BlockingIOError(errno.EAGAIN, "reading it would wait", path)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes")
    return data.removeprefix(_BYTE_ORDER_MARK)


def refuse_kind(found: os.stat_result, path: str) -> None:
    """Raise OSError or ValueError unless a file can be read again and again; /dev/null can."""
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    is_null = stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)
    if not stat.S_ISREG(found.st_mode) and not is_null:
        kind = "a FIFO" if stat.S_ISFIFO(found.st_mode) else "no regular file"
        raise ValueError(f"{path}: {kind}, but it is read again later; name a regular file")
