"""Crash-loop suppression: one line with a count instead of a full disk.

Filters lines before they reach the log. The first deaths of a loop are logged unchanged. Later
deaths are suppressed, counted, and summed up in one line at growing intervals: the count, and the
last cause. Once a worker has proved itself, and at a stop, the rest is summed up and that worker's
withheld lines are written. Observers of the log get every line.

There are two kinds of loop: workers that crash in the same slot of a generation, and generations
that fail in a row while none serves.

The filter reads the log's own lines, because it has to keep their order. The core also counts quick
deaths, for its back-off.  But it does not know when a worker was spawned, what it wrote, or when it
proved itself: the core learns the last only at the worker's exit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from ..model.lazy_dataclass import field, mutable
from ..model.policy import PROVEN_S
from .loop import Loop

Fields = Mapping[str, object]
#: Time, level, event and fields.
Line = tuple[float, str, str, Fields]
#: Generation and slot; the slot is None for a worker that could not be spawned.
#: None: the loop of generations.
Key = tuple[int, int | None] | None

#: Deaths in a row that are logged unchanged.
SHOWN = 5
#: The time between two summary lines: it doubles each time.
FIRST_INTERVAL_S = 10.0
LAST_INTERVAL_S = 3600.0
#: A worker that could not be spawned is never ready: deaths further apart are no loop (back-off:
#: 60 s).
_APART_S = 120.0
#: The slot of a worker whose exit does not count: an earlier program spawned it, or it served and
#: left on request.
_UNKNOWN = -1
#: The most lines withheld of running workers: a generation may have many workers.
_WITHHELD = 256

_REPEATED = ("spawned", "worker-ready", "signalled", "exited")
_FAILURES = ("retrying", "channel-broken")
#: The events that generations repeat when they fail in a row.
_REPEATED_BY_GENERATIONS = (*_REPEATED, *_FAILURES, "route", "recovered", "drained")
#: These events end a loop of generations.
_VERDICTS = ("ready", "reloaded", "reload-failed", "start-failed")


@mutable
class _CrashLoop:
    """A run of deaths of one slot, or of generations."""

    began: float
    deaths: int = 0  # quick deaths in a row
    unreported: int = 0  # deaths since the last line
    interval_s: float = FIRST_INTERVAL_S
    ready_at: float | None = None  # when the running worker was ready
    died_at: float = 0.0
    shown: int = SHOWN
    last: Fields = field(default_factory=dict)  # the fields of the last death
    #: The withheld lines of the running worker.
    withheld: deque[Line] = field(default_factory=lambda: deque(maxlen=_WITHHELD))

    @property
    def suppressed(self) -> bool:
        return self.deaths >= self.shown


class CrashLoopFilter:
    """Withholds lines that a crash loop repeats."""

    def __init__(self, write: Callable[[str, str, Fields], None], loop: Loop) -> None:
        """write: writes a line (level, event, fields) past this filter."""
        self._write = write
        self._loop = loop
        self._crashing: dict[Key, _CrashLoop] = {}
        self._slot_of: dict[int, tuple[int, int | None]] = {}  # of running workers
        self._slot_counts: dict[int, int] = {}  # slots by generation
        self._just_ended: tuple[int, int | None] | None = None
        self._failed = 0  # the last generation that failed while no other served
        self._shown_to = 0  # the lines of later generations are withheld
        self._stopping = False

    def suppresses(self, level: str, event: str, fields: Fields) -> bool:
        """Return whether to withhold a line; call it for each line of the log."""
        if event == "stopping":
            self.flush()
            self._stopping = True
        if self._stopping:
            return False
        line = (time.monotonic(), level, event, fields)
        generation = (
            _number(fields, "generation")
            or self._slot_of.get(_number(fields, "worker"), (0, None))[0]
        )
        for_slot = self._suppresses_for_slot(line, generation)
        return self._suppresses_for_generations(line, generation) or for_slot

    def flush(self) -> None:
        """Write the withheld lines and all counts."""
        for key in list(self._crashing):
            self._finish(key)
        self._slot_of.clear()

    # -- workers of a slot --------------------------------------------------------

    def _suppresses_for_slot(self, line: Line, generation: int) -> bool:
        _, _, event, fields = line
        worker = _number(fields, "worker")
        just_ended, self._just_ended = self._just_ended, None
        if event == "drained":
            for key in [key for key in self._crashing if key is not None and key[0] == generation]:
                self._finish(key)
            self._slot_counts.pop(generation, None)
            return False
        if event == "spawned":
            slot = _number(fields, "slot")
            self._slot_of[worker] = generation, slot
            self._slot_counts[generation] = max(self._slot_counts.get(generation, 0), slot + 1)
        if (
            event == "exited" and not worker
        ):  # the core reports the same exit again, with its reason
            return self._add_reason(just_ended, generation, fields)
        if event in ("retired", "signalled") and self._leaves_on_request(worker):
            return False
        if event not in _REPEATED:
            return False
        key = self._slot_of.get(worker, (generation, _UNKNOWN))
        if event == "exited":
            self._slot_of.pop(worker, None)
            self._just_ended = key
        if key[1] == _UNKNOWN:
            return False
        if event == "exited":
            return self._count_death(key, {"worker": worker, "how": fields.get("how")})
        return self._withhold(key, line, ready=event == "worker-ready")

    def _leaves_on_request(self, worker: int) -> bool:
        """Return whether a worker leaves on request after serving; its exit is then no crash."""
        key = self._slot_of.get(worker, (0, _UNKNOWN))
        crashes = self._crashing.get(key)
        if crashes is None or crashes.ready_at is None:
            return False  # it never served, or ended without a request
        self._slot_of[worker] = key[0], _UNKNOWN
        self._finish(key)
        return True

    def _add_reason(
        self, ended: tuple[int, int | None] | None, generation: int, fields: Fields
    ) -> bool:
        reason = _why(fields)
        if ended is None or ended[0] != generation:
            # Count all slots together: the line does not name the slot.
            shown = SHOWN * self._slot_counts.get(generation, 1)
            return self._count_death((generation, None), reason, shown)
        crashes = self._crashing.get(ended)
        if crashes is None:
            return False
        crashes.last = {**crashes.last, **reason}
        return crashes.deaths > crashes.shown

    # -- generations that fail in a row --------------------------------------------

    def _suppresses_for_generations(self, line: Line, generation: int) -> bool:
        _, _, event, fields = line
        if event in _VERDICTS:
            self._finish(None)
        if event in _FAILURES and generation > self._failed:
            self._failed = generation
            suppressed = self._count_death(None, _why(fields))
            if not suppressed:
                self._shown_to = generation
            return suppressed
        recovers = event == "recovered"
        repeated = event in _REPEATED_BY_GENERATIONS and generation > self._shown_to
        if repeated and (recovers or None in self._crashing):
            return self._withhold(None, line, ready=recovers)
        return False

    # -- deaths in a row -----------------------------------------------------------

    def _withhold(self, key: Key, line: Line, *, ready: bool) -> bool:
        """Withhold a line of a running worker or generation in a loop; ready: it is serving."""
        crashes = self._crashing.setdefault(key, _CrashLoop(line[0]))
        if ready:
            crashes.ready_at = line[0]
        if not crashes.suppressed:
            return False
        if ready:
            proven = ("crash-loop-proven", key)
            self._loop.call_after(proven, PROVEN_S, lambda: self._finish(key))
        crashes.withheld.append(line)
        return True

    def _count_death(self, key: Key, last: Fields, shown: int = SHOWN) -> bool:
        """Count a death; return whether to withhold its line."""
        now = time.monotonic()
        crashes = self._crashing.get(key)
        if crashes is not None and (
            (crashes.ready_at is not None and now - crashes.ready_at >= PROVEN_S)
            or (key is not None and key[1] is None and now - crashes.died_at > _APART_S)
        ):
            self._finish(key)
        crashes = self._crashing.setdefault(key, _CrashLoop(now))
        self._loop.cancel(("crash-loop-proven", key))
        crashes.shown = shown
        crashes.deaths += 1
        crashes.ready_at = None
        crashes.died_at = now
        crashes.last = last
        crashes.withheld.clear()
        if crashes.deaths <= crashes.shown:
            return False
        crashes.unreported += 1
        if self._loop.due(("crash-loop", key)) is None:
            self._loop.call_after(
                ("crash-loop", key), crashes.interval_s, lambda: self._sum_up(key)
            )
        return True

    def _sum_up(self, key: Key) -> None:
        """Write the number of deaths since the last line."""
        crashes = self._crashing[key]
        generation, slot = key if key is not None else (self._failed, None)
        fields = {
            "generation": generation,
            "slot": slot,
            "deaths": crashes.deaths,
            "unreported": crashes.unreported,
            "for_s": round(time.monotonic() - crashes.began, 1),
            **crashes.last,
        }
        crashes.unreported = 0
        crashes.interval_s = min(crashes.interval_s * 2, LAST_INTERVAL_S)
        self._write("warning", "crash-loop", {k: v for k, v in fields.items() if v is not None})

    def _finish(self, key: Key) -> None:
        """Write the rest and the withheld lines of the running worker; end the loop."""
        crashes = self._crashing.get(key)
        if crashes is None:
            return
        self._loop.cancel(("crash-loop", key))
        self._loop.cancel(("crash-loop-proven", key))
        if crashes.unreported:
            self._sum_up(key)
        del self._crashing[key]
        now = time.monotonic()
        for when, level, event, fields in crashes.withheld:
            self._write(level, event, {**fields, "ago_s": round(now - when, 1)})


def _why(fields: Fields) -> Fields:
    return {name: fields.get(name) for name in ("reason", "last_words")}


def _number(fields: Fields, name: str) -> int:
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0
