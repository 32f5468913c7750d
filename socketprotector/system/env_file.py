"""Environment files: NAME=VALUE lines, as EnvironmentFile= of systemd reads them.

Blank lines and lines that begin with # or ; are passed over; a value may stand in
single or double quotes; a leading `export ` is allowed, so that a shell can read it too.
"""

from __future__ import annotations

import os
import re
import stat

#: More does not fit the environment of a process (execve(2)).
MAX_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def parse(text: str, name: str) -> dict[str, str]:
    """Return the assignments in text.  Raises ValueError naming `name` and the line."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        variable, separator, value = line.removeprefix("export ").partition("=")
        variable, value = variable.strip(), value.strip()
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
    """Return what is in a file that is read again at each reload.

    Raises OSError, or ValueError for one that is too long or none that can be read twice.
    """
    # Its owner may be the workers' user: nothing there may make the protector wait, or grow.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise ValueError(f"{path}: a FIFO, but it is read at each reload")
        with open(fd, "rb", closefd=False) as file:  # it would not close a folder's
            data = file.read(MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes")
    return data


def read(path: str) -> dict[str, str]:
    """Return the assignments in a file.  Raises OSError, or ValueError with the line."""
    # Bytes that are no text are passed on as they are, like those of our own environment.
    return parse(contents(path).decode("utf-8", "surrogateescape"), path)
