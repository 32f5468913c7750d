"""Replaces workers that have reached a limit: --retire-after, --max-memory, --max-age.

If one of these options is set, we check the workers every second.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Container, Mapping
from contextlib import suppress

from ..core.events import ReplaceRequested
from ..model.backoff import FREE_DEATHS, backoff_s
from ..model.settings import Limits, Settings
from ..model.text import in_units
from ..system import procfs
from . import forked_children
from .runtime import Runtime
from .worker_spawn import Worker

#: The time between two checks of the workers.
EVERY_S = 1.0
#: A worker is *too large from the start* if it exceeds --max-memory within this time after it
#: became ready.
_AT_ONCE_S = 5.0
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_TIMER = "limits"


class BornTooLarge:
    """Delays the replacement of workers that are too large from the start.

    The new worker may exceed --max-memory, too.  Then, without the delay, we would replace workers
    all the time.
    """

    def __init__(self) -> None:
        # Key: the number of a running worker that was too large from the start.  Value: whether
        # this worker may be replaced.
        self._allowed: dict[int, bool] = {}
        self._in_a_row = 0  # replacements of such workers since forget() last set this to 0
        self._next_at = 0.0  # when the next such worker may be replaced

    @property
    def is_loop(self) -> bool:
        """Return whether more than FREE_DEATHS such workers in a row were replaced."""
        return self._in_a_row > FREE_DEATHS

    def next_s(self, now: float) -> float:
        """Return the time until another worker that is too large from the start may be replaced."""
        return max(0.0, self._next_at - now)

    def may_replace(self, number: int, age_s: float, now: float) -> bool:
        """Return whether a worker that exceeds --max-memory may be replaced now.

        If the worker was too large from the start and may be replaced, count the replacement.
        age_s: the time since the worker became ready.
        """
        allowed = self._allowed.get(number)
        if allowed or (allowed is None and age_s >= _AT_ONCE_S):
            return True
        self._allowed[number] = now >= self._next_at
        if now >= self._next_at:
            self._in_a_row += 1
            self._next_at = now + backoff_s(self._in_a_row)
        return self._allowed[number]

    def forget(self, living: Container[int], *, grown_worker_fits: bool) -> None:
        """Forget exited workers, and end the series of replacements if workers fit again.

        grown_worker_fits: whether any worker that became ready at least _AT_ONCE_S ago is within
        the limit.  If so, and if no living worker was too large from the start, workers fit again.
        """
        self._allowed = {each: may for each, may in self._allowed.items() if each in living}
        if grown_worker_fits and not self._allowed:
            self._in_a_row = 0


class LimitWatch:
    """Requests the replacement of each worker that has reached a limit."""

    def __init__(self, settings: Settings, runtime: Runtime, workers: Mapping[int, Worker]) -> None:
        """workers: the running workers by number, always up to date."""
        self._loop, self._log, self._post = runtime.loop, runtime.log, runtime.post
        self._workers = workers
        self._blind = False  # True: a worker's memory was unreadable, and we have warned
        self._warned_uncounted = False
        self._large = BornTooLarge()
        self._retired: set[int] = set()  # pids of forked children that have reached a limit
        self.apply_settings(settings)

    def apply_settings(self, settings: Settings) -> None:
        self._limits, self._secret = settings.worker_limits, settings.secret
        self._large = BornTooLarge()
        self._loop.cancel(_TIMER)
        if self._limits.any:
            self._loop.call_after(_TIMER, EVERY_S, self._check_workers)

    def _check_workers(self) -> None:
        if self._limits.memory_bytes and not self._blind:
            self._blind = self._is_memory_hidden()
        now, fits, retired_now = time.monotonic(), False, set[int]()
        for number, worker in tuple(self._workers.items()):
            ready_at = worker.record.ready_at
            if ready_at is None or worker.record.asked_to_exit:
                continue
            children = forked_children.children_of(worker.record, worker.generation)
            for child in children:
                retired_now |= self._check_child(worker, child)
            counts = worker.generation.counts(worker.record.slot)
            if self._limits.connections and counts is None:
                self._warn_uncounted(number)
            # A parent of forked children accepts no connections itself.
            accepted = counts.accepted if counts is not None and not children else None
            age_s = now - ready_at
            reason = exceeded(
                self._limits, f"{self._secret}-{number}", age_s=age_s, accepted=accepted
            )
            if reason is None:
                reason = too_large(self._limits, worker.process.pid)
                fits = fits or (reason is None and age_s >= _AT_ONCE_S)
                if reason is not None and not self._may_replace(number, age_s, now):
                    continue
            if reason is not None:
                self._post(ReplaceRequested(number, reason))
        self._retired = retired_now
        self._large.forget(self._workers, grown_worker_fits=fits)
        self._loop.call_after(_TIMER, EVERY_S, self._check_workers)

    def _check_child(self, worker: Worker, child: forked_children.Child) -> set[int]:
        """Retire a forked child once it has reached a limit of connections or memory.

        Returns {pid} if the child has reached a limit, now or at an earlier check; otherwise an
        empty set.  --max-age does not apply to a child.
        """
        if child.pid in self._retired:
            return {child.pid}
        accepted = child.counts.accepted if child.counts is not None else None
        key = f"{self._secret}-{worker.record.number}-{child.pid}"
        reason = exceeded(self._limits, key, age_s=0.0, accepted=accepted)
        reason = reason or too_large(self._limits, child.pid)
        if reason is None:
            return set()
        number = worker.record.number
        with suppress(OSError):  # EPERM: the child has changed its user, so we cannot signal it
            if forked_children.retire(child.pid, worker.process.pid):
                self._log.write("info", "retired", worker=number, child=child.pid, reason=reason)
        return {child.pid}

    def _may_replace(self, number: int, age_s: float, now: float) -> bool:
        """Return what BornTooLarge.may_replace() returns; warn when a loop begins."""
        before = self._large.is_loop
        may = self._large.may_replace(number, age_s, now)
        if self._large.is_loop and not before:
            self._log.write("warning", "limit-too-low", worker=number, hint=self._hint)
        return may

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the warning to an operator if --max-memory replaces workers in a loop."""
        if not self._large.is_loop:
            return ()
        next_s = in_units(round(self._large.next_s(time.monotonic())))
        return (f"{self._hint}; the next worker is replaced in {next_s}",)

    @property
    def _hint(self) -> str:
        most, soon = f"{self._limits.memory_bytes >> 20} MiB", in_units(_AT_ONCE_S)
        return f"workers exceed --max-memory ({most}) within {soon} of being ready; raise the limit"

    def _warn_uncounted(self, number: int) -> None:
        """Warn once that --retire-after has no effect without connection counts."""
        if not self._warned_uncounted:
            self._warned_uncounted = True
            hint = "--retire-after has no effect on workers that do not count their connections"
            self._log.write("warning", "not-counted", worker=number, hint=hint)

    def _is_memory_hidden(self) -> bool:
        """Return whether a worker's memory is unreadable (as with hidepid, proc(5)), and warn."""
        for number, worker in self._workers.items():
            process = worker.process
            if resident_bytes(process.pid) is None and not process.has_ended():
                self._log.write(
                    "warning",
                    "cannot-examine",
                    worker=number,
                    error=f"/proc/{process.pid} is missing or unreadable",
                    hint="--max-memory has no effect on workers whose memory cannot be read",
                )
                return True
        return False


