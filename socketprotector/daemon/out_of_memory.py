"""Determines whether a worker got SIGKILL because memory ran out.

The kernel counts such kills in our memory cgroup (system/memory_group.py), but does not report
which process it killed.  The count rises before the process dies.  So a kill explains a worker's
end only if that end follows soon.  Otherwise the kernel has killed another process, such as a
process that a worker has started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..model import exit_text
from ..system import memory_group, procfs
from ..system.memory_group import OutOfMemory
from . import forked_children
from .runtime import Runtime
from .worker_spawn import Worker

#: How long after a kill we check whether the kill explains a worker's end.
_LOOK_S = 1.0
_TIMER = "memory"


class MemoryWatch:
    """Matches kills with ends of workers and their children, and logs kills of other processes."""

    def __init__(self, runtime: Runtime, workers: Mapping[int, Worker]) -> None:
        """workers: the running workers by number, always up to date."""
        self._loop, self._log, self._workers = runtime.loop, runtime.log, workers
        # The kernel's counts of the kills that we have handled.  We have handled a kill if the
        # kill has explained the end of a worker or forked child, or if we have logged the kill.
        # Kills before this program's start count as handled.
        self._handled = memory_group.counts()
        # None: the kernel sends no events.  Then a counted kill explains the next SIGKILL of a
        # worker or forked child, however late that SIGKILL comes.
        self._events = memory_group.Events.open()
        self._watch_events()

    def _watch_events(self) -> None:
        if self._events is not None:
            try:
                self._loop.watch(self._events.fd, self._check_later, self._events.awaited)
            except OSError:  # out of memory, or a file system that has no events
                self._events.close()
                self._events = None

    def _check_later(self) -> None:
        if self._events is not None:
            # Pause the events: a cgroup at its limit causes many.
            self._loop.unwatch(self._events.fd)
        self._loop.call_after(_TIMER, _LOOK_S, self._check_kills)

    def _check_kills(self) -> None:
        """Log the kills of other processes; wait while a worker or forked child is ending."""
        if self._events is not None:
            self._events.take()
        now, before = memory_group.counts(), self._handled
        if now.kills > before.kills:
            if any(map(procfs.is_ending, self._pids())):
                self._loop.call_after(_TIMER, _LOOK_S, self._check_kills)
                return
            self._log.write(
                "warning",
                "out-of-memory",
                killed=now.kills - before.kills,
                reason=_cause(at_limit=now.at_limit > before.at_limit),
            )
            self._handled = now
        self._watch_events()

    def _pids(self) -> Iterator[int]:
        """Yield the pids of all workers and of their forked children."""
        for each in self._workers.values():
            yield each.process.pid
            for child in forked_children.children_of(each.record, each.generation):
                yield child.pid

    def why_killed(self) -> str:
        """Return, in words, why a SIGKILL ended a worker or forked child.

        Call this only for a SIGKILL that we did not send.  Each kill that the kernel has counted
        explains one such SIGKILL.
        """
        now, before = memory_group.counts(), self._handled
        if now.kills <= before.kills:
            return exit_text.KILLED
        # If several kills are unexplained, the counts do not tell which of them came from the
        # cgroup's own limit.  So all of them get the same cause: the limit if the count at_limit
        # has risen since the last kill before them, otherwise no limit.  For this comparison, keep
        # the old at_limit until the last of these kills is explained.
        more = now.kills > before.kills + 1
        at_limit = before.at_limit if more else now.at_limit
        self._handled = OutOfMemory(before.kills + 1, at_limit)
        return f"{exit_text.KILLED}: {_cause(at_limit=now.at_limit > before.at_limit)}"


def _cause(*, at_limit: bool) -> str:
    limit = memory_group.limit() if at_limit else None
    if limit is None:
        return "out of memory (the service reached no limit of its own)"
    return f"out of memory (the service's limit of {limit >> 20}M)"
