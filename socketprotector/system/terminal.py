"""Output to stderr and the operator's terminal: whole lines, escaped.

A failure to write is ignored: the start continues without the terminal, or the pipe (`| head`).
"""

from __future__ import annotations

import _signal as signal  # `signal` itself would cost the guard a megabyte
import atexit
import os
import select
import stat
import sys

from ..model.text import escape
from .polling import events_of

STDOUT, STDERR = 1, 2


def tell(text: str, where: int = STDERR) -> None:
    """Write a message of one or more lines."""
    lines = [escape(line) for line in f"SocketProtector: {text}".split("\n")]
    try:
        put(where, "\n".join([*lines, ""]).encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def put(fd: int, data: bytes) -> int:
    """Write to a file that may be a terminal, also from the background.  Raises OSError.

    Under `stty tostop` a write sends SIGTTOU to our whole group.  The signal suspends each process
    without a handler, and makes the others try again for ever.  While we block the signal it is not
    sent, and the write succeeds (POSIX, General Terminal Interface, Terminal Access Control).
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        return os.write(fd, data)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def put_at_once(fd: int, data: bytes) -> int:
    """Write to a pipe, terminal or file that other processes share, without waiting for its reader.

    Raises OSError if it would have to wait.  It does not use O_NONBLOCK, which affects all sharers.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        if not events_of(fd, select.POLLOUT):
            raise BlockingIOError
        return put(fd, data)
    # After poll() another writer may take the room before our write.  RWF_NOWAIT is missing in
    # musl, and for pipes before Linux 6.4.
    receive, send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        written = os.write(send, data)
        return os.splice(receive, fd, written, flags=os.SPLICE_F_NONBLOCK)
    finally:
        os.close(receive)
        os.close(send)


def is_journal() -> bool:
    """Return True if stderr is the journal's socket (systemd.exec(5), JOURNAL_STREAM)."""
    found = os.fstat(STDERR)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def keep_exit_status() -> None:
    """Exit with the program's own status, even if stderr's reader has exited or its disk is full.

    Python flushes stderr last.  If that fails, Python exits with 120.
    """
    atexit.register(_drop_unwritten_errors)


def _drop_unwritten_errors() -> None:
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        sys.stderr = None


def open_missing_standard_streams() -> None:
    """Open /dev/null for each closed standard stream, so that no socket gets its number."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is fd
            # ruff: noqa: SIM115 -- it stays open for the life of the process
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", closefd=False))
