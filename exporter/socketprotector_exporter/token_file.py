"""The token file, whose token a client sends to read /metrics.

A file, because other users can read options and variables.  The exporter reads the file again, so a
new token needs no restart.
"""

from __future__ import annotations

import os
import re
import stat

from socketprotector.ctl.api import UsageError

_BYTES = 4096
#: The characters that a header can carry unquoted.  Source: RFC 6750, 2.1.
_TOKEN = re.compile(rb"[\w.~+/-]+=*", re.ASCII)


def read_token(option: str, file: str) -> str:
    """Return the token in a file, the only word there.

    option: the option that named the file.  Raises UsageError: one line with option and file.
    """
    said = f"{option} {file}"
    try:
        with open(file, "rb", opener=_without_waiting) as opened:
            mode = os.fstat(opened.fileno()).st_mode
            words = opened.read(_BYTES).split() if stat.S_ISREG(mode) else []
    except OSError as error:
        raise UsageError(f"{said}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UsageError(f"{said}: not a regular file; the exporter must be able to read it again")
    if mode & stat.S_IRWXO:
        raise UsageError(f"{said}: every user may open it; chmod o= {file}")
    if len(words) != 1 or _TOKEN.fullmatch(words[0]) is None:
        raise UsageError(f"{said}: no token; write one word there, e.g. by openssl rand -hex 32")
    return words[0].decode()


def _without_waiting(file: str, flags: int) -> int:
    return os.open(file, flags | os.O_NONBLOCK)  # opening a FIFO would wait for its other end
