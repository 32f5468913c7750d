"""A token in a file: what a client brings to read /metrics.

A file, and no option or variable: those are there for other users to read.  It is read each time it
is needed, so a new token takes no restart.
"""

from __future__ import annotations

import os
import re
import stat

from socketprotector.ctl.api import UsageError

_BYTES = 4096
#: What a header can carry as it is.  Source: RFC 6750, 2.1.
_TOKEN = re.compile(rb"[\w.~+/-]+=*", re.ASCII)


def read_token(option: str, file: str) -> str:
    """Return the token in a file: the only word there.

    option: that gave the file.  Raises UsageError: one line that names both.
    """
    said = f"{option} {file}"
    try:
        with open(file, "rb", opener=_without_waiting) as opened:
            mode = os.fstat(opened.fileno()).st_mode
            words = opened.read(_BYTES).split() if stat.S_ISREG(mode) else []
    except OSError as error:
        raise UsageError(f"{said}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UsageError(f"{said}: no regular file; it is read again for each request")
    if mode & stat.S_IRWXO:
        raise UsageError(f"{said}: every user may open it; chmod o= {file}")
    if len(words) != 1 or _TOKEN.fullmatch(words[0]) is None:
        raise UsageError(f"{said}: no token; write one word there, as of openssl rand -hex 32")
    return words[0].decode()


def _without_waiting(file: str, flags: int) -> int:
    return os.open(file, flags | os.O_NONBLOCK)  # for the other end of a FIFO
