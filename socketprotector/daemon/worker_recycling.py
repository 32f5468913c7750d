"""Replaces workers that have reached a limit: --retire-after, --max-memory, --max-age.

So what a worker leaks is bounded without a reload.  The numbers are looked at once a second, and
only where one of these is asked for.
"""

from __future__ import annotations

import binascii
import os
import time
from collections.abc import Mapping

from ..core.events import ReplaceRequested
from ..model.settings import Limits, Settings
from ..model.text import in_units
from ..system import procfs
from .runtime import Runtime
from .worker_spawn import Worker

#: How often to look.
EVERY_S = 1.0
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_TIMER = "limits"


class LimitWatch:
    """Has each worker replaced that has reached a limit."""

    def __init__(self, settings: Settings, runtime: Runtime, workers: Mapping[int, Worker]) -> None:
        """workers: those that live, by number, at any time."""
        self._loop, self._log, self._post = runtime.loop, runtime.log, runtime.post
        self._workers = workers
        self._blind = False  # no worker's memory can be looked at, and that was said
        self._said_uncounted = False
        self.use(settings)

    def use(self, settings: Settings) -> None:
        """Have these limits hold from now on."""
        self._limits, self._secret = settings.worker_limits, settings.secret
        self._loop.cancel(_TIMER)
        if self._limits.any:
            self._loop.call_after(_TIMER, EVERY_S, self._look)

    def _look(self) -> None:
        if self._limits.memory_bytes and not self._blind:
            self._blind = self._cannot_look()
        for number, worker in tuple(self._workers.items()):
            ready_at = worker.record.ready_at
            if ready_at is None or worker.record.asked_to_exit:
                continue
            counts = worker.generation.counts(worker.record.slot)
            if self._limits.connections and counts is None:
                self._say_uncounted(number)
            reason = exceeded(
                self._limits,
                f"{self._secret}-{number}",
                age_s=time.monotonic() - ready_at,
                pid=worker.process.pid,
                accepted=counts.accepted if counts is not None else None,
            )
            if reason is not None:
                self._post(ReplaceRequested(number, reason))
        self._loop.call_after(_TIMER, EVERY_S, self._look)

    def _say_uncounted(self, number: int) -> None:
        """Say once that a worker does not count its connections, so that none is too many."""
        if not self._said_uncounted:
            self._said_uncounted = True
            hint = "--retire-after has no effect on workers without the client library"
            self._log.write("warning", "not-counted", worker=number, hint=hint)

    def _cannot_look(self) -> bool:
        """Say it where the memory of a worker is hidden from us, as by hidepid of proc(5)."""
        for number, worker in self._workers.items():
            process = worker.process
            if resident_bytes(process.pid) is None and not process.has_ended():
                self._log.write(
                    "warning",
                    "cannot-look",
                    worker=number,
                    error=f"/proc/{process.pid} is not there or closed to us",
                    hint="--max-memory has no effect on workers whose memory cannot be read",
                )
                return True
        return False


def exceeded(
    limits: Limits, key: str, *, age_s: float, pid: int, accepted: int | None
) -> str | None:
    """Return which limit a worker has reached, in words; None: none of them.

    key: whatever is this worker's own, so that those which began together do not end together.
    accepted: connections it has taken, None where they are not counted.
    """
    if limits.age_s and age_s >= limits.age_s:
        return f"older than {in_units(limits.age_s)}"
    if limits.connections and accepted is not None:
        # Not hash(): it differs from one program to the next.
        spread = binascii.crc32(key.encode()) % (2 * limits.spread + 1)
        most = limits.connections - limits.spread + spread
        if accepted >= most:
            return f"accepted {accepted} connections, its limit is {most}"
    if limits.memory_bytes and (used := resident_bytes(pid) or 0) >= limits.memory_bytes:
        return f"{used >> 20} MiB resident, its limit is {limits.memory_bytes >> 20} MiB"
    return None


def resident_bytes(pid: int) -> int | None:
    """Return the resident memory of a process, None if it is gone or cannot be looked at."""
    try:
        if not procfs.is_ours():
            return None
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None
