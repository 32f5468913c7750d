"""Counts that only grow, made from the generations and reloads in a status.

A status has no counts of generations that are gone, and only the last ten reloads.  So earlier
counts are remembered here, for each instance.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

from socketprotector.ctl.api import Status, label, listed, measure

#: The counts of a generation whose workers count (docs/control.md).
COUNTED = ("accepted", "finished", "errors", "lost")
RESULTS = ("reloaded", "failed")
BUCKETS = 32
_BUCKETS = [str(bucket) for bucket in range(BUCKETS)]

#: The counts of a generation: some of COUNTED, and either all of _BUCKETS or none.
_Counts = dict[str, float]


class Counters:
    """The counts of one instance."""

    def __init__(self) -> None:
        self.reloads = dict.fromkeys(RESULTS, 0)
        self.last_success_at: float | None = None
        self.last_result: str | None = None
        self.forwarded: float | None = None
        self._started_at: float | None = None
        self._gone: _Counts = {}
        self._living: dict[tuple[float, float], _Counts] = {}
        self._reloads: set[tuple[float, float]] = set()

    def see(self, status: Status) -> None:
        """Add a status; counts that are no longer in it stay."""
        self._see_start(status)
        self._see_forwarded(status)
        self._see_generations(status)
        self._see_reloads(status)

    def count(self, name: str) -> float | None:
        """Return one of COUNTED over all generations; None if workers do not count."""
        return self._all().get(name)

    @property
    def waits(self) -> list[float] | None:
        """The histogram of waits, as in a status: bucket n counts the waits below 2^n us."""
        found = self._all()
        return [found[bucket] for bucket in _BUCKETS] if _BUCKETS[0] in found else None

    def _all(self) -> _Counts:
        found = self._gone
        for each in self._living.values():
            found = _merged(found, each, operator.add)
        return found

    def _see_start(self, status: Status) -> None:
        if (started_at := measure(status, "started_at")) != self._started_at:
            # Another protector: its count begins at 0, and it has not reloaded yet.
            self._started_at, self.forwarded, self.last_result = started_at, None, None

    def _see_forwarded(self, status: Status) -> None:
        if (forwarded := measure(status, "forwarded")) is not None:
            # A protector of an earlier version reports a lower count after a crash.  To Prometheus
            # a drop would be a reset to 0, so rate() would add all connections once more.
            self.forwarded = max(forwarded, self.forwarded or 0.0)

    def _see_generations(self, status: Status) -> None:
        there: dict[tuple[float, float], _Counts] = {}
        for each in listed(status, "generations"):
            # The number alone is not unique: it begins at 1 again with a new protector.
            key = (measure(each, "number") or 0.0, measure(each, "opened_at") or 0.0)
            # Workers write these counts: a worker that counts backwards must not lower ours.
            there[key] = _merged(self._living.pop(key, {}), _counts(each), max)
        for gone in self._living.values():
            self._gone = _merged(self._gone, gone, operator.add)
        self._living = there

    def _see_reloads(self, status: Status) -> None:
        there = set()
        for each in listed(status, "reloads"):
            result = label(each, "result")
            if result not in RESULTS:
                continue  # it is under way
            key = (measure(each, "generation") or 0.0, measure(each, "began_at") or 0.0)
            there.add(key)
            self.last_result = result
            if key not in self._reloads:
                self.reloads[result] += 1
            ended = measure(each, "ended_at")
            if result == "reloaded" and ended is not None:
                self.last_success_at = max(ended, self.last_success_at or 0.0)
        self._reloads = there


def _counts(generation: Status) -> _Counts:
    waited = generation.get("wait_us")
    buckets = waited.get("buckets") if isinstance(waited, dict) else None
    waits: _Counts = {}
    if isinstance(buckets, list) and len(buckets) == BUCKETS:
        waits = _measures(dict(zip(_BUCKETS, buckets, strict=True)), _BUCKETS)
    return _measures(generation, COUNTED) | (waits if len(waits) == BUCKETS else {})


def _measures(message: Status, names: Iterable[str]) -> _Counts:
    return {name: value for name in names if (value := measure(message, name)) is not None}


def _merged(one: _Counts, other: _Counts, by: Callable[[float, float], float]) -> _Counts:
    names = one.keys() | other.keys()
    return {name: by(one.get(name, 0.0), other.get(name, 0.0)) for name in names}
