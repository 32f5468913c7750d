"""Determines, when a worker has exited, its status, the reason, and the processes it left.

The order is fixed.  First its last words, where it has not served: they are the reason of a failed
start, and may have to come from the relay process.  Until then it is not reaped, so that a program
that replaces this one meanwhile finds it exited, and asks again.  Then its exit status: from wait,
or from the guard, where an earlier program was its parent (waitid(2) fails with ECHILD here).  Last
the processes it left: while its process group exists, the kernel does not reuse its pid.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial

from ..core.events import WorkerExited
from ..model import known_servers
from ..model.history import Crash, History
from ..model.lazy_dataclass import KW_ONLY, mutable
from ..model.records import WorkerRecord
from ..model.text import LAST_WORDS, escape
from ..system.orphans import Orphans
from ..system.process import End, Process
from ..system.process_groups import Groups
from .delivery import Delivery
from .generation import OpenGeneration
from .log_output import Output
from .runtime import Runtime
from .worker_spawn import Worker

#: How soon to ask again for the end of a worker that has ended, and that a tracer holds.
_REAP_AGAIN_S = 0.1
#: How long the guard may take to tell how a worker ended.
_STATUS_S = 1.0


@mutable
class PostMortem:
    """Looks into the end of each worker."""

    runtime: Runtime
    output: Output
    _: KW_ONLY
    delivery: Delivery
    groups: Groups
    orphans: Orphans
    #: A worker has ended, as far as could be seen; more is known of it now.
    ended: Callable[[int], None]
    #: Changes the history by the function that it is given.
    remember: Callable[[Callable[[History], History]], None]

    def end_of(self, worker: Worker, *, guarded: bool) -> End | None:
        """Reap a worker that has ended; None: not yet, and then `ended` is called.

        guarded: there is a guard, which tells how one ended that is no child of ours.
        """
        number = worker.record.number
        if not worker.ended:
            if not worker.process.has_ended():
                return None
            worker.ended = True
            if not worker.has_served:
                self.runtime.loop.unwatch(worker.process.pidfd)
                self._ask(worker.record, partial(self._said, worker))
                return None  # that may be called back at once, and all be over
        if not worker.has_served and worker.last_words is None:
            return None
        try:
            end = worker.process.reap()
        except ChildProcessError:
            return self._end_from_elsewhere(worker, guarded=guarded)
        if end is None:
            # Its tracer sees it first, and stands still: a debugger, or strace.
            self.runtime.loop.unwatch(worker.process.pidfd)
            self.runtime.loop.call_after(
                ("reap", number), _REAP_AGAIN_S, partial(self.ended, number)
            )
        return end

    def _ask(self, record: WorkerRecord, done: Callable[[str], None]) -> None:
        self.output.last_words(record.number, record.output_start, done)

    def _said(self, worker: Worker, last_words: str) -> None:
        worker.last_words = last_words
        self.ended(worker.record.number)

    def _said_late(self, number: int, last_words: str) -> None:
        if last_words:
            self.remember(lambda history: history.with_last_words(number, last_words))

    def _end_from_elsewhere(self, worker: Worker, *, guarded: bool) -> End | None:
        """Return how one ended that another process has reaped; None: that is not told yet."""
        number = worker.record.number
        if worker.end_from_guard is not None or worker.awaits_end or not guarded:
            self.runtime.loop.cancel(("status", number))
            return worker.end_from_guard or End(False, "ended with an unknown status")
        worker.awaits_end = True
        self.runtime.loop.unwatch(worker.process.pidfd)
        self.runtime.loop.call_after(("status", number), _STATUS_S, partial(self.ended, number))
        return None

    def close(self, worker: Worker, end: End, *, spoken_with: bool) -> WorkerExited:
        """Say what is known of an end, and look after what is left.  Closes the worker.

        spoken_with: a worker of this program has said that it is ready.
        """
        known, number = worker.record, worker.record.number
        lost = worker.generation.take_counts(known.slot)
        orphans = self.keep_group(known, worker.process, worker.generation)
        worker.close()
        self.runtime.log.write(
            "info",
            "exited",
            generation=known.generation,
            worker=number,
            how=end.how,
            lost=lost or None,
        )
        last_words, silent = worker.last_words or "", not known.ready_by and not worker.has_served
        if silent:  # it has failed to start, or detached itself
            self.orphans.end(worker.notify.address)
        detached = end.clean and silent
        if not known.asked_to_exit and not (end.clean and worker.generation.ended):
            crash = _crash(worker, end, lost, last_words)
            self.remember(lambda history: history.with_crash(crash))
            if worker.has_served:  # so its slot is filled without waiting for them
                self._ask(known, partial(self._said_late, number))
        reason, served_s = end.how, 0.0
        if known.ready_at is not None:
            served_s = time.monotonic() - known.ready_at
        else:
            reason = self._why(worker, end.how, last_words, detached, spoken_with=spoken_with)
        waiting = self.delivery.waiting(worker.generation, clients_only=True) or 0
        return WorkerExited(number, reason, served_s, waiting, detached, orphans)

    def _why(
        self, worker: Worker, how: str, last_words: str, detached: bool, *, spoken_with: bool
    ) -> str:
        """Say why a worker that never served has ended, as far as can be known."""
        when = "as soon as it was ready" if worker.record.ready_by else "before it was ready"
        program = worker.generation.program
        reason = f"{escape(program.argv[0])} {how} {when}"
        if detached:
            reason += "; does it detach itself? tell it to stay in the foreground"
            if program.mode.needs_library:
                reason += f"; {known_servers.STDIN}"
        where = "" if last_words else self.output.where_to_look()
        unseen = bool(where) and not detached
        advice = known_servers.advice(program, said=last_words, unseen=unseen)
        if advice and not spoken_with:
            reason += f"; {advice}"
        if last_words:
            return f"{reason}{LAST_WORDS}\n{last_words}"
        return "; ".join(filter(None, (reason, where)))

    # -- what is left ------------------------------------------------------------

    def keep_group(
        self, record: WorkerRecord, process: Process, generation: OpenGeneration
    ) -> bool:
        """Look after what is left of a worker's process group; say whether anything is."""
        left = process.has_group()
        if left:
            ended = partial(self._group_ended, record, generation)
            self.groups.keep(record, process, generation.program.finish_signal, ended)
        else:
            process.close()
        return left

    def _group_ended(self, record: WorkerRecord, generation: OpenGeneration) -> None:
        waiting = self.delivery.waiting(generation, clients_only=True) or 0
        self.runtime.post(WorkerExited(record.number, "orphans gone", waiting=waiting))

    def adopt_group(
        self, record: WorkerRecord, descriptors: Mapping[str, int], generation: OpenGeneration
    ) -> bool:
        """Go on with what a worker has left that has ended; takes ownership of its descriptors.

        Returns whether anything is.
        """
        for name, fd in descriptors.items():
            if name != "process":
                os.close(fd)  # it was to be given up
        process = Process(record.pid, descriptors["process"])
        try:
            process.reap()
        except ChildProcessError:
            pass  # it was another's child
        return self.keep_group(record, process, generation)


def _crash(worker: Worker, end: End, lost: int | None, last_words: str) -> Crash:
    known = worker.record
    ready = known.ready_by or worker.has_served
    return Crash(
        at=time.time(),
        generation=known.generation,
        worker=known.number,
        slot=known.slot,
        pid=known.pid,
        how=end.how,
        when="draining" if worker.generation.ended else "serving" if ready else "starting",
        lost=lost,
        last_words=last_words,
        cpu_s=end.cpu_s,
        max_rss_kib=end.max_rss_kib,
    )
