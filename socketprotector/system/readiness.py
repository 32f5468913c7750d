"""The ways in which a worker becomes ready, except READY=1, which the worker pool receives.

ack: einhorn's line on a socket that the environment names.
fd: a line on a descriptor whose number the worker knows, as with s6.
check: a command that succeeds; it runs again if it fails or is stuck.
after: a timer.
any: the first of READY=1, ack and fd, or the timer.  There is no timer if the server knows the
number of fd.
accept, http and https: the same as any, but the timer does not run while the generation is probed.

A line stays open until it is used or the worker ends.  A worker that became ready in another way
may write to the line later; on a closed line, SIGPIPE would kill the worker.

Source: einhorn.py; s6's notification-fd.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from ..model import einhorn
from ..model.errors import what_failed
from ..model.ready_kinds import LINE, PROBED, TIMER
from ..model.records import Program
from .foreign_descriptors import close_unread, dropping
from .loop import Loop
from .polling import read_now

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .check_command import CheckCommand

    #: Starts a check; calls the first argument when it is over, the second if it gets stuck before.
    StartCheck = Callable[[Callable[[str], None], Callable[[str], None]], CheckCommand]

#: Both kinds of line are short; a longer line is cut.
_LINE_BYTES = 4096
#: The pause between a failed check and the next one.
CHECK_EVERY_S = 0.25
#: Names of descriptors; `line` is the RETURN line (daemon/worker_pool.py).
_ACK, _NEWLINE = "ack", "newline"
#: The kinds of --ready under which an ack, a line and READY=1 count.
_BY_ACK, _BY_LINE, _BY_MESSAGE = ((kind, *PROBED) for kind in ("ack", "fd", "notify"))
_CHECK, _AFTER = "check", "after"


class Readiness:
    """The readiness of one worker, except its notify socket.  Owns our ends of its lines."""

    def __init__(self, program: Program, lines: Mapping[str, int], loop: Loop, number: int) -> None:
        """Take ownership of the lines that descriptors() has named.

        number: the worker's number.
        """
        self._program = program
        self._loop = loop
        self._number = number
        self._lines = dict(lines)
        for fd in self._lines.values():
            os.set_blocking(fd, False)  # the worker's end is unaffected
        self._ready: Callable[[str], None] = _nothing
        self._hangs: Callable[[str], None] = _nothing
        self._fails: Callable[[str], None] = _nothing
        self._changed: Callable[[], None] | None = None
        self._heard: dict[str, bytes] = {}
        self._start_check: StartCheck | None = None  # None: no check is needed
        self._check: CheckCommand | None = None
        #: The failure of the last check, for people.
        self.last = ""

    @classmethod
    @contextmanager
    def offered(
        cls, program: Program, free: Iterator[int], loop: Loop, number: int
    ) -> Iterator[tuple[Readiness, dict[int, int], dict[str, str]]]:
        """Make the lines, and keep the worker's ends open until the block has started its process.

        Yields the readiness, number in the worker -> our descriptor, and environment variables.
        free: unused numbers in the worker.  If the block raises, all lines are closed.
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
    def by_message(self) -> bool:
        """Whether READY=1 counts."""
        return self._program.ready in _BY_MESSAGE

    @property
    def by_ack(self) -> bool:
        """Whether einhorn's ACK counts."""
        return self._program.ready in _BY_ACK

    @property
    def is_checked(self) -> bool:
        """Whether a check command is repeated until it succeeds."""
        return self._start_check is not None

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors for the next program, by name."""
        return dict(self._lines)

    def watch(
        self,
        ready: Callable[[str], None],
        start_check: StartCheck,
        hangs: Callable[[str], None],
        fails: Callable[[str], None],
        changed: Callable[[], None],
        *,
        known: bool = False,
        probed: bool = False,
    ) -> None:
        """Watch the lines, and call back when the worker is ready.  Raises OSError.

        ready: called with the way in which the worker became ready, perhaps several times.
        hangs, fails: called for the first check that is stuck, or fails, with the reason.
        changed: called when descriptors() has changed.
        known: the worker is ready already, and we only read its lines.
        probed: its generation is probed, or will be, so no timer makes the worker ready.
        """
        self._changed = changed
        for name, fd in self._lines.items():
            self._loop.watch(fd, lambda name=name, fd=fd: self._read(name, fd))  # type: ignore[misc]
        if known:
            return
        self._ready, self._hangs, self._fails = ready, hangs, fails
        if not probed:
            self.start_timer()
        if self._program.ready == _CHECK:
            self._start_check = start_check
            self.check()

    def start_timer(self) -> None:
        """Start the timer after which the worker counts as ready; a running timer stays."""
        after_s, timer = self._program.ready_after_s, (_AFTER, self._number)
        if after_s is not None and self._loop.due(timer) is None:
            self._loop.call_after(timer, after_s, lambda: self._ready(TIMER))

    def _read(self, name: str, fd: int) -> None:
        if self._lines.get(name) != fd:
            return  # closed by an earlier callback
        with dropping():
            data = read_now(os.read, fd, _LINE_BYTES)
        if data is None:
            return
        heard = (self._heard.get(name, b"") + data)[-_LINE_BYTES:]
        *whole, self._heard[name] = heard.split(b"\n")
        said = (
            bool(whole)
            if name == _NEWLINE
            else any(einhorn.ack(each) is not None for each in whole)
        )
        if said or not data:
            self._forget(name)
        if said:
            self._ready(LINE if name == _NEWLINE else name)

    def _forget(self, name: str) -> None:
        fd = self._lines.pop(name, -1)
        if fd >= 0:
            self._loop.unwatch(fd)
            if name == _ACK:
                close_unread(socket.socket(fileno=fd))
            else:
                os.close(fd)
            if self._changed is not None:
                self._changed()

    # -- the check ---------------------------------------------------------------

    def check(self) -> None:
        """Run the check command until it succeeds, if there is one and it is still needed."""
        if self._start_check is None:
            return
        try:
            self._check = self._start_check(self._check_over, self._check_hangs)
        except (OSError, ValueError) as error:
            self._check_over(f"the check cannot be started: {what_failed(error)}")

    def _check_over(self, why: str) -> None:
        self.stop_check()
        if not why:
            self._ready(_CHECK)
            return
        self.last = why
        fails, self._fails = self._fails, _nothing
        fails(why)
        self._loop.call_after((_CHECK, self._number), CHECK_EVERY_S, self.check)

    def _check_hangs(self, why: str) -> None:
        """Report a stuck check, which was killed; the next check begins when it has ended."""
        hangs, self._hangs = self._hangs, _nothing
        self._fails = _nothing  # one report is enough
        hangs(why)

    def stop_check(self) -> None:
        """End the running check: its result no longer matters."""
        self._loop.cancel((_CHECK, self._number))
        if self._check is not None:
            self._check.close()
            self._check = None

    def note_ready(self) -> None:
        """Await readiness no longer; the worker's lines are read, but have no effect."""
        self.stop_check()
        self._loop.cancel((_AFTER, self._number))
        self._ready = self._hangs = self._fails = _nothing
        self._start_check = None
        self.last = ""

    def close(self) -> None:
        """Close the lines."""
        self.note_ready()
        for name in tuple(self._lines):
            self._forget(name)
        # The callback refers to our owner, and the garbage collector finds such cycles late.
        self._changed = None


def _nothing(said: str) -> None:
    """Do nothing: readiness is known already, or not watched yet."""
