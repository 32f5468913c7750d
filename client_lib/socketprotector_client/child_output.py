"""Marks the lines of a forked child with the child's number and pid (`--log-prefix`).

All children write to their parent's pipe, and the protector cannot tell them apart.  So each child
marks the lines of sys.stdout and sys.stderr itself.  The stream objects stay, because the parent's
logging handlers hold them.  Output of other programs and of C code has no mark.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import sys
import threading

from . import fork_hook, wire


class _Marked(io.RawIOBase):
    """Writes whole lines to a descriptor, each with a mark at its beginning."""

    def __init__(self, fd: int, mark: bytes) -> None:
        self._fd, self._mark = fd, mark
        self._rest = b""  # an incomplete line
        self._lock = threading.RLock()  # a signal handler may write in the middle of a write
        fork_hook.register(self)

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        given = bytes(data)  # type: ignore[call-overload]
        with self._lock:
            *lines, self._rest = (self._rest + given).split(b"\n")
            self._put([self._marked(line) + b"\n" for line in lines])
        return len(given)

    def end(self, stream: io.TextIOWrapper) -> None:
        """Write a last line that is incomplete."""
        stream.flush()
        if self._rest:
            self._put([self._marked(self._rest)])

    def after_fork_in_child(self) -> None:
        self._lock = threading.RLock()

    def _put(self, pieces: list[bytes]) -> None:
        # A pipe never mixes a write of at most PIPE_BUF bytes with another process's output.
        is_short = sum(map(len, pieces)) <= select.PIPE_BUF
        for text in [b"".join(pieces)] if is_short else pieces:
            while text:
                text = text[os.write(self._fd, text) :]

    def _marked(self, line: bytes) -> bytes:
        """Put the mark before a line, or after the line's syslog priority (sd-daemon(3))."""
        at = 3 if line[:1] == b"<" and line[2:3] == b">" else 0
        return line[:at] + self._mark + line[at:]


def mark_lines(number: int) -> None:
    """Mark the lines of this just forked child if the protector uses --log-prefix."""
    if os.environ.get(wire.ENV_LOG_PREFIX) != "1":
        return
    mark = b"[%d %d] " % (number, os.getpid())
    for fd, stream in ((1, sys.stdout), (2, sys.stderr)):
        # The program may have replaced the stream.
        if type(stream) is io.TextIOWrapper and not stream.closed and stream.fileno() == fd:
            marked = _Marked(fd, mark)
            atexit.register(marked.end, stream)
            io.TextIOWrapper.__init__(
                stream,
                marked,
                stream.encoding,
                stream.errors,
                line_buffering=True,
                write_through=stream.write_through,
            )
