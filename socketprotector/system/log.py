"""The protector's own log: one line (model/log_format.py) for each event and action, on stderr.

The launching process has set up stderr (terminal, file, journal, the relay to syslog). A slow or
missing reader never blocks the protector: a line that would block is dropped, and the next written
line has the number of dropped lines.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable, Mapping

from ..model.log_format import LEVELS, as_coloured, as_json, as_text, plain
from .crash_loop_summary import CrashLoopFilter
from .loop import Loop
from .terminal import is_journal, put, put_at_once

#: Called with level, event and fields.
Observer = Callable[[str, str, Mapping[str, object]], None]

_STDERR = 2
_OBSERVED = LEVELS["info"]


class Log:
    """Writes lines to stderr without raising; only a file on a stuck disk can block it."""

    def __init__(self, level: str, *, prioritized: bool = False, form: str = "text") -> None:
        """Write lines of this level and of more severe levels.

        prioritized: the reader adds the time and expects a <N> priority (sd-daemon(3)).
        form: one of log_format.FORMATS.
        """
        self.level = level
        self._threshold = LEVELS[level]
        self._observers: tuple[Observer, ...] = ()
        self._filter: CrashLoopFilter | None = None
        self._prioritized = prioritized or is_journal()
        self._json = form == "json"
        self._coloured = False
        #: How many lines were lost since the last complete line.
        self.dropped = 0
        self._end = b""  # the line end that a cut line still needs
        self._fd = -1
        self._put: Callable[[int, bytes], int] = os.write
        self._socket: socket.socket | None = None
        self.reopen()

    def set_level(self, level: str) -> None:
        """Write lines of this level and of more severe levels from now on.  Raises KeyError."""
        self._threshold = LEVELS[level]
        self.level = level
        self.flush()

    def observe(self, callback: Observer) -> None:
        """Also call `callback` with each line at level info or above, whatever the log's level.

        The callback gets plain values, without fields that are None.  It must neither block nor
        raise.
        """
        self._observers = (*self._observers, callback)

    def suppress_crash_loops(self, loop: Loop) -> None:
        """Replace the lines of a crash loop by a line with a count, except at level debug."""
        self._filter = CrashLoopFilter(self._write, loop)

    def flush(self) -> None:
        """Write the withheld lines; call it before this program is replaced."""
        if self._filter is not None:
            self._filter.flush()

    def reopen(self) -> None:
        """Write to the current stderr from now on.

        The log opens stderr again, because O_NONBLOCK on the inherited open file description would
        affect every worker's output.  A socket cannot be opened again, but allows MSG_DONTWAIT.
        """
        mode = os.fstat(_STDERR).st_mode
        self._coloured = _wants_colour()
        # dup2 into the same number: without memory or a free descriptor, dup fails.
        fd = self._release_fd()
        if fd < 0:
            fd = os.dup(_STDERR)
        else:
            os.dup2(_STDERR, fd, inheritable=False)
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=fd)
            return
        self._fd = fd
        self._put = put if os.isatty(_STDERR) else os.write
        if stat.S_ISREG(mode):
            return  # O_NONBLOCK has no effect on a file; all processes must share one file offset
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            fd = os.open(f"/proc/self/fd/{_STDERR}", flags)
        except OSError:
            self._put = put_at_once  # another user's pipe or terminal, or no /proc
            return
        os.close(self._fd)
        self._fd = fd

    def write(self, level: str, event: str, **fields: object) -> None:
        """Write one line.  A field that is None is left out."""
        given = {name: value for name, value in fields.items() if value is not None}
        if self._observers and LEVELS[level] <= _OBSERVED:
            for observer in self._observers:
                observer(level, event, plain(given))
        if self._filter is None or self.level == "debug" or LEVELS[level] > _OBSERVED:
            suppressed = False
        else:
            suppressed = self._filter.suppresses(level, event, given)
        if not suppressed:
            self._write(level, event, given)

    def _write(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        if LEVELS[level] > self._threshold:
            return
        if self.dropped:
            fields = {**fields, "dropped_lines": self.dropped}
        line = self._line(level, event, fields)
        try:
            data = self._end + line.encode("utf-8", "backslashreplace")
            if self._socket is not None:
                sent = self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                sent = self._put(self._fd, data)
        except OSError:
            self.dropped += 1
            return
        # If the disk is full now, the last line may be incomplete.
        cut = sent < len(data)
        self._end = b"\n" if cut else b""
        self.dropped = self.dropped + 1 if cut else 0

    def _line(self, level: str, event: str, fields: Mapping[str, object]) -> str:
        now = time.time()
        if self._json:
            return as_json(level, event, fields, now, prioritized=self._prioritized)
        if self._prioritized:
            return as_text(level, event, fields)
        if self._coloured:
            return as_coloured(level, event, fields, now)
        return as_text(level, event, fields, now)

    def close(self) -> None:
        """Write the withheld lines, then stop writing."""
        self.flush()
        if (fd := self._release_fd()) >= 0:
            os.close(fd)

    def _release_fd(self) -> int:
        """Return the descriptor of the output, or -1; the caller then owns it."""
        fd = self._fd if self._socket is None else self._socket.detach()
        self._socket, self._fd = None, -1
        return fd


def _wants_colour() -> bool:
    """Return True if stderr is a terminal whose user wants colour (no-color.org)."""
    dull = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not dull and os.isatty(_STDERR)
