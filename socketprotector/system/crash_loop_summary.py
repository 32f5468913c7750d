"""Keeps a crash loop from filling the log: after SHOWN deaths, lines with a count replace the rest.

Further deaths are counted.  At growing intervals, a line has the count and the last cause.  When a
worker has been ready for PROVEN_S, and at a stop, we write the remaining count and the running
worker's withheld lines.  Observers of the log get every line.

The limit holds for each slot of a generation, and for generations that fail in a row while no
generation is serving.  This module reads the log's own lines, which also say when a worker was
spawned and why it ended.
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
#: Generation and slot; None: the slot of workers that could not be spawned.
Slot = tuple[int, int | None]
Key = Slot | None  # None: the loop of generations

#: Deaths in a row that are logged unchanged.
SHOWN = 5
#: The time between two lines with a count: it doubles each time.
FIRST_INTERVAL_S, LAST_INTERVAL_S = 10.0, 3600.0
#: The slot of a worker whose exit does not count: an earlier program spawned the worker, or the
#: worker served and left on request.
_UNKNOWN = -1

_REPEATED = ("spawned", "worker-ready", "signalled", "exited")
#: The events that repeat when generations fail in a row, and the events that end such a loop.
_FAILURES = ("retrying", "channel-broken")
_REPEATED_BY_GENERATIONS = (*_REPEATED, *_FAILURES, "route", "recovered", "drained")
_VERDICTS = ("ready", "reloaded", "reload-failed", "start-failed")


@mutable
class _CrashLoop:
    """A series of deaths in one slot, or of generations."""

    began: float
    deaths: int = 0  # quick deaths in a row
    unreported: int = 0  # deaths since the last line
    interval_s: float = FIRST_INTERVAL_S
    ready_at: float | None = None  # when the running worker was ready
    last: Fields = field(default_factory=dict)  # the fields of the last death
    #: The withheld lines of the running worker, or of a generation's many workers.
    withheld: deque[Line] = field(default_factory=lambda: deque(maxlen=256))


class CrashLoopFilter:
    """Withholds lines that a crash loop repeats."""

    def __init__(self, write: Callable[[str, str, Fields], None], loop: Loop) -> None:
        """write: writes a line (level, event, fields) past this filter."""
        self._write, self._loop = write, loop
        self._crashing: dict[Key, _CrashLoop] = {}
        self._slot_of: dict[int, Slot] = {}  # of running workers
        self._just_ended: Slot | None = None
        self._failed = 0  # the last generation that failed while no other served
        self._shown_to = 0  # the last generation whose lines are not withheld
        self._stopping = False

    def suppresses(self, level: str, event: str, fields: Fields) -> bool:
        """Return True if a line is to be withheld; call this for each line of the log."""
        if event == "stopping":
            self.flush()
            self._stopping = True
        if self._stopping:
            return False
        line = (time.monotonic(), level, event, fields)
        slot = self._slot_of.get(_number(fields, "worker"))
        generation = _number(fields, "generation") or (slot[0] if slot else 0)
        of_slot = self._suppresses_of_slot(line, slot or (generation, _UNKNOWN))
        return self._suppresses_of_generation(line, generation) or of_slot

    def flush(self) -> None:
        """Write the withheld lines and all counts."""
        for key in list(self._crashing):
            self._finish(key)
        self._slot_of.clear()

    def _suppresses_of_slot(self, line: Line, slot: Slot) -> bool:
        now, _, event, fields = line
        worker = _number(fields, "worker")
        just_ended, self._just_ended = self._just_ended, None
        if event == "drained":
            for key in [key for key in self._crashing if key is not None and key[0] == slot[0]]:
                self._finish(key)
        elif event == "spawned":
            self._finish((slot[0], None))
            slot = self._slot_of[worker] = slot[0], _number(fields, "slot")
        elif event == "exited" and worker:
            self._slot_of.pop(worker, None)
            self._just_ended = slot
            if slot[1] != _UNKNOWN:
                return self._count_death(slot, now, worker=worker, how=fields.get("how"))
        elif event == "exited" and (just_ended is None or just_ended[0] != slot[0]):
            return self._count_death((slot[0], None), now, **_why(fields))
        elif event == "exited" and (crashes := self._crashing.get(just_ended)):
            crashes.last = {**crashes.last, **_why(fields)}  # the same exit again, with its reason
            return crashes.deaths > SHOWN
        elif event in ("retired", "signalled") and self._serves(slot):
            self._slot_of[worker] = slot[0], _UNKNOWN  # its exit is no crash
            self._finish(slot)
            return False
        return event in _REPEATED and slot[1] != _UNKNOWN and self._withholds(slot, line)

    def _serves(self, slot: Slot) -> bool:
        return slot in self._crashing and self._crashing[slot].ready_at is not None

    def _suppresses_of_generation(self, line: Line, generation: int) -> bool:
        now, _, event, fields = line
        if event in _VERDICTS:
            self._finish(None)
        if event in _FAILURES and generation > self._failed:
            self._failed = generation
            if self._count_death(None, now, **_why(fields)):
                return True
            self._shown_to = generation
        if event not in _REPEATED_BY_GENERATIONS or generation <= self._shown_to:
            return False
        return (event == "recovered" or None in self._crashing) and self._withholds(None, line)

    def _withholds(self, key: Key, line: Line) -> bool:
        """Withhold a line if its worker or generation is in a crash loop; return True if so."""
        now, _, event, _ = line
        crashes = self._crashing.setdefault(key, _CrashLoop(now))
        ready = event == ("recovered" if key is None else "worker-ready")
        if ready:
            crashes.ready_at = now
        if crashes.deaths < SHOWN:
            return False
        if ready:
            self._loop.call_after(("crash-loop-over", key), PROVEN_S, lambda: self._finish(key))
        crashes.withheld.append(line)
        return True

    def _count_death(self, key: Key, now: float, **last: object) -> bool:
        """Count a death; return whether to withhold its line."""
        crashes = self._crashing.setdefault(key, _CrashLoop(now))
        if crashes.ready_at is not None and now - crashes.ready_at >= PROVEN_S:
            self._finish(key)
            crashes = self._crashing[key] = _CrashLoop(now)
        self._loop.cancel(("crash-loop-over", key))
        crashes.deaths += 1
        crashes.ready_at, crashes.last = None, last
        crashes.withheld.clear()
        if crashes.deaths <= SHOWN:
            return False
        crashes.unreported += 1
        timer = ("crash-loop", key)
        if self._loop.due(timer) is None:
            self._loop.call_after(timer, crashes.interval_s, lambda: self._sum_up(key))
        return True

    def _sum_up(self, key: Key) -> None:
        """Write the number of deaths since the last line."""
        crashes = self._crashing[key]
        generation, slot = key or (self._failed, None)
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
        """Write the remaining count and the running worker's withheld lines, and end the loop."""
        if key not in self._crashing:
            return
        self._loop.cancel(("crash-loop", key))
        self._loop.cancel(("crash-loop-over", key))
        if self._crashing[key].unreported:
            self._sum_up(key)
        for when, level, event, fields in self._crashing.pop(key).withheld:
            ago_s = round(time.monotonic() - when, 1)
            self._write(level, event, {**fields, "ago_s": ago_s})


def _why(fields: Fields) -> dict[str, object]:
    return {name: fields.get(name) for name in ("reason", "last_words")}


def _number(fields: Fields, name: str) -> int:
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0
