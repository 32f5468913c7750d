"""Runs check commands: `check:` of --ready, --health and --settle-check.

The shell runs the command as the worker's user and in the worker's environment.  The exit status
decides; the last line of output is the reason, for people.
Output goes to a pipe, not to the log.  In the log, a verbose command would fill the disk, and a
command that prints client data could forge lines.  We read the pipe to its end: otherwise the
command could block.  Each read is limited: otherwise a verbose command could keep the event loop
busy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress

from ..model import text
from ..model.lazy_dataclass import replace
from ..model.records import Program
from . import inherited
from .cleanup import on_error
from .loop import Loop
from .polling import read_now
from .process import Process
from .spawn import spawn

#: A check that takes longer is stuck, and is killed, because the next check may succeed.  The limit
#: is twice the time that a resolver allows a name server (resolv.conf(5)).
LIMIT_S = 10.0
#: The size of a pipe, the pause between reads, and the limit of reads after the command's exit.
#: Without that limit, a process that has left the group could write for ever.
_PIPE_BYTES, _READ_EVERY_S, _LAST_READS = 65_536, 0.01, 4
#: The bytes of output that are kept, and the characters of the last line that are shown.
_KEPT_BYTES, _SHOWN = 4096, 200
#: The program in a check, after any variable assignments; no match if these need a shell.
_PROGRAM = re.compile(
    r"""\s*(?:[A-Za-z_]\w*=(?:'[^']*'|"[^"\\$`]*"|[^\s'"\\$`;&|<>()]*)\s+)*"""
    r"""(?:exec\s+)?(?:[\w.+@/-]*/)?([\w.+][\w.+-]*)(?=[\s;&|<>]|$)"""
)


class CheckCommand:
    """A running check command.  Owns its process and the pipe."""

    def __init__(
        self,
        loop: Loop,
        program: Program,
        command: str,
        variables: Mapping[str, str],
        *,
        ended: Callable[[str], None],
        late: Callable[[str], None],
        limit_s: float,
        stdin: bytes = b"",
    ) -> None:
        """Start the command.  Raises OSError or ValueError.

        program: the worker's program, for its user, directory and environment.
        variables: added to the environment.
        ended: called once when the command has ended, with the reason of a failure; "" for success.
        late: called with the same reason when the command exceeds its limit and is killed.  A
        command that runs as another user may survive; `ended` is called when it has ended.
        stdin: the command's standard input.
        """
        self._loop, self._on_end, self._late = loop, ended, late
        self._program = first_program(command)
        self._tail, self._why_late = b"", ""
        self._output = -1
        self._process: Process | None = None
        shell = replace(program, path="/bin/sh", argv=("sh", "-c", command))
        with on_error(self.close):
            self._start(shell, variables, stdin)
            assert self._process is not None
            loop.watch(self._process.pidfd, self._ended)
            loop.watch(self._output, self._on_output)
            loop.call_after(self, limit_s, lambda: self._on_limit(limit_s))

    def _start(self, shell: Program, variables: Mapping[str, str], input_bytes: bytes) -> None:
        self._output, write = os.pipe2(os.O_CLOEXEC)
        try:
            os.set_blocking(self._output, False)  # this affects only our end
            descriptors = {1: write, 2: write}
            stdin_fd = inherited.memory_file("sp.check", input_bytes) if input_bytes else -1
            try:
                if input_bytes:
                    descriptors[0] = stdin_fd
                self._process = spawn(shell, variables, descriptors, mortal=True)
            finally:
                if input_bytes:
                    os.close(stdin_fd)
        finally:
            os.close(write)

    def close(self) -> None:
        """Kill the command if it runs, and close its pipe.  May be called twice."""
        self._loop.cancel(self)
        self._loop.cancel(self._resume_reading)
        if self._process is not None:
            self._loop.unwatch(self._process.pidfd)
            self._process.discard()
            self._process = None
        if self._output >= 0:
            self._loop.unwatch(self._output)
            os.close(self._output)
            self._output = -1

    @property
    def is_late(self) -> bool:
        """Whether the command exceeded its limit and was sent KILL, which it may survive."""
        return bool(self._why_late)

    def _on_limit(self, limit_s: float) -> None:
        if self._process is None or self._process.has_ended():
            return  # _ended() is called next
        self._why_late = f"{self._program}: no answer within {text.in_units(limit_s)}"
        with suppress(PermissionError):  # the command has changed its user
            self._process.kill_group()
        self._late(self._why_late)

    def _ended(self) -> None:
        result = self._process.reap() if self._process is not None else None
        if result is None or self._process is None:
            return
        with suppress(PermissionError):
            self._process.kill_group()  # otherwise each check could leave background processes
        for _ in range(_LAST_READS):
            if not self._read():
                break
        last = text.last_line(self._tail)[:_SHOWN]
        self.close()
        failed = ": ".join(filter(None, (self._program, result.how, last)))
        self._on_end(self._why_late or ("" if result.clean else failed))

    # -- output of the command -----------------------------------------------------

    def _on_output(self) -> None:
        self._loop.unwatch(self._output)
        if self._read() != b"":
            self._loop.call_after(self._resume_reading, _READ_EVERY_S, self._resume_reading)

    def _resume_reading(self) -> None:
        try:
            self._loop.watch(self._output, self._on_output)
        except OSError:
            self._loop.call_after(self._resume_reading, _READ_EVERY_S, self._resume_reading)

    def _read(self) -> bytes | None:
        """Read output and keep its tail; return b"" at end of file, None if no output waits."""
        data = read_now(os.read, self._output, _PIPE_BYTES)
        self._tail = (self._tail + (data or b""))[-_KEPT_BYTES:]
        return data


def first_program(command: str) -> str:
    """Return the first program of a shell command; the rest of the command may contain secrets."""
    found = _PROGRAM.match(command)
    return found[1] if found and found[1] != "exec" else "sh"  # exec with redirections only


def shown(check: str) -> str:
    """Return a check as text for people; of a command, only its program."""
    kind, _, command = check.partition(":")
    return f"{kind}:{first_program(command)}" if kind == "check" else check
