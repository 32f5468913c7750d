"""Determines an exited worker's status, the reason for its exit, and the processes it left.

The steps have a fixed order:

1. The last words: the last lines of output of a worker that exited before it was ready, or as soon
   as it was ready.  They tell why the start failed.  If the relay (relay_client.py) reads the
   output, we request the words from the relay.  We reap the worker only after the answer, or after
   2 s without an answer.  If an upgrade or a kill comes first, the next program still finds the
   exited worker in the state, and requests the words again.
2. The exit status, from waitid(2).  A worker that was started before a crash of the protector is no
   child of this process.  For such a worker, waitid(2) fails with ECHILD, and only the guard can
   report the status.
3. Whether the kernel killed the worker because memory ran out.
4. The processes that the worker left in its process group.  We find them by the reaped
   worker's pidfd.  Before Linux 6.9 we use the worker's pid, which the kernel does not reuse while
   the process group exists.  If the worker had failed, leftovers.py ends its other processes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial

from ..core.events import WorkerExited
from ..model import exit_text, known_servers
from ..model.history import Crash, History
from ..model.lazy_dataclass import KW_ONLY, mutable, replace
from ..model.records import WorkerRecord
from ..model.text import LAST_WORDS, escape
from ..system.foreign_descriptors import close_unread
from ..system.leftovers import Leftovers
from ..system.process import End, Process
from ..system.process_groups import Groups
from ..system.program_spec import name_of
from . import forked_children
from .delivery import Delivery
from .generation import OpenGeneration
from .log_output import Output
from .runtime import Runtime
from .worker_spawn import Worker

#: How soon to try again to reap an exited worker that a tracer holds.
_REAP_AGAIN_S = 0.1
#: How long the guard may take to report how a worker exited.
_STATUS_S = 1.0
#: The most digits of a number in a report about a forked child.
_DIGITS = 9


@mutable
class PostMortem:
    """Determines how each worker ended."""

    runtime: Runtime
    output: Output
    _: KW_ONLY
    delivery: Delivery
    groups: Groups
    leftovers: Leftovers
    #: Called with a worker's number when it is time to call end_of() for that worker.
    ended: Callable[[int], None]
    #: remember(change): replaces the history with change(history).
    remember: Callable[[Callable[[History], History]], None]
    #: Returns, in words, why SIGKILL ended a process.  Call this only if we sent no SIGKILL.
    why_killed: Callable[[], str]

    def end_of(self, worker: Worker, *, guarded: bool) -> End | None:
        """Reap an exited worker and return its end; None: the end is not known yet.

        If the end is not known, the caller must call end_of() again when `ended` is called.
        Sometimes end_of() itself calls `ended`, before it returns None.

        guarded: whether there is a guard, which reports the exits of workers that are not our
        children.
        """
        number = worker.record.number
        if not worker.ended:
            if not worker.process.has_ended():
                return None
            worker.ended = True
            if not worker.became_ready:
                self.runtime.loop.unwatch(worker.process.pidfd)
                self._request_words(worker.record, partial(self._note_words, worker))
                return None  # perhaps _note_words() has run already, and has handled the exit
        if not worker.became_ready and worker.last_words is None:
            return None  # the relay has not answered yet
        try:
            end = worker.process.reap()
        except ChildProcessError:
            return self._reported_end(worker, guarded=guarded)
        if end is None:
            # A tracer (a debugger, strace) must reap the worker first, and may be suspended.  The
            # pidfd would wake us all the time, so do not watch the pidfd; retry after a pause.
            self.runtime.loop.unwatch(worker.process.pidfd)
            self.runtime.loop.call_after(
                ("reap", number), _REAP_AGAIN_S, partial(self.ended, number)
            )
        return end

    def _request_words(self, record: WorkerRecord, done: Callable[[str], None]) -> None:
        self.output.last_words(record.number, record.output_start, done)

    def _note_words(self, worker: Worker, last_words: str) -> None:
        worker.last_words = last_words
        self.ended(worker.record.number)

    def _remember_words(self, number: int, last_words: str, *, pid: int) -> None:
        if last_words:
            self.remember(lambda history: history.with_last_words(number, pid, last_words))

    def _reported_end(self, worker: Worker, *, guarded: bool) -> End | None:
        """Return the end of a worker that is not our child, as the guard reports it.

        None: wait for the report.  Without a guard, or without a report within _STATUS_S, the
        status is unknown.
        """
        number = worker.record.number
        if worker.end_from_guard is not None or worker.awaits_end or not guarded:
            self.runtime.loop.cancel(("status", number))
            return worker.end_from_guard or End(False, "ended with an unknown status")
        worker.awaits_end = True
        self.runtime.loop.unwatch(worker.process.pidfd)
        self.runtime.loop.call_after(("status", number), _STATUS_S, partial(self.ended, number))
        return None

    def close(self, worker: Worker, end: End, *, proved_ready: bool) -> WorkerExited:
        """Log and return a worker's exit; watch its process group, and close its sockets.

        proved_ready: whether a worker of any generation has become ready by something other than a
        timer.  A timer's end proves nothing.
        """
        record, number = worker.record, worker.record.number
        if end.how == exit_text.KILLED and not record.killed:
            end = replace(end, how=self.why_killed())
        kept = forked_children.left_open(record, worker.generation)
        lost = worker.generation.take_counts(record.slot, kept)
        # Forked children finish at end of file on the RETURN line (worker_spawn.py).  They must
        # not finish yet, so keep the line open until core/ orders them to finish.
        line, worker.line = worker.line, None
        orphans = self.keep_group(record, worker.process, worker.generation, line)
        worker.close()
        self.runtime.log.write(
            "info",
            "exited",
            generation=record.generation,
            worker=number,
            how=end.how,
            lost=lost or None,
        )
        last_words, was_ready = worker.last_words or "", record.ready_by or worker.became_ready
        # The worker failed, or called daemon(3).
        if not was_ready:
            sockets = self.delivery.sockets_of(worker.generation)
            self.leftovers.end((record.generation, record.start, sockets))
        detached = end.clean and not was_ready
        if not record.asked_to_exit and not (end.clean and worker.generation.is_finishing):
            crash = _crash(worker, end, lost, last_words)
            self.remember(lambda history: history.with_crash(crash))
            if worker.became_ready:  # otherwise we have the last words already
                self._request_words(record, partial(self._remember_words, number, pid=record.pid))
        reason, served_s = end.how, 0.0
        if record.ready_at is not None:
            served_s = time.monotonic() - record.ready_at
        else:
            reason = self._why(worker, end.how, last_words, detached, proved_ready=proved_ready)
        waiting = self.delivery.waiting(worker.generation, clients_only=True) or 0
        return WorkerExited(number, reason, served_s, waiting, detached, orphans)

    def child_failed(self, worker: Worker, text: str) -> None:
        """Log a forked child's failure, which its worker reports.  Add the failure to the history.

        text: the report, in the form that CHILD of socketprotector_client/wire.py describes.
        Ignore a malformed report.  Also ignore the report if the worker was ordered to exit, or if
        its generation gets no more clients.
        """
        words = text.split()
        if len(words) != 4 or not all(_is_number(each) for each in words[:3]):
            return
        child, pid, status = map(int, words[:3])
        lost = int(words[3]) if _is_number(words[3]) else None
        record, generation = worker.record, worker.generation
        if record.asked_to_exit or generation.is_finishing:
            return
        _, how = exit_text.status_of(status)
        if how == exit_text.KILLED:
            how = self.why_killed()
        self.runtime.log.write(
            "warning",
            "child-failed",
            generation=record.generation,
            worker=record.number,
            child=child,
            pid=pid,
            how=how,
            lost=lost or None,
        )
        if lost:
            generation.update_record(lost=generation.record.lost + lost)
        crash = Crash(
            at=time.time(),
            generation=record.generation,
            worker=record.number,
            slot=record.slot,
            pid=pid,
            how=f"child {child} of {record.pid}: {how}",
            when="serving" if record.ready_by or worker.became_ready else "starting",
            lost=lost,
        )
        self.remember(lambda history: history.with_crash(crash))
        self._request_words(record, partial(self._remember_words, record.number, pid=pid))

    def _why(
        self, worker: Worker, how: str, last_words: str, detached: bool, *, proved_ready: bool
    ) -> str:
        """Return what is known about why a worker exited before it was ready, or right after."""
        when = "as soon as it was ready" if worker.record.ready_by else "before it was ready"
        program = worker.generation.program
        reason = f"{escape(name_of(program))} {how} {when}"
        if detached:
            reason += f"; {known_servers.detached(program)}"
        where = "" if last_words else self.output.where_to_look()
        unseen = bool(where) and not detached
        advice = known_servers.advice(
            program, said=last_words, unseen=unseen, proved_ready=proved_ready
        )
        if advice:
            reason += f"; {advice}"
        if last_words:
            return f"{reason}{LAST_WORDS}\n{last_words}"
        return "; ".join(filter(None, (reason, where)))

    # -- process groups ----------------------------------------------------------

    def keep_group(
        self,
        record: WorkerRecord,
        process: Process,
        generation: OpenGeneration,
        line: socket.socket | None = None,
        *,
        lost: bool = False,
    ) -> bool:
        """Watch the processes left in a worker's process group; return whether there are any.

        Takes ownership of the process and the RETURN line.
        lost: whether some of the worker's descriptors were lost when the protector was killed.  The
        worker itself may then still run.
        """
        has_group = process.has_group()
        if has_group:
            ended = partial(self._group_ended, record, generation, lost=lost)
            self.groups.keep(record, process, generation.program.finish_signal, ended, line)
        else:
            process.close()
            if line is not None:
                close_unread(line)
        return has_group

    def _group_ended(self, record: WorkerRecord, generation: OpenGeneration, *, lost: bool) -> None:
        if lost:
            # Take the counts only now: the worker itself may have run, and counted in its slot,
            # until its group ended.
            generation.take_counts(record.slot)
        waiting = self.delivery.waiting(generation, clients_only=True) or 0
        # This is the worker's second WorkerExited; the first had the flag `orphans`.
        self.runtime.post(WorkerExited(record.number, "orphans gone", waiting=waiting))

    def adopt_group(
        self, record: WorkerRecord, descriptors: Mapping[str, int], generation: OpenGeneration
    ) -> bool:
        """Adopt the process group of a worker that has exited, or whose descriptors are incomplete.

        Takes ownership of the descriptors.  Returns whether a process of the group is left.
        """
        for name, fd in descriptors.items():
            if name not in ("process", "line"):
                os.close(fd)  # not needed any more
        process = Process(record.pid, descriptors["process"])
        try:
            process.reap()
        except ChildProcessError:
            pass  # reaped by an earlier program, or the child of another process
        found = descriptors.get("line")
        line = socket.socket(fileno=found) if found is not None else None
        return self.keep_group(record, process, generation, line, lost=not record.orphaned)


def _crash(worker: Worker, end: End, lost: int | None, last_words: str) -> Crash:
    record = worker.record
    ready = record.ready_by or worker.became_ready
    return Crash(
        at=time.time(),
        generation=record.generation,
        worker=record.number,
        slot=record.slot,
        pid=record.pid,
        how=end.how,
        when="draining" if worker.generation.is_finishing else "serving" if ready else "starting",
        lost=lost,
        last_words=last_words,
        cpu_s=end.cpu_s,
        max_rss_kib=end.max_rss_kib,
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS
