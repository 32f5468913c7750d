"""Starts, reaps and releases helper processes.

The helpers are relay, watcher, prober, configuration reader, release writer and upgrade probe.  The
module that uses a helper has its protocol.
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

#: Runs a program from the source in a memfd, without /proc; the first argument is its path.
_RUN = (
    "import os,sys;del sys.argv[0];"
    "exec(compile(os.pread({fd},os.fstat({fd}).st_size,0),sys.argv[0],'exec'))"
)

#: Called when a helper has ended, with a text that says how.
Ended = Callable[[str], None]


class HelperProcess:
    """One helper process, owned until it has ended or is released."""

    def __init__(self, process: Process, loop: Loop, ended: Ended) -> None:
        """Watch a running process; call `ended` once, when it is reaped.  Raises OSError."""
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
        """Start a helper with our own environment.  For arguments see spawn().  Raises OSError."""
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
        """Start one of late_modules.PROGRAMS, with the code as of our own start.  Raises OSError.

        options: options of the interpreter.
        """
        path, text = late_modules.program(program)
        code_fd = max(descriptors) + 1  # in the helper
        argv = (sys.executable, *options, "-c", _RUN.format(fd=code_fd), path, *words)
        code = inherited.memory_file("sp.program", text)
        try:
            return cls.start(argv, {**descriptors, code_fd: code}, loop, ended, batch=batch)
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
        """Start the protector's program, with descriptors by name.  Raises OSError.

        output: the descriptor for the program's stdout and stderr.
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
        # ChildProcessError: an earlier program's child, which another process has reaped.
        with suppress(ChildProcessError):
            end = self.process.reap()
            if end is None:
                return  # a traced process cannot be waited for yet
            how = end.how
        self.close()
        self._ended(how)

    @property
    def proven(self) -> bool:
        """Whether it has lived long enough not to count as a failed start."""
        return time.monotonic() - self._since >= _PROVEN_S

    def close(self) -> None:
        """Release the process, running or not; reap_orphans() reaps it later."""
        if self._disown():
            self.process.close()

    def discard(self) -> None:
        """Kill the process, if it runs, and release it."""
        if self._disown():
            self.process.discard()

    def _disown(self) -> bool:
        owned, self._owned = self._owned, False
        if owned:
            self._loop.unwatch(self.process.pidfd)
        return owned


class BackOff:
    """The waits before a helper is restarted: each wait is twice as long as the last."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._longest_s = longest_s

    def reset(self) -> None:
        """Begin with the first wait again, because the helper has worked."""
        self._next_s = self._first_s

    def wait_s(self) -> float:
        """Return the seconds to wait this time."""
        wait_s, self._next_s = self._next_s, min(self._next_s * 2, self._longest_s)
        return wait_s


class Line:
    """Our end of a SEQPACKET socket on which a helper sends messages."""

    def __init__(self, loop: Loop, sock: socket.socket, heard: Callable[[str], None]) -> None:
        """Take ownership of the socket, and call `heard` with each message.

        Raises OSError, after closing the socket.
        """
        self._loop, self._heard = loop, heard
        self.socket = sock
        with on_error(sock.close):
            loop.watch(sock.fileno(), self.handle_waiting)

    @classmethod
    def make(cls, loop: Loop, heard: Callable[[str], None]) -> tuple[Line, socket.socket]:
        """Return a new line, and the helper's end of it.  Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with on_error(theirs.close):
            return cls(loop, ours, heard), theirs

    def handle_waiting(self) -> None:
        """Handle all waiting messages; the pidfd, not end of file, reports the helper's end."""
        while self.socket.fileno() >= 0:
            data = read_now(self.socket.recv, _MESSAGE_BYTES, socket.MSG_DONTWAIT)
            if data is None:
                return
            if not data:
                self._loop.unwatch(self.socket.fileno())
                return
            self._heard(data.decode("utf-8", "replace"))

    def close(self) -> None:
        """Close the line, so that the helper exits."""
        self._loop.unwatch(self.socket.fileno())
        self.socket.close()


def last_line(output: int) -> str:
    """Return the last line in a file of output, or "it said nothing"."""
    size = os.fstat(output).st_size
    last = os.pread(output, _LAST_BYTES, max(0, size - _LAST_BYTES))
    return text.last_line(last) or "it said nothing"
