"""Writes to the operator's terminal: whole lines, escaped, and never a reason to fail.

The terminal may be closed, or the pipe (`| head`): the start continues all the same.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself would cost the guard a megabyte
import os
import select
import stat
import sys

from ..model.text import escape
from .polling import events_of

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

    Under `stty tostop` that would send SIGTTOU to all of our group, which stops each process
    that has not caught it, and has the others try again for ever.  Where it is blocked it is not
    sent, and the write goes through (POSIX, General Terminal Interface, Terminal Access Control).
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        return os.write(fd, data)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def put_at_once(fd: int, data: bytes) -> int:
    """Write to a pipe, terminal or file that others share without ever waiting for its reader.

    Raises OSError where it would have to.  O_NONBLOCK would reach all that share the descriptor.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        if not events_of(fd, select.POLLOUT):
            raise BlockingIOError
        return put(fd, data)
    # Not poll and write: another writer may take the room in between.  RWF_NOWAIT is unknown to
    # musl, and to pipes before Linux 6.4.
    receive, send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        written = os.write(send, data)
        return os.splice(receive, fd, written, flags=os.SPLICE_F_NONBLOCK)
    finally:
        os.close(receive)
        os.close(send)


def stand_on_three_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: no socket may get such a number."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
            # ruff: noqa: SIM115 -- it stays open for the life of the process
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", closefd=False))
