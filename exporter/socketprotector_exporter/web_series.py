"""The figures of an instance over time: rates and waits in a window, and sparklines.

Pure: times are arguments.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from socketprotector.ctl.api import Status, listed, measure

#: The length of the window for rates and waits.
WINDOW_S = 5.0
#: Sparklines: ten minutes.
STEP_S = 5
POINTS = 120
SPARKLINES = ("rate", "active", "p99")
_BUCKETS = 32

#: Number and opening time of a generation.  With a new protector, numbers begin at 1 again.
Key = tuple[float, float]


def key_of(generation: Status) -> Key:
    """Return the key of a generation, unique over protectors at the same socket."""
    return measure(generation, "number") or 0.0, measure(generation, "opened_at") or 0.0


@dataclass(slots=True)
class History:
    """The values of the last POINTS steps of STEP_S seconds; NaN: unknown."""

    _step: int = 0
    _values: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("d", [math.nan] * POINTS) for name in SPARKLINES}
    )

    def put(self, at: float, **values: float | None) -> None:
        """Set the values of the step that `at` is in."""
        step = int(at // STEP_S)
        # After a gap, or if the clock was set back, old values must not look new.
        known = 0 <= step - self._step < POINTS
        for missed in range(self._step + 1 if known else step - POINTS + 1, step):
            self._set(missed, dict.fromkeys(SPARKLINES))
        self._step = step
        self._set(step, values)

    def _set(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, column in self._values.items():
            value = values[name]
            column[step % POINTS] = math.nan if value is None else value

    def points(self, last: int = POINTS) -> dict[str, Any]:
        """Return the last steps, the oldest first, and the number of the newest step."""
        steps = range(self._step - last + 1, self._step + 1) if self._step else ()
        found = {
            name: [rounded(column[step % POINTS]) for step in steps]
            for name, column in self._values.items()
        }
        unknown = sum(1 for _ in takewhile(_are_unknown, zip(*found.values(), strict=True)))
        return {"step": self._step, **{name: row[unknown:] for name, row in found.items()}}


def _are_unknown(values: Iterable[float | None]) -> bool:
    return all(value is None for value in values)


def rounded(value: float | None) -> float | int | None:
    """Return a number rounded to few characters; None if it is unknown or infinite."""
    if value is None or not math.isfinite(value):
        return None
    return round(value) if value >= 10 else round(value, 1)


@dataclass(frozen=True, slots=True)
class _Sample:
    """The counts at one time, by generation; None: unknown."""

    at: float
    forwarded: float | None
    taken: Mapping[Key, float | None]
    waits: Mapping[Key, Sequence[int]]


class Window:
    """The counts of an instance within the last WINDOW_S seconds."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def clear(self) -> None:
        """Drop all samples: the next status may come from another protector."""
        self._samples.clear()

    def see(self, status: Status, at: float) -> None:
        """Add the status of the time `at`."""
        sample = _sample(status, at)
        if self._samples and _went_back(self._samples[-1], sample):
            self.clear()  # another protector's counts
        self._samples.append(sample)
        while len(self._samples) > 2 and self._samples[1].at <= at - WINDOW_S:
            self._samples.popleft()

    def forwarded_rate(self) -> float | None:
        """Return the connections per second that the protector forwards; None if unknown."""
        return self._rate(lambda sample: sample.forwarded)

    def taken_rate(self, key: Key) -> float | None:
        """Return the connections per second that a generation takes; None if unknown."""
        return self._rate(lambda sample: sample.taken.get(key))

    def _rate(self, of: Callable[[_Sample], float | None]) -> float | None:
        known = [
            (sample.at, value) for sample in self._samples if (value := of(sample)) is not None
        ]
        if len(known) < 2 or self._samples[-1].at != known[-1][0] or known[-1][0] <= known[0][0]:
            return None
        return max(0.0, (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0]))

    def waits(self, keys: Iterable[Key]) -> list[int]:
        """Return the histogram of waits of these generations' connections."""
        found = [0] * _BUCKETS
        for key in keys:
            known = [sample.waits[key] for sample in self._samples if key in sample.waits]
            if len(known) > 1:
                for bucket in range(_BUCKETS):
                    found[bucket] += max(0, known[-1][bucket] - known[0][bucket])
        return found


def _sample(status: Status, at: float) -> _Sample:
    taken, waits = {}, {}
    for each in listed(status, "generations"):
        key = key_of(each)
        taken[key] = measure(each, "accepted")
        waited = each.get("wait_us")
        buckets = waited.get("buckets") if isinstance(waited, dict) else None
        if isinstance(buckets, list) and len(buckets) == _BUCKETS:
            waits[key] = [each if isinstance(each, int) else 0 for each in buckets]
    return _Sample(at, measure(status, "forwarded"), taken, waits)


def _went_back(before: _Sample, now: _Sample) -> bool:
    return (now.forwarded or 0.0) < (before.forwarded or 0.0)
