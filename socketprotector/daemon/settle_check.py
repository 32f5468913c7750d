"""--settle-check: asks the generation that has the route, as long as the one before it stands by.

By HTTP the asker asks, as before a generation serves (asking.py).  A command gets what is counted
of both generations, and decides by its own measure: it may ask at the probe address, or the
operator's metrics.

The first bad answer is the last: who asks twice before going back has clients fail meanwhile.  And
--settle is over with a good one alone, so that none that takes long comes too late.  What cannot
be asked for as long as an answer may take is as bad: nobody knows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from ..core.events import SettleFailed
from ..model import question
from ..model.question import Question
from ..system.process import Process, spawn
from ..system.readiness import CHECK_LIMIT_S, program_of
from .asker_client import Asker
from .check_probe import CheckProbes
from .generation import OpenGeneration
from .probe_port import PROBE, Way
from .runtime import Runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_EVERY_S = 1.0
#: How soon after something of ours has failed it is tried again.
_AGAIN_S = 0.25
_NEXT, _LIMIT = "settle-check", "settle-check-limit"
#: What is kept of a command's output: its last line is shown.
_KEPT_BYTES = 4096
#: What a pipe holds, and how often at most that is read at the end.
_PIPE_BYTES, _READS = 65_536, 4
_SHOWN = 200


class SettleCheck:
    """Carries out CheckSettling and StopChecking."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        reach: Callable[[OpenGeneration, Question], Way | None],
        probes: CheckProbes,
        paused: Callable[[], bool],
    ) -> None:
        """reach: makes a way to a generation, None where there can be none.  Raises OSError.

        paused: whether no client comes, by request, so that a bad answer says nothing.
        """
        self._loop, self._post = runtime.loop, runtime.post
        self._reach, self._probes, self._paused = reach, probes, paused
        #: What is counted of the generations, by number, for a command to read.
        self.counts: Callable[[], Mapping[int, Mapping[str, Any]]] = dict
        self._generation: OpenGeneration | None = None
        self._way: Way | None = None
        self._asker: Asker | None = None
        self._command: Process | None = None
        self._output = -1  # of the command, to be read
        self._said = b""
        self._asked_at = 0.0
        self._good = False  # the last answer; of one that is to be the last of all, that
        self._is_last = False
        self._cannot = ""  # why it could not be asked

    def begin(self, generation: OpenGeneration) -> None:
        """Ask until it is to stop."""
        self.stop()
        if generation.program.settle_check:
            self._generation = generation
            self._good = self._is_last = False
            self.go_on()

    def stop(self) -> None:
        """Ask no more."""
        self.suspend()
        self._generation = None

    def suspend(self) -> None:
        """Ask no more in this program; the next one begins anew."""
        self._loop.cancel(_NEXT)
        self._loop.cancel(_LIMIT)
        self._forget()
        if self._generation is not None:
            self._probes.over(self._generation.record.number)

    def go_on(self) -> None:
        """There was no next one."""
        if self._generation is not None:
            self._await_answer()
            self._ask()

    def awaits(self, number: int) -> bool:
        """Whether a generation settles on, though its time is over, until its next good answer."""
        generation = self._generation
        if generation is None or generation.record.number != number:
            return False
        if not self._is_last:
            self._is_last, self._good = True, False
        return not self._good

    # -- inside ------------------------------------------------------------------

    def _ask(self) -> None:
        generation = self._generation
        assert generation is not None
        self._asked_at = time.monotonic()
        asked = question.read_settle_check(generation.program.settle_check)
        try:
            if asked.kind == question.CHECK:
                self._run(generation, asked.path)
            else:
                self._send_asker(generation, asked)
        except (OSError, ValueError) as error:
            why = (error.strerror if isinstance(error, OSError) else "") or str(error)
            self._could_not(why)

    def _send_asker(self, generation: OpenGeneration, asked: Question) -> None:
        self._way = self._reach(generation, asked)
        if self._way is None:
            self._is_bad("there is one socket for it and the one before, so none can be asked")
            return

        def ended(how: str) -> None:
            self._asker = None
            self._could_not(f"the process that asks {how}")

        self._asker = Asker(self._loop, self._way, asked, heard=self._heard, ended=ended)

    def _could_not(self, why: str) -> None:
        self._forget()
        self._cannot = why
        self._loop.call_after(_NEXT, _AGAIN_S, self._ask)

    def _await_answer(self) -> None:
        self._cannot = ""
        self._loop.call_after(_LIMIT, CHECK_LIMIT_S, self._is_late)

    def _is_late(self) -> None:
        self._is_bad(self._cannot or f"no answer within {CHECK_LIMIT_S:g} s")

    def _heard(self, why: str) -> None:
        if why and not self._paused():
            self._is_bad(why)
        else:
            self._is_good()

    def _is_good(self) -> None:
        self._good = True
        self._await_answer()

    def _is_bad(self, why: str) -> None:
        generation = self._generation
        assert generation is not None
        if self._command is not None:
            asked = question.read_settle_check(generation.program.settle_check)
            why = f"{program_of(asked.path)}: {why}"
        self.stop()
        self._post(SettleFailed(generation.record.number, f"--settle-check: {why}"))

    def _forget(self) -> None:
        """What was asked last is over."""
        if self._asker is not None:
            self._asker.close()
            self._asker = None
        if self._way is not None:
            self._way.close()
            self._way = None
        if self._command is not None:
            self._loop.unwatch(self._command.pidfd)
            self._command.discard()
            self._command = None
        if self._output >= 0:
            self._loop.unwatch(self._output)
            os.close(self._output)
            self._output = -1

    # -- a command ---------------------------------------------------------------

    def _run(self, generation: OpenGeneration, command: str) -> None:
        """Raises OSError or ValueError."""
        program = replace(generation.program, path="/bin/sh", argv=("sh", "-c", command))
        address = self._probes.address(generation)
        told = os.memfd_create("sp.settle-check", os.MFD_CLOEXEC)
        self._said = b""
        try:
            os.pwrite(told, self._text(generation.record.number), 0)
            self._output, write = os.pipe2(os.O_CLOEXEC)
            try:
                os.set_blocking(self._output, False)  # our end alone is this
                variables = {PROBE: address} if address else {}
                descriptors = {0: told, 1: write, 2: write}
                self._command = spawn(program, variables, descriptors, mortal=True)
            finally:
                os.close(write)
        finally:
            os.close(told)
        self._loop.watch(self._command.pidfd, self._command_ended)
        self._loop.watch(self._output, self._hear)

    def _text(self, number: int) -> bytes:
        """Return what it reads: of the generation that settles, and of the one that stands by."""
        counts = self.counts()
        others = (each for each in counts.values() if each["phase"] == "serving")
        return json.dumps({"new": counts.get(number), "old": next(others, None)}).encode()

    def _hear(self) -> None:
        """Have it never wait for us."""
        self._read()

    def _read(self) -> bool:
        """Keep the end of what it says; False: that is all for now."""
        try:
            data = os.read(self._output, _PIPE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._said = (self._said + data)[-_KEPT_BYTES:]
        if not data:
            self._loop.unwatch(self._output)
        return bool(data)

    def _command_ended(self) -> None:
        result = self._command.reap() if self._command is not None else None
        if result is None or self._command is None:
            return
        with suppress(PermissionError):  # what it has left in the background
            self._command.kill_group()
        if not result.clean:
            for _ in range(_READS):  # something that has left its group may write on
                if not self._read():
                    break
            self._is_bad(f"{result.how}{self._last_words()}")
            return
        self._forget()
        self._is_good()
        later_s = self._asked_at + _EVERY_S - time.monotonic()
        self._loop.call_after(_NEXT, max(0.0, later_s), self._ask)

    def _last_words(self) -> str:
        *_, last = ("", *self._said.decode("utf-8", "replace").strip().splitlines())
        shown = "".join(each if each.isprintable() else "?" for each in last[:_SHOWN])
        return f": {shown}" if shown else ""
