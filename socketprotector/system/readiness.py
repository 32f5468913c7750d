"""Ways in which a worker becomes ready other than READY=1, which the worker pool receives.

ack: einhorn's, a line on a socket that the environment names.  fd: a line on a descriptor whose
number the worker knows, as with s6.  check: a command that succeeds, asked again where it fails
or hangs.  after: a timer.  any: the first of READY=1, ack and fd, else the timer; without it where
the server was given the number of fd.  accept, http and https: the same, for what a worker says
counts where its generation is not asked any more; while it is, the timer does not run.

A line that was offered stays open until it was used or the worker ends: one that is known to be
ready by something else may write there later, and would be killed by SIGPIPE.

Source: einhorn.py; s6's notification-fd.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

from ..model import question
from ..model.einhorn import ack
from ..model.records import Program
from .loop import Loop
from .process import Process

#: Both kinds of line are short; a longer one is cut.
_LINE_BYTES = 4096
#: How soon after a check that failed the next one begins.
CHECK_EVERY_S = 0.25
#: A check that takes longer hangs: it asks a server that does not answer, and the next one may fare
#: better.  Twice the time that a resolver gives a name server (resolv.conf(5)).
CHECK_LIMIT_S = 10.0
#: Names of descriptors; `line` is RETURN's (daemon/worker_pool.py).
_ACK, _NEWLINE = "ack", "newline"
#: Kinds that a line brings.
_BY_ACK, _BY_LINE, _BY_WORD = ((kind, *question.ASKED) for kind in ("ack", "fd", "notify"))
_CHECK, _AFTER = "check", "after"
#: The program in a check, behind what is set for it alone; None where the shell has to read that.
_PROGRAM = re.compile(
    r"""\s*(?:[A-Za-z_]\w*=(?:'[^']*'|"[^"\\$`]*"|[^\s'"\\$`;&|<>()]*)\s+)*"""
    r"""(?:exec\s+)?(?:[\w.+@/-]*/)?([\w.+][\w.+-]*)(?=[\s;&|<>]|$)"""
)


