"""Crash-loop suppression: one line with a count instead of a full disk.

Stands before the log. The first deaths of a loop are written as they are. What the loop repeats
from then on is suppressed and counted, and summed up in one line at growing intervals: how often,
and how it ended the last time. Once a worker has proved itself, and at a stop, the rest is
summed up, and what was withheld of that worker is written. Observers of the log get everything.

There are two kinds of loop: workers that crash in one slot of a generation, and generations that
fail one after the other because none serves.

It reads the log's own lines: their order is what it has to keep, and the core, which counts quick
deaths for its back-off, knows neither when a worker was spawned nor what it said (the daemon
writes these lines), nor when one has proved itself (only, at its end, that it had).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from ..model.lazy_dataclass import field, mutable
from ..model.policy import PROVEN_S
from .loop import Loop

Fields = Mapping[str, object]
#: When it came; level, event and fields.
Line = tuple[float, str, str, Fields]
#: Generation and slot; the slot is missing of a worker that could not even be spawned.
#: None: generations, one after the other.
Key = tuple[int, int | None] | None

#: Deaths in a row that are written as they are.
SHOWN = 5
#: From one line with a count to the next: doubled each time.
FIRST_INTERVAL_S = 10.0
LAST_INTERVAL_S = 3600.0
#: A worker that could not be spawned is never ready: longer apart is no loop (back-off: 60 s).
_APART_S = 120.0
#: The slot of a worker whose end is no death of a loop: spawned by an earlier program, or it served
#: and was told to leave.
_UNKNOWN = -1
#: Lines of workers that live: a generation may have many of them.
_WITHHELD = 256

_REPEATED = ("spawned", "worker-ready", "signalled", "exited")
_FAILURES = ("retrying", "channel-broken")
#: What generations that are opened one after the other repeat.
_REPEATED_BY_GENERATIONS = (*_REPEATED, *_FAILURES, "route", "recovered", "drained")
#: After these it is known how the generations go on.
_VERDICTS = ("ready", "reloaded", "reload-failed", "start-failed")


@mutable
class _CrashLoop:
    """The deaths in a row of one slot, or of generations."""

    began: float
    deaths: int = 0  # quick ones, in a row
    unreported: int = 0  # of these, since the last line
    interval_s: float = FIRST_INTERVAL_S
    ready_at: float | None = None  # of the worker that lives
    died_at: float = 0.0
    shown: int = SHOWN
    last: Fields = field(default_factory=dict)  # how it ended the last time
    #: What was withheld of the worker that lives, and when.
    withheld: deque[Line] = field(default_factory=lambda: deque(maxlen=_WITHHELD))

    @property
    def suppressed(self) -> bool:
        return self.deaths >= self.shown


class CrashLoopFilter:
    """Withholds lines that a crash loop repeats."""

    def __init__(self, write: Callable[[str, str, Fields], None], loop: Loop) -> None:
        """`write` writes a line (level, event, fields) without asking here."""
        self._write = write
        self._loop = loop
        self._crashing: dict[Key, _CrashLoop] = {}
        self._slot_of: dict[int, tuple[int, int | None]] = {}  # of workers that live
        self._slot_counts: dict[int, int] = {}  # how many a generation has
        self._just_ended: tuple[int, int | None] | None = None
        self._failed = 0  # the last generation that failed while no other served
        self._shown_to = 0  # the lines of later generations are withheld
        self._stopping = False

    def suppresses(self, level: str, event: str, fields: Fields) -> bool:
        """Take note of a line that is about to be written; True: it is not to be written now."""
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
        of_a_slot = self._of_a_slot(line, generation)
        return self._of_generations(line, generation) or of_a_slot

    def flush(self) -> None:
        """Write what was withheld."""
        for key in list(self._crashing):
            self._finish(key)
        self._slot_of.clear()

    # -- workers of a slot --------------------------------------------------------

    def _of_a_slot(self, line: Line, generation: int) -> bool:
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
        if event == "exited" and not worker:  # the lifecycle says it once more, with the reason
            return self._reason(just_ended, generation, fields)
        if event in ("retired", "signalled") and self._leaves_as_asked(worker):
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

    def _leaves_as_asked(self, worker: int) -> bool:
        """Whether a serving worker was told to leave: its exit is then no crash."""
        key = self._slot_of.get(worker, (0, _UNKNOWN))
        crashes = self._crashing.get(key)
        if crashes is None or crashes.ready_at is None:
            return False  # it never served, or ended without a request
        self._slot_of[worker] = key[0], _UNKNOWN
        self._finish(key)
        return True

    def _reason(
        self, ended: tuple[int, int | None] | None, generation: int, fields: Fields
    ) -> bool:
        reason = _why(fields)
        if ended is None or ended[0] != generation:
            # All of its slots together, as the line does not say which one.
            shown = SHOWN * self._slot_counts.get(generation, 1)
            return self._count_death((generation, None), reason, shown)
        crashes = self._crashing.get(ended)
        if crashes is None:
            return False
        crashes.last = {**crashes.last, **reason}
        return crashes.deaths > crashes.shown

    # -- generations, one after the other ----------------------------------------

    def _of_generations(self, line: Line, generation: int) -> bool:
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
        """Withhold a line of a worker, or of a generation, that lives; ready: it serves."""
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
        """Count a death; True: it is not to be written now."""
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
        """Write how many deaths there were since the last line."""
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
        """Write the rest and the withheld lines of the living worker; start over."""
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
