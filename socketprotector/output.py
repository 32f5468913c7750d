"""Where the workers' output goes, and a failed worker's last words from there.

Workers write to the terminal, the journal or the log file themselves.  Only where lines
must be handled, on their way to syslog or for a prefix, a relay process reads them
(relaying.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from . import door, words
from .line import is_own
from .log import is_journal
from .logfile import open_log
from .loop import Loop
from .relaying import Relaying, WorkerPipe

_STDOUT, _STDERR = 1, 2
LAST_LINES = 20
_LAST_BYTES = 4096
_WRITE = f"{door.RELAY}write"


@dataclass(slots=True)
class Opened:
    """What a worker is started with to write to."""

    places: dict[int, int] = field(default_factory=dict)  # number there -> descriptor here
    pid: int = 0  # to be set once it is started


class Output:
    """The place that stdout and stderr of the protector and its workers lead to."""

    def __init__(self, log_file: str | None, *, to_syslog: bool, prefixed: bool) -> None:
        """to_syslog: there is no other place; prefixed: workers' lines say who wrote them."""
        self._log_file = log_file
        self._to_syslog = to_syslog
        self._prefixed = prefixed
        self._relay: Relaying | None = None
        #: Called when other descriptors are to be kept for the next program than before.
        self.changed: Callable[[], object] = lambda: None

    def begin(
        self, descriptors: Mapping[str, int], name: str, loop: Loop, ended: Callable[[], None]
    ) -> None:
        """Start the relay if one is needed, or go on with an earlier program's.  Raises OSError.

        Takes ownership of those of the descriptors that are the relay's.  ended: called when it
        has died.
        """
        mine = {n: fd for n, fd in descriptors.items() if n.startswith((door.RELAY, door.OUTPUT))}
        if not (self._to_syslog or self._prefixed):
            return
        kind = "syslog" if self._to_syslog else "journal" if is_journal() else "lines"
        self._relay = Relaying(name, kind, loop, prefixed=self._prefixed, ended=ended)
        self._relay.changed = lambda: self.changed()
        write = mine.pop(_WRITE, -1)
        if mine:
            if write >= 0:  # else stderr has come along as it is
                self._lead_to(write)
            self._relay.adopt(mine)
            return
        read = -1
        if self._to_syslog:
            read, write = os.pipe2(os.O_CLOEXEC)
            self._lead_to(write)
        self._relay.start(read)

    def _lead_to(self, fd: int) -> None:
        """Let stdout and stderr lead there; takes ownership."""
        for standard in (_STDOUT, _STDERR):
            os.dup2(fd, standard, inheritable=True)
        os.close(fd)

    def descriptors(self) -> dict[str, int]:
        """Return what the next program needs to go on with the relay, by name."""
        if self._relay is None:
            return {}
        shared = {_WRITE: _STDERR} if self._to_syslog else {}
        return {**self._relay.descriptors(), **shared}

    @contextmanager
    def opened(self, number: int, generation: int) -> Iterator[Opened]:
        """Give what a worker is to write to, for the time in which it is started.

        Nothing is left of it if that raises.  Raises OSError.
        """
        if self._relay is None or not self._prefixed:
            yield Opened()
            return
        read, write = os.pipe2(os.O_CLOEXEC)
        given = Opened({_STDOUT: write, _STDERR: write})
        try:
            yield given
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        self._relay.read_from(number, WorkerPipe(read, generation, given.pid))

    def reopen(self) -> None:
        """Open the log file anew under its name, after a rotation.  Raises OSError."""
        if self._log_file is not None:
            self._lead_to(open_log(self._log_file))
            if self._relay is not None:
                self._relay.reopened()

    def finish(self) -> None:
        """Write no more, and let the relay pass on the last; it stays if somebody else writes."""
        if self._relay is not None:
            self._lead_to(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
            self._relay.finish()

    def mark(self) -> int:
        """Return where the output stands now: what a worker says comes after it."""
        if self._relay is not None:
            return self._relay.mark()
        found = os.fstat(_STDERR)
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    def last_words(self, mark: int, pid: int, *, wait: bool = True) -> str:
        """Return the last lines written since mark, escaped; "" where nobody can read them.

        pid: whose, where that can be told.  wait: until the relay has all of it, which may
        take a second where it is busy.
        """
        if self._relay is not None:
            data = self._relay.kept(mark, pid, wait=wait)
        elif mark >= 0 and self._log_file is not None:
            data = _end_of(self._log_file, mark)
        elif mark >= 0:
            data = _end_of(f"/proc/self/fd/{_STDERR}", mark)
        else:
            return ""
        lines = data[-_LAST_BYTES:].decode("utf-8", "replace").splitlines()
        lines = [line for line in lines if not is_own(line)]
        return "\n".join(words.escape(line) for line in lines[-LAST_LINES:])

    def where_to_look(self) -> str:
        """Say where a worker's words are when they cannot be read back from here."""
        by_name = self._log_file or f"/proc/self/fd/{_STDERR}"
        to_file = stat.S_ISREG(os.fstat(_STDERR).st_mode) and os.path.exists(by_name)
        if self._relay is not None or to_file:
            return ""
        return "see the journal" if is_journal() else "see above for what it said"


def _end_of(path: str, mark: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return b""  # a folder closed to the user that was dropped to
    try:
        found = os.fstat(fd)
        if not os.path.samestat(found, os.fstat(_STDERR)):
            return b""  # another file has that name by now, perhaps one that is nobody's business
        size = found.st_size
        return os.pread(fd, _LAST_BYTES, max(mark, size - _LAST_BYTES))
    finally:
        os.close(fd)
