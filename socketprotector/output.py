"""Where the workers' output goes, and a failed worker's last words from there.

Workers write to the terminal, the journal or the log file themselves.  Only where lines
must be handled, on their way to syslog, a relay process reads them; the protector keeps
the pipe's read end too, so that the relay's death breaks nobody's output, and starts it anew.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import sys
import termios
from collections.abc import Callable, Mapping

from . import door, relay, words
from .line import is_own
from .log import is_journal
from .logfile import open_log
from .loop import Loop
from .process import Process, spawn
from .records import Program

_STDOUT, _STDERR = 1, 2
LAST_LINES = 20
_LAST_BYTES = 4096
#: How long the last words of a worker may take through the relay: a moment, but longer
#: when it is just being started, and for ever when it has died.
_RELAY_LOOK_MS = 5
_RELAY_LOOKS = 200
_RESTART_S = 1.0
#: How long the end waits for the relay, which ends at once unless somebody still writes.
_RELAY_END_S = 3.0


class Output:
    """The place that stdout and stderr of the protector and its workers lead to."""

    def __init__(self, log_file: str | None) -> None:
        self._log_file = log_file
        self._tail = -1
        self._pipe = -1
        self._relay: Process | None = None
        #: Called when another relay is the one to go on with, or none is.
        self.changed: Callable[[], object] = lambda: None

    @property
    def relayed(self) -> bool:
        return self._pipe >= 0

    def start_relay(self, name: str, loop: Loop, ended: Callable[[], None]) -> None:
        """Send stdout and stderr through a relay to syslog.  Raises OSError."""
        self._tail = os.memfd_create("sp.tail", os.MFD_CLOEXEC)
        self._pipe, write = os.pipe2(os.O_CLOEXEC)
        for fd in (_STDOUT, _STDERR):
            os.dup2(write, fd, inheritable=True)
        os.close(write)
        self._spawn_relay(name, loop, ended)

    def descriptors(self) -> dict[str, int]:
        """Return what the next program needs to go on with the relay, by name."""
        if not self.relayed:
            return {}
        found = {"read": self._pipe, "write": _STDERR, "tail": self._tail}
        if self._relay is not None:
            found[f"process.{self._relay.pid}"] = self._relay.pidfd
        return {f"{door.RELAY}{name}": fd for name, fd in found.items()}

    def adopt_relay(
        self, descriptors: Mapping[str, int], name: str, loop: Loop, ended: Callable[[], None]
    ) -> None:
        """Go on with the relay that an earlier program started; takes ownership."""
        self._tail, self._pipe = descriptors["tail"], descriptors["read"]
        if "write" in descriptors:  # else stderr has come along as it is
            for fd in (_STDOUT, _STDERR):
                os.dup2(descriptors["write"], fd, inheritable=True)
            os.close(descriptors["write"])
        for key, pidfd in descriptors.items():
            if key.startswith("process."):
                process = Process(int(key.removeprefix("process.")), pidfd)
                # Two, if the program before was killed between giving one away and the other.
                first, self._relay = self._relay, process
                if first is not None and process.has_ended():
                    first, self._relay = process, first
                if first is not None:
                    first.close()
        if self._relay is None:
            self._spawn_relay(name, loop, ended)
        else:
            self._watch_relay(self._relay, name, loop, ended)

    def _spawn_relay(self, name: str, loop: Loop, ended: Callable[[], None]) -> None:
        program = Program(
            path=sys.executable,
            argv=(sys.executable, "-I", "-S", relay.__file__, name, "3"),
            directory="/",
            environment=tuple(os.environ.items()),
            umask=0o077,
            limits=(),
            nice=0,
        )
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        # It must not hold the write end, or it would never see its last writer go.
        descriptors = {0: self._pipe, 1: null, 2: null, 3: self._tail}
        try:
            process = spawn(program, {}, descriptors)
        finally:
            os.close(null)
        self._watch_relay(process, name, loop, ended)

    def _watch_relay(
        self, process: Process, name: str, loop: Loop, ended: Callable[[], None]
    ) -> None:
        self._relay = process

        def gone() -> None:
            try:
                if process.reap() is None:
                    return  # a wake-up for a number that was another's before
            except ChildProcessError:
                pass  # an earlier program's child: reaped by whoever adopted it
            loop.unwatch(process.pidfd)
            process.close()
            self._relay = None
            ended()
            self.changed()
            loop.call_after("relay", _RESTART_S, again)

        def again() -> None:
            try:
                self._spawn_relay(name, loop, ended)
            except OSError:  # out of descriptors: what is written waits in the pipe
                loop.call_after("relay", _RESTART_S, again)
            else:
                self.changed()  # else the next program starts another one, beside this one

        loop.watch(process.pidfd, gone)

    def reopen(self) -> None:
        """Open the log file anew under its name, after a rotation.  Raises OSError."""
        if self._log_file is not None:
            fd = open_log(self._log_file)
            for standard in (_STDOUT, _STDERR):
                os.dup2(fd, standard, inheritable=True)
            os.close(fd)

    def finish(self) -> None:
        """Write no more, and let the relay pass on the last; it stays if somebody else writes."""
        if self._relay is None:
            return
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for fd in (_STDOUT, _STDERR):
            os.dup2(null, fd)
        os.close(null)
        poll = select.poll()
        poll.register(self._relay.pidfd, select.POLLIN)
        poll.poll(_RELAY_END_S * 1000)

    def mark(self) -> int:
        """Return where the output stands now: what a worker says comes after it."""
        if self.relayed:
            return relay.written(self._tail)
        found = os.fstat(_STDERR)
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    def last_words(self, mark: int, *, wait: bool = True) -> str:
        """Return the last lines written since mark, escaped; "" where nobody can read them.

        wait: until the relay has all of it, which may take a second where it is busy.
        """
        if self.relayed:
            if wait:
                self._wait_for_relay()
            data = relay.kept(self._tail, mark)
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
        if self.relayed or stat.S_ISREG(os.fstat(_STDERR).st_mode):
            return ""
        return "see the journal" if is_journal() else "see above for what it said"

    def _wait_for_relay(self) -> None:
        """Wait until the relay has read, and kept, all that is in the pipe."""
        waiting = bytearray(4)
        for _ in range(_RELAY_LOOKS):
            fcntl.ioctl(self._pipe, termios.FIONREAD, waiting)
            if not any(waiting) and relay.is_idle(self._tail):
                return
            select.poll().poll(_RELAY_LOOK_MS)


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