def exceeded(limits: Limits, key: str, *, age_s: float, accepted: int | None) -> str | None:
    """Return, in words, which limit (age or connections) a process has reached; None: neither.

    key: varies the limit of connections by process, so that not all workers end together.
    accepted: how many connections the process has accepted; None: unknown.
    """
    if limits.age_s and age_s >= limits.age_s:
        return f"older than {in_units(limits.age_s)}"
    if limits.connections and accepted is not None:
        # Not hash(), whose result changes at an upgrade: a worker's limit must stay the same.
        offset = zlib.crc32(key.encode()) % (2 * limits.spread + 1)
        most = limits.connections - limits.spread + offset
        if accepted >= most:
            return f"accepted {accepted} connections (limit: {most})"
    return None


def too_large(limits: Limits, pid: int) -> str | None:
    """Return a process's size, in words, if it has reached --max-memory; otherwise None."""
    if limits.memory_bytes and (used := resident_bytes(pid) or 0) >= limits.memory_bytes:
        return f"{used >> 20} MiB resident (limit: {limits.memory_bytes >> 20} MiB)"
    return None


def resident_bytes(pid: int) -> int | None:
    """Return a process's resident memory; None: it is unreadable, or the process has exited."""
    try:
        if not procfs.is_ours():
            return None
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None
