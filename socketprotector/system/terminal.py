"""What the operator reads: whole lines, escaped, and never a reason to fail.

Nobody may read them any more (a closed terminal, `| head`): the start goes on all the same.
"""

from __future__ import annotations

import os
import signal

from ..model.text import escape

STDOUT, STDERR = 1, 2


def tell(text: str, where: int = STDERR) -> None:
    """Say something that may have several lines."""
    lines = [escape(line) for line in f"SocketProtector: {text}".split("\n")]
    try:
        put(where, "\n".join([*lines, ""]).encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def put(fd: int, data: bytes) -> int:
    """Write to what may be a terminal, also from the background.  Raises OSError.

    Under `stty tostop` that would send SIGTTOU to all of our group, which stops who has not
    caught it, and has who has try again for ever.  Where it is blocked it is not sent, and the
    write goes through (POSIX, General Terminal Interface, Terminal Access Control).
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        return os.write(fd, data)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