class Readiness:
    """One worker's, beside its notify socket.  Owns our ends of its lines."""

    def __init__(self, program: Program, lines: Mapping[str, int], loop: Loop, number: int) -> None:
        """Take ownership of the lines: those that descriptors() has named.

        number: the worker's.
        """
        self._program = program
        self._loop = loop
        self._number = number
        self._lines = dict(lines)
        for fd in self._lines.values():
            os.set_blocking(fd, False)  # our end alone is this: the worker's is another description
        self._ready: Callable[[str], None] = _nothing
        self._hangs: Callable[[str], None] = _nothing
        self._changed: Callable[[], None] | None = None
        self._heard: dict[str, bytes] = {}
        self._start_check: Callable[[], Process] | None = None  # where one is to be run
        self._check: Process | None = None

    @classmethod
    @contextmanager
    def offered(
        cls, program: Program, free: Iterator[int], loop: Loop, number: int
    ) -> Iterator[tuple[Readiness, dict[int, int], dict[str, str]]]:
        """Make the lines; the worker's ends are there while its process is started.

        Gives number there -> ours, too, and what the environment says of them.
        free: numbers that it has no other descriptor at.  Nothing is left if that raises.
        Raises OSError.
        """
        theirs: dict[int, int] = {}
        variables: dict[str, str] = {}
        lines: dict[str, int] = {}
        try:
            if program.ready in _BY_ACK:
                ours, far_end = socket.socketpair()
                lines[_ACK] = ours.detach()
                number_there = next(free)
                theirs[number_there] = far_end.detach()
                variables["EINHORN_SOCK_FD"] = str(number_there)
            if program.ready_fd >= 0 and program.ready in _BY_LINE:
                lines[_NEWLINE], theirs[program.ready_fd] = os.pipe2(os.O_CLOEXEC)
            yield cls(program, lines, loop, number), theirs, variables
        except BaseException:
            for fd in lines.values():
                os.close(fd)
            raise
        finally:
            for fd in theirs.values():
                os.close(fd)

    @property
    def by_word(self) -> bool:
        """Whether READY=1 counts."""
        return self._program.ready in _BY_WORD

    @property
    def by_ack(self) -> bool:
        """Whether einhorn's ACK counts."""
        return self._program.ready in _BY_ACK

    @property
    def is_checked(self) -> bool:
        """Whether a command is run again and again for it."""
        return self._start_check is not None

    def descriptors(self) -> dict[str, int]:
        """Return what an adopter needs, by name."""
        return dict(self._lines)

    def watch(
        self,
        ready: Callable[[str], None],
        start_check: Callable[[], Process],
        hangs: Callable[[str], None],
        changed: Callable[[], None],
        *,
        known: bool = False,
        asked: bool = False,
    ) -> None:
        """Call back each time something says so, with what that is.  Raises OSError.

        known: it is ready, and its lines are only to be read.  asked: its generation is, or will
        be, so no timer says so.  hangs: called once, with the check's
        program, when it has run for CHECK_LIMIT_S.  changed: descriptors() has.
        """
        self._changed = changed
        for name, fd in self._lines.items():
            self._loop.watch(fd, lambda name=name, fd=fd: self._hear(name, fd))  # type: ignore[misc]
        if known:
            return
        self._ready, self._hangs = ready, hangs
        if not asked:
            self.wait()
        if self._program.ready == _CHECK:
            self._start_check = start_check
            self.check()

    def wait(self) -> None:
        """Take it as ready, if nothing says so before, after so long; said again, no later."""
        after_s, timer = self._program.ready_after_s, (_AFTER, self._number)
        if after_s is not None and self._loop.due(timer) is None:
            self._loop.call_after(timer, after_s, lambda: self._ready("timer"))

    def _hear(self, name: str, fd: int) -> None:
        try:
            data = os.read(fd, _LINE_BYTES) if self._lines.get(name) == fd else b""
        except BlockingIOError:
            return  # a wake-up for a number that was another's before
        except OSError:
            data = b""  # reset: it has closed its end
        heard = (self._heard.get(name, b"") + data)[-_LINE_BYTES:]
        *whole, self._heard[name] = heard.split(b"\n")
        said = bool(whole) if name == _NEWLINE else any(ack(each) is not None for each in whole)
        if said or not data:
            self._forget(name)
        if said:
            self._ready("line" if name == _NEWLINE else name)

    def _forget(self, name: str) -> None:
        fd = self._lines.pop(name, -1)
        if fd >= 0:
            self._loop.unwatch(fd)
            os.close(fd)
            if self._changed is not None:
                self._changed()

    # -- the check ---------------------------------------------------------------

    def check(self) -> None:
        """Begin to run the command, again and again, where there is one and it matters."""
        if self._start_check is None:
            return
        try:
            self._check = self._start_check()
            self._loop.watch(self._check.pidfd, self._check_ended)
        except (OSError, ValueError):
            self.stop_check()
            self._check_again()
        else:
            self._loop.call_after((_CHECK, self._number), CHECK_LIMIT_S, self._check_hangs)

    def _check_again(self) -> None:
        self._loop.call_after((_CHECK, self._number), CHECK_EVERY_S, self.check)

    def _check_hangs(self) -> None:
        """Kill it; its end, which is not waited for here, has the next one begin."""
        if self._check is None or self._check.has_ended():
            return
        hangs, self._hangs = self._hangs, _nothing
        hangs(program_of(self._program.ready_check))
        with suppress(PermissionError):  # it has become another user's, and is waited for
            self._check.kill_group()

    def _check_ended(self) -> None:
        result = self._check.reap() if self._check is not None else None
        if result is None or self._check is None:
            return
        with suppress(PermissionError):  # it has become another user's
            self._check.kill_group()  # what it has left in the background: there are many checks
        self.stop_check()
        if result.clean:
            self._ready(_CHECK)
        else:
            self._check_again()

    def stop_check(self) -> None:
        """End the check that is under way: its result would be lost."""
        self._loop.cancel((_CHECK, self._number))
        if self._check is not None:
            self._loop.unwatch(self._check.pidfd)
            self._check.discard()
            self._check = None

    def is_known(self) -> None:
        """The worker is ready; what it still says of that is read, and means nothing."""
        self.stop_check()
        self._loop.cancel((_AFTER, self._number))
        self._ready = self._hangs = _nothing
        self._start_check = None

    def close(self) -> None:
        """Nothing more is to be heard."""
        self.is_known()
        for name in tuple(self._lines):
            self._forget(name)
        # It leads back to the owner of this, and such circles are found late.
        self._changed = None


def _nothing(said: str) -> None:
    """It is known already, or not watched yet."""


def program_of(command: str) -> str:
    """Return which program a shell's command runs first: in the rest there may be secrets."""
    found = _PROGRAM.match(command)
    return found[1] if found else "sh"


def asks(text: str) -> str:
    """Return what --health or --settle-check asks, for people; of a command its program alone."""
    kind, _, command = text.partition(":")
    return f"{kind}:{program_of(command)}" if kind == _CHECK else text


def check_program(program: Program) -> Program:
    """Return what runs --ready check's command: as the worker runs, by the shell."""
    argv = ("sh", "-c", program.ready_check)
    return replace(program, path="/bin/sh", argv=argv)
