"""A command that checks something: `check:` of --ready, --health and --settle-check.

By the shell, as the worker's user and in its environment.  It is asked for an exit status; of what
it writes the last line is a reason for people.  That comes by a pipe, not into the log, where a
command that writes much would fill the disk, and one that shows what clients sent could forge
lines.  The pipe is read to its end, so that the command never waits for us; but a little at a time,
so that we do not work for it alone.
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

#: One that takes longer hangs: it asks a server that does not answer, and the next one may fare
#: better.  Twice the time that a resolver gives a name server (resolv.conf(5)).
LIMIT_S = 10.0
#: What a pipe holds; how soon after a read the next one is; and how many there are at the end,
#: when something that has left its group may write on for ever.
_PIPE_BYTES, _READ_EVERY_S, _LAST_READS = 65_536, 0.01, 4
#: What is kept of it, and shown.
_KEPT_BYTES, _SHOWN = 4096, 200
#: The program in a check, behind what is set for it alone; None where the shell has to read that.
_PROGRAM = re.compile(
    r"""\s*(?:[A-Za-z_]\w*=(?:'[^']*'|"[^"\\$`]*"|[^\s'"\\$`;&|<>()]*)\s+)*"""
    r"""(?:exec\s+)?(?:[\w.+@/-]*/)?([\w.+][\w.+-]*)(?=[\s;&|<>]|$)"""
)


class CheckCommand:
    """One run of one.  Owns its process, and the pipe."""

    def __init__(
        self,
        loop: Loop,
        program: Program,
        command: str,
        variables: Mapping[str, str],
        *,
        over: Callable[[str], None],
        late: Callable[[str], None],
        limit_s: float,
        told: bytes = b"",
    ) -> None:
        """Start it.  Raises OSError or ValueError.

        program: as whom, where and with which environment.  variables: on top of that.
        over: called once, when it has ended, with why it has failed; "" if it has not.
        late: called before that, where it has not ended in time, with the same words; it has been
        killed then, but may live on as another user's.  told: what it reads on stdin.
        """
        self._loop, self._over, self._late = loop, over, late
        self._program = first_program(command)
        self._said, self._why_late = b"", ""
        self._output = -1
        self._process: Process | None = None
        shell = replace(program, path="/bin/sh", argv=("sh", "-c", command))
        with on_error(self.close):
            self._start(shell, variables, told)
            assert self._process is not None
            loop.watch(self._process.pidfd, self._ended)
            loop.watch(self._output, self._hear)
            loop.call_after(self, limit_s, lambda: self._time_is_over(limit_s))

    def _start(self, shell: Program, variables: Mapping[str, str], told: bytes) -> None:
        self._output, write = os.pipe2(os.O_CLOEXEC)
        try:
            os.set_blocking(self._output, False)  # our end alone is this
            descriptors = {1: write, 2: write}
            stdin = inherited.memory_file("sp.check", told) if told else -1
            try:
                if told:
                    descriptors[0] = stdin
                self._process = spawn(shell, variables, descriptors, mortal=True)
            finally:
                if told:
                    os.close(stdin)
        finally:
            os.close(write)

    def close(self) -> None:
        """Kill it, if it has not ended, and hear no more; again: nothing."""
        self._loop.cancel(self)
        self._loop.cancel(self._hear_again)
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
        """Whether it was killed, as it had not ended in time; it may live on."""
        return bool(self._why_late)

    def _time_is_over(self, limit_s: float) -> None:
        if self._process is None or self._process.has_ended():
            return  # that is handled next
        self._why_late = f"{self._program}: no answer within {text.in_units(limit_s)}"
        with suppress(PermissionError):  # it has become another user's
            self._process.kill_group()
        self._late(self._why_late)

    def _ended(self) -> None:
        result = self._process.reap() if self._process is not None else None
        if result is None or self._process is None:
            return
        with suppress(PermissionError):
            self._process.kill_group()  # what it has left in the background: there are many checks
        for _ in range(_LAST_READS):
            if not self._read():
                break
        last = text.last_line(self._said)[:_SHOWN]
        self.close()
        failed = ": ".join(filter(None, (self._program, result.how, last)))
        self._over(self._why_late or ("" if result.clean else failed))

    # -- what it says ------------------------------------------------------------

    def _hear(self) -> None:
        self._loop.unwatch(self._output)
        if self._read() != b"":
            self._loop.call_after(self._hear_again, _READ_EVERY_S, self._hear_again)

    def _hear_again(self) -> None:
        try:
            self._loop.watch(self._output, self._hear)
        except OSError:
            self._loop.call_after(self._hear_again, _READ_EVERY_S, self._hear_again)

    def _read(self) -> bytes | None:
        """Keep the end of what it says; b"": that was all, None: for now."""
        data = read_now(os.read, self._output, _PIPE_BYTES)
        self._said = (self._said + (data or b""))[-_KEPT_BYTES:]
        return data


def first_program(command: str) -> str:
    """Return which program a shell's command runs first: in the rest there may be secrets."""
    found = _PROGRAM.match(command)
    return found[1] if found and found[1] != "exec" else "sh"  # exec alone: only redirections


def shown(question: str) -> str:
    """Return what --health or --settle-check asks, for people; of a command its program alone."""
    kind, _, command = question.partition(":")
    return f"{kind}:{first_program(command)}" if kind == "check" else question
