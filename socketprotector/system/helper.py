"""Processes of our own program beside the workers: relay, watcher, configuration reader, probe.

All are started, reaped and released here; the protocol with each is in the module that starts it.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from ..model import text
from ..model.records import Program
from . import inherited, late_modules
from .cleanup import on_error
from .loop import Loop
from .polling import read_now
from .process import Process
from .spawn import spawn

_PROVEN_S = 60.0
_LAST_BYTES = 4096
_MESSAGE_BYTES = 4096

#: Runs a program whose text is in a memfd; its path comes first.  Needs no /proc.
_RUN = (
    "import os,sys;del sys.argv[0];"
    "exec(compile(os.pread({fd},os.fstat({fd}).st_size,0),sys.argv[0],'exec'))"
)

#: Called with how one ended.
Ended = Callable[[str], None]


class HelperProcess:
    """One of them.  Owns the process, until that has ended or is let go of."""

    def __init__(self, process: Process, loop: Loop, ended: Ended) -> None:
        """Go on with a process.  Calls back once, when it is reaped.  Raises OSError."""
        self.process = process
        self._since = time.monotonic()
        self._loop = loop
        self._ended = ended
        self._owned = True
        loop.watch(process.pidfd, self._reap)

    @classmethod
    def start(
        cls,
        argv: tuple[str, ...],
        descriptors: Mapping[int, int],
        loop: Loop,
        ended: Ended,
        *,
        variables: Mapping[str, str] | None = None,
        umask: int = 0o077,
        batch: bool = False,
        tell_pid: str = "",
    ) -> HelperProcess:
        """Start one with our own environment; for the rest see spawn().  Raises OSError."""
        program = Program(
            path=argv[0],
            argv=argv,
            directory="/",
            environment=tuple(os.environ.items()),
            umask=umask,
            limits=(),
            nice=0,
            batch=batch,
        )
        process = spawn(program, variables or {}, descriptors, tell_pid)
        with on_error(process.discard):  # the system is short of memory
            return cls(process, loop, ended)

    @classmethod
    def start_own(
        cls,
        program: str,
        words: Sequence[str],
        descriptors: Mapping[int, int],
        loop: Loop,
        ended: Ended,
        *,
        options: tuple[str, ...] = ("-I", "-S"),
        batch: bool = False,
    ) -> HelperProcess:
        """Start one of late_modules.PROGRAMS, as it was when we started.  Raises OSError.

        options: the interpreter's.
        """
        path, text = late_modules.program(program)
        there = max(descriptors) + 1
        argv = (sys.executable, *options, "-c", _RUN.format(fd=there), path, *words)
        code = inherited.memory_file("sp.program", text)
        try:
            return cls.start(argv, {**descriptors, there: code}, loop, ended, batch=batch)
        finally:
            os.close(code)

    @classmethod
    def start_protector(
        cls,
        command: tuple[str, ...],
        given: Mapping[str, int],
        output: int,
        loop: Loop,
        ended: Ended,
        *,
        umask: int = 0o077,
    ) -> HelperProcess:
        """Start the protector's program with descriptors that it finds by name.  Raises OSError.

        output: where what it writes goes.
        """
        return cls.start(
            command,
            {1: output, 2: output, **dict(enumerate(given.values(), inherited.FIRST))},
            loop,
            ended,
            variables=inherited.names(given),
            umask=umask,
            tell_pid=inherited.PID,
        )

    def _reap(self) -> None:
        how = "ended"
        # ChildProcessError: an earlier program's child, reaped by the process that adopted it.
        with suppress(ChildProcessError):
            end = self.process.reap()
            if end is None:
                return  # it cannot be waited for yet: it is traced
            how = end.how
        self.close()
        self._ended(how)

    @property
    def proven(self) -> bool:
        """Whether it has lived so long that it was no failure from the beginning."""
        return time.monotonic() - self._since >= _PROVEN_S

    def close(self) -> None:
        """Let go of it, whether it runs or not; it is reaped as any other child then."""
        if self._disown():
            self.process.close()

    def discard(self) -> None:
        """Kill it, if it has not ended, and let go of it."""
        if self._disown():
            self.process.discard()

    def _disown(self) -> bool:
        owned, self._owned = self._owned, False
        if owned:
            self._loop.unwatch(self.process.pidfd)
        return owned


class BackOff:
    """How long to wait before one is started again: longer each time in a row."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._longest_s = longest_s

    def reset(self) -> None:
        """Wait for the first time again: one has done well."""
        self._next_s = self._first_s

    def wait_s(self) -> float:
        """Return how long to wait this time."""
        wait_s, self._next_s = self._next_s, min(self._next_s * 2, self._longest_s)
        return wait_s


class Line:
    """Our end of a SEQPACKET socket, on which one of them says something with each message."""

    def __init__(self, loop: Loop, one: socket.socket, heard: Callable[[str], None]) -> None:
        """Take ownership of the socket.  Raises OSError, with the socket closed."""
        self._loop, self._heard = loop, heard
        self.socket = one
        with on_error(one.close):
            loop.watch(one.fileno(), self.hear)

    @classmethod
    def make(cls, loop: Loop, heard: Callable[[str], None]) -> tuple[Line, socket.socket]:
        """Make one, and the end that is the process's.  Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with on_error(theirs.close):
            return cls(loop, ours, heard), theirs

    def hear(self) -> None:
        """Handle all that was said so far; the end of the process comes by its pidfd."""
        while self.socket.fileno() >= 0:
            data = read_now(self.socket.recv, _MESSAGE_BYTES, socket.MSG_DONTWAIT)
            if data is None:
                return
            if not data:
                self._loop.unwatch(self.socket.fileno())
                return
            self._heard(data.decode("utf-8", "replace"))

    def close(self) -> None:
        """Hear no more: the process ends, as its end of the line does."""
        self._loop.unwatch(self.socket.fileno())
        self.socket.close()


def last_line(output: int) -> str:
    """Return the last line that was written to a file, in words where there is none."""
    size = os.fstat(output).st_size
    last = os.pread(output, _LAST_BYTES, max(0, size - _LAST_BYTES))
    return text.last_line(last) or "it said nothing"
