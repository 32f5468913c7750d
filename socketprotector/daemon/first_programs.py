"""Handles what pools report about the first programs of a generation.

A pool is a worker of --handoff stdio: it starts a program for each connection.  Until a program has
worked, the pool reports programs that fail early; programs/stdio/first_programs.py defines
"worked" and "fail early".

Each of the first NO_ACCIDENT (3) failures is reported in the log, `status` and `crashes`.  Clients
can cause a few failures, so fewer than NO_ACCIDENT have no other effect.  At NO_ACCIDENT failures,
a settling generation is rolled back if the previous generation still serves.  Any other generation
keeps running.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..core.events import SettleFailed
from ..model import exit_text
from ..model.history import Crash, History
from ..model.lazy_dataclass import mutable
from ..model.records import NO_ACCIDENT
from ..model.text import LAST_WORDS
from .log_output import Output
from .runtime import Runtime
from .worker_spawn import Worker

#: The most digits of a pid, or of a status from wait(2).
_DIGITS = 9


@mutable
class FirstPrograms:
    """The reports of pools about their first programs."""

    runtime: Runtime
    output: Output
    #: remember(change): replaces the history with change(history).
    remember: Callable[[Callable[[History], History]], None]

    def handle(self, worker: Worker, text: str) -> None:
        """Handle a worker's message: `works`, or `failed PID STATUS`."""
        generation, record = worker.generation, worker.generation.record
        if not generation.program.mode.pooled or record.programs_work:
            return
        if text == "works":
            if record.programs_failed:
                self.runtime.log.write("info", "programs-work", generation=record.number)
            generation.update_record(
                programs_work=True, programs_failed=0, program_ended="", program_words=""
            )
            return
        match text.split():
            case ["failed", pid, status] if _is_number(pid) and _is_number(status):
                if record.drained_at is None and not worker.record.asked_to_exit:
                    self._handle_failure(worker, int(pid), int(status))

    def _handle_failure(self, worker: Worker, pid: int, status: int) -> None:
        generation, at = worker.generation, time.time()
        _, how = exit_text.status_of(status)
        count = generation.record.programs_failed + 1
        generation.update_record(programs_failed=count, program_ended=how)
        self.runtime.persist()  # a kill must not lose the count while we wait for the last words

        def done(found: str) -> None:
            # These are the last words of the whole pool, so perhaps of several failed programs.
            last_words = _without_repeats(found, generation.record.programs_failed)
            if generation.record.programs_work:
                return  # another program has worked meanwhile
            generation.update_record(program_words=last_words)
            if count <= NO_ACCIDENT:  # later failures tell nothing new
                self._report(worker, pid, f"program {how}", last_words, at)
            if count >= NO_ACCIDENT:
                reason = generation.record.programs_fail
                words = f"{LAST_WORDS}\n{last_words}" if last_words else self._where_to_look()
                self.runtime.post(SettleFailed(generation.record.number, reason + words))
            self.runtime.persist()

        self.output.last_words(worker.record.number, worker.record.output_start, done)

    def _report(self, worker: Worker, pid: int, how: str, last_words: str, at: float) -> None:
        record = worker.record
        self.runtime.log.write(
            "warning",
            "program-failed",
            generation=record.generation,
            worker=record.number,
            pid=pid,
            how=how,
            last_words=last_words or None,
        )
        crash = Crash(
            at=at,
            generation=record.generation,
            worker=record.number,
            slot=record.slot,
            pid=pid,
            how=how,
            when="serving",
            lost=1,
            last_words=last_words,
        )
        self.remember(lambda history: history.with_crash(crash))

    def _where_to_look(self) -> str:
        where = self.output.where_to_look()
        return f"; {where}" if where else ""


def _without_repeats(last_words: str, most: int) -> str:
    """Return the last words; if they repeat one block of lines, return the block once.

    most: the most repetitions to look for.
    """
    lines = last_words.split("\n")
    for times in range(min(most, len(lines)), 1, -1):
        part = lines[: len(lines) // times]
        if lines == part * times:
            return "\n".join(part)
    return last_words


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS
