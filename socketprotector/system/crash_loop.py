"""A crash loop is one line with a count, not a full disk.

Stands before the log.  The first deaths of a loop are told as they are.  What the loop
repeats from then on is counted, and told in one line at growing intervals: how often, and
how it ended the last time.  Once a worker has proved itself, and at a stop, the rest is told,
with what was kept back of that worker.  Whoever observes the log is told everything.

Two things go round: the workers of one place (generation and slot), and generations that
are opened one after the other because nobody serves.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .loop import Loop

Fields = Mapping[str, object]
#: Generation and slot; the slot is missing of a worker that could not even be spawned.
#: None: generations, one after the other.
Key = tuple[int, int | None] | None

#: Deaths in a row that are told as they are.
SHOWN = 5
#: As long as for the lifecycle (step.PROVEN_S, which this layer may not know).
PROVEN_S = 10.0
#: From one line with a count to the next: doubled each time.
FIRST_INTERVAL_S = 10.0
LAST_INTERVAL_S = 3600.0
#: A worker that could not be spawned is never ready: longer apart is no loop (back-off: 60 s).
_APART_S = 120.0
#: The slot of a worker that an earlier program has spawned.
_UNKNOWN = -1
#: Lines of the life that is now: a generation may have many workers.
_HELD = 256

_REPEATED = ("spawned", "worker-ready", "signalled", "exited")
_FAILURES = ("retrying", "channel-broken")
#: What generations that are opened one after the other repeat.
_REPEATED_BY_GENERATIONS = (*_REPEATED, *_FAILURES, "route", "recovered", "drained")
#: After these it is known how the generations go on.
_VERDICTS = ("ready", "reloaded", "reload-failed", "start-failed")


@dataclass(slots=True)
class _Circle:
    """What goes round in one place."""

    began: float
    deaths: int = 0  # quick ones, in a row
    untold: int = 0  # of these, since the last line
    interval_s: float = FIRST_INTERVAL_S
    ready_at: float | None = None  # the life that is now
    died_at: float = 0.0
    shown: int = SHOWN
    last: Fields = field(default_factory=dict)  # how it ended the last time
    #: What was kept back of the life that is now, and when.
    held: deque[tuple[float, str, str, Fields]] = field(default_factory=lambda: deque(maxlen=_HELD))

    @property
    def folded(self) -> bool:
        return self.deaths >= self.shown


class Fold:
    """Keeps lines back that a crash loop repeats."""

    def __init__(self, write: Callable[[str, str, Fields], None], loop: Loop) -> None:
        """`write` writes a line (level, event, fields) without asking here."""
        self._write = write
        self._loop = loop
        self._circles: dict[Key, _Circle] = {}
        self._places: dict[int, tuple[int, int | None]] = {}  # of workers that live
        self._asked: set[int] = set()  # workers that served, and were asked to leave
        self._slots: dict[int, int] = {}  # how many a generation has
        self._just_ended: tuple[int, int | None] | None = None
        self._failed = 0  # the last generation that failed while nobody else served
        self._shown_to = 0  # later generations go round and are kept back
        self._stopping = False

    def take(self, level: str, event: str, fields: Fields) -> bool:
        """Take in a line that is about to be written; True: it is kept back."""
        if event == "stopping":
            self.tell_all()
            self._stopping = True
        if self._stopping:
            return False
        line = (time.monotonic(), level, event, fields)
        generation = (
            _number(fields, "generation")
            or self._places.get(_number(fields, "worker"), (0, None))[0]
        )
        of_a_place = self._of_a_place(line, generation)
        return self._of_generations(line, generation) or of_a_place

    def tell_all(self) -> None:
        """Tell what was kept back."""
        for key in list(self._circles):
            self._end(key)
        self._places.clear()
        self._asked.clear()

    # -- workers in their place ------------------------------------------------

    def _of_a_place(self, line: tuple[float, str, str, Fields], generation: int) -> bool:
        now, _, event, fields = line
        worker = _number(fields, "worker")
        just_ended, self._just_ended = self._just_ended, None
        if event == "drained":
            for key in [key for key in self._circles if key is not None and key[0] == generation]:
                self._end(key)
            self._slots.pop(generation, None)
            return False
        if event == "spawned":
            slot = _number(fields, "slot")
            self._places[worker] = generation, slot
            self._slots[generation] = max(self._slots.get(generation, 0), slot + 1)
        if event == "exited" and not worker:  # the lifecycle says it once more, with the reason
            return self._reason(just_ended, generation, fields)
        if event in ("retired", "signalled") and self._was_asked(worker):
            return False
        if event not in _REPEATED:
            return False
        if worker not in self._places:
            self._just_ended = generation, _UNKNOWN
            return False
        key = self._places[worker]
        if event == "exited":
            del self._places[worker]
            if worker in self._asked:
                self._asked.discard(worker)
                self._just_ended = generation, _UNKNOWN
                return False
            self._just_ended = key
            return self._died(key, {"worker": worker, "how": fields.get("how")})
        circle = self._circles.setdefault(key, _Circle(now))
        if event == "worker-ready":
            self._is_ready(key, circle)
        if circle.folded:
            circle.held.append(line)
        return circle.folded

    def _was_asked(self, worker: int) -> bool:
        """Whether a worker that served was told to go: then its end is no death."""
        key = self._places.get(worker)
        circle = self._circles.get(key) if key is not None else None
        if circle is None or circle.ready_at is None:
            return False  # one that never served, or ended by itself
        self._asked.add(worker)
        self._end(key)
        return True

    def _reason(
        self, ended: tuple[int, int | None] | None, generation: int, fields: Fields
    ) -> bool:
        reason = _why(fields)
        if ended is None or ended[0] != generation:
            # All of its places together, as nobody says which one it is.
            shown = SHOWN * self._slots.get(generation, 1)
            return self._died((generation, None), reason, shown)
        circle = self._circles.get(ended)
        if circle is None:
            return False
        circle.last = {**circle.last, **reason}
        return circle.deaths > circle.shown

    # -- generations, one after the other ----------------------------------------

    def _of_generations(self, line: tuple[float, str, str, Fields], generation: int) -> bool:
        now, _, event, fields = line
        if event in _VERDICTS:
            self._end(None)
        if event in _FAILURES and generation > self._failed:
            self._failed = generation
            kept_back = self._died(None, _why(fields))
            if not kept_back:
                self._shown_to = generation
            return kept_back
        circle = self._circles.get(None)
        if event not in _REPEATED_BY_GENERATIONS or circle is None or not circle.folded:
            if event == "recovered":
                self._is_ready(None, self._circles.setdefault(None, _Circle(now)))
            return False
        if generation <= self._shown_to:
            return False
        circle.held.append(line)
        if event == "recovered":
            self._is_ready(None, circle)
        return True

    # -- what goes round -----------------------------------------------------------

    def _is_ready(self, key: Key, circle: _Circle) -> None:
        circle.ready_at = time.monotonic()
        if circle.folded:
            self._loop.call_after(("fold-proven", key), PROVEN_S, lambda: self._end(key))

    def _died(self, key: Key, last: Fields, shown: int = SHOWN) -> bool:
        """Count a death; True: it is not to be told now."""
        now = time.monotonic()
        circle = self._circles.get(key)
        if circle is not None and (
            (circle.ready_at is not None and now - circle.ready_at >= PROVEN_S)
            or (key is not None and key[1] is None and now - circle.died_at > _APART_S)
        ):
            self._end(key)
        circle = self._circles.setdefault(key, _Circle(now))
        self._loop.cancel(("fold-proven", key))
        circle.shown = shown
        circle.deaths += 1
        circle.ready_at = None
        circle.died_at = now
        circle.last = last
        circle.held.clear()
        if circle.deaths <= circle.shown:
            return False
        circle.untold += 1
        if self._loop.due(("fold", key)) is None:
            self._loop.call_after(("fold", key), circle.interval_s, lambda: self._tell(key))
        return True

    def _tell(self, key: Key) -> None:
        """Tell how often it went round since the last line."""
        circle = self._circles[key]
        generation, slot = key if key is not None else (self._failed, None)
        told = {
            "generation": generation,
            "slot": slot,
            "deaths": circle.deaths,
            "untold": circle.untold,
            "for_s": round(time.monotonic() - circle.began, 1),
            **circle.last,
        }
        circle.untold = 0
        circle.interval_s = min(circle.interval_s * 2, LAST_INTERVAL_S)
        self._write("warning", "crash-loop", {k: v for k, v in told.items() if v is not None})

    def _end(self, key: Key) -> None:
        """Tell the rest, and what was kept back of the life that is now; begin anew."""
        circle = self._circles.get(key)
        if circle is None:
            return
        self._loop.cancel(("fold", key))
        self._loop.cancel(("fold-proven", key))
        if circle.untold:
            self._tell(key)
        del self._circles[key]
        now = time.monotonic()
        for when, level, event, fields in circle.held:
            self._write(level, event, {**fields, "ago_s": round(now - when, 1)})


def _why(fields: Fields) -> Fields:
    return {name: fields.get(name) for name in ("reason", "last_words")}


def _number(fields: Fields, name: str) -> int:
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0
