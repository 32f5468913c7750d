"""An upgrade: replaces the protector's program in place, if the new program can take over.

First another process, the trial, runs the new program, which loads the state and answers.  Then
this process executes the new program, and keeps its pid, children and descriptors.  If the
installation is broken, the trial fails, and nothing changes.  A check (`upgrade --check`) runs
only the trial, with a copy of the state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext

from .. import __version__
from ..model.errors import what_failed
from ..model.lazy_dataclass import KW_ONLY, field, mutable
from ..model.text import in_units
from ..system import executable, inherited, privileges
from ..system.helper import HelperProcess, last_line
from ..system.log import Log
from ..system.loop import Loop

#: How long the trial may take to load the program on a busy machine.
TRIAL_S = 30.0
_ANSWER_BYTES = 4096
_ANSWER = b"ok "
_TIMER = "trial"
_OUTPUT_BYTES = 4096

#: The descriptors that a trial reads.
_NEEDED = (inherited.SETTINGS, inherited.STATE)

#: A callback for the result of a trial; its arguments are version and failure.  If the new program
#: can take over: the new version, and "".  If not: "" and the reason.  If the check was called off:
#: "" and "".
Answered = Callable[[str, str], None]


@mutable
class Upgrade:
    """Runs one trial at a time, for an upgrade or a check, and executes the new program."""

    #: The command that executes the protector.  Once a new version is installed, the same command
    #: runs the new version.
    command: tuple[str, ...]
    loop: Loop
    log: Log
    _: KW_ONLY
    #: Whether the new program needs the capabilities that we kept (system/privileges.py).
    keeps_capabilities: bool
    _trial: HelperProcess | None = None
    _opened: ExitStack = field(default_factory=ExitStack)  # the trial's answer and output
    _check: Answered | None = None  # called with a check's result; None: no check is in progress
    _is_gone: Callable[[], bool] = bool  # whether the client of the last check has gone

    def begin(self, descriptors: Mapping[str, int], ready: Callable[[], None]) -> None:
        """Try the new program with the settings and the state; if that succeeds, call `ready`.

        If another upgrade's trial is running, only write a log line.  If a check is running, call
        off the check first, because the exec would end the check.
        """
        if self.is_trying:
            self.log.write("info", "upgrade-under-way")
            return
        self._call_off_check()

        def answered(version: str, failure: str) -> None:
            if failure:
                self.failed(failure)
                return
            self.log.write("info", "upgrading", version=version)
            ready()

        self._start({each: descriptors[each] for each in _NEEDED}, answered)

    def check(
        self, copies: Mapping[str, int], answered: Answered, is_gone: Callable[[], bool]
    ) -> None:
        """Try the new program with copies of the settings and the state, and call `answered`.

        Call this only if no check and no upgrade is in progress.

        is_gone: whether the check's client has gone, for end_unwanted_check().
        """

        def done(version: str, failure: str) -> None:
            self._check = None
            answered(version, failure)

        self._check, self._is_gone = answered, is_gone
        self._start(copies, done)

    def end_unwanted_check(self) -> None:
        """End a check whose client has gone."""
        if self._is_gone():
            self._call_off_check()

    def _call_off_check(self) -> None:
        if self._check is not None and self._trial is not None:
            self.loop.cancel(_TIMER)
            self._trial.discard()
            self._opened.close()
            self._trial, answered, self._check = None, self._check, None
            answered("", "")

    def _start(self, given: Mapping[str, int], answered: Answered) -> None:
        def ended(how: str) -> None:
            late = self.loop.due(_TIMER) is None
            self.loop.cancel(_TIMER)
            answer, last, place = _read(receive), last_line(output), _place(output)
            opened.close()
            self._trial = None
            if answer.startswith(_ANSWER):
                answered(answer[len(_ANSWER) :].decode("ascii", "replace").strip(), "")
                return
            how = f"did not answer in {in_units(TRIAL_S)}" if late else how
            answered("", f"the new program {how}: {last}{place}")

        self._opened = opened = ExitStack()
        try:
            receive, send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            opened.callback(os.close, receive)
            with open(send, "wb", buffering=0):  # closes our copy once the trial has its own
                output = os.memfd_create("sp.trial", os.MFD_CLOEXEC)
                opened.callback(os.close, output)
                given = {**given, inherited.PROBE: send}
                if self.is_checking:
                    given[inherited.CHECK] = send
                start = HelperProcess.start_protector
                self._trial = start(self.command, given, output, self.loop, ended)
        except OSError as error:
            opened.close()
            error.filename = error.filename or self.command[0]
            answered("", what_failed(error))
            return
        self.loop.call_after(_TIMER, TRIAL_S, self._trial.process.kill_group)

    @property
    def is_trying(self) -> bool:
        """Return whether the trial of an upgrade is running."""
        return self._trial is not None and self._check is None

    @property
    def is_checking(self) -> bool:
        return self._check is not None

    def end(self) -> None:
        """Kill a running trial, because this process is about to exit."""
        if self._trial is not None:
            self._trial.discard()

    def failed(self, reason: str) -> None:
        """Log why the old program keeps running."""
        hint = f"version {__version__} keeps running"
        self.log.write("error", "upgrade-failed", reason=reason, hint=hint)

    def execute(self, descriptors: Mapping[str, int]) -> None:
        """Execute the new program; signals must be blocked.

        Returns only if the exec fails; then nothing has changed.
        """
        self.log.flush()
        kept = {name: fd for name, fd in descriptors.items() if fd >= inherited.FIRST}
        try:
            executable.need_descriptors()
            with (
                privileges.lent() if self.keeps_capabilities else nullcontext(),
                inherited.kept_through_exec(kept) as variables,
            ):
                os.execve(self.command[0], self.command, {**os.environ, **variables})
        except OSError as error:
            error.filename = error.filename or self.command[0]
            self.failed(what_failed(error))


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _ANSWER_BYTES)
    except BlockingIOError:
        return b""


def _place(output: int) -> str:
    """Return the last file and line of a traceback in the output; "": there is no traceback."""
    size = os.fstat(output).st_size
    start = max(0, size - _OUTPUT_BYTES)
    text = os.pread(output, _OUTPUT_BYTES, start).decode("utf-8", "replace")
    _, found, rest = text.rpartition('  File "')
    path, _, rest = rest.partition('", line ')
    number = rest.partition("\n")[0].partition(",")[0]
    return f" ({path}, line {number})" if found and number.isdigit() else ""
