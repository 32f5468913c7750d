"""Counts that only grow, made of what a status tells of generations and reloads that come and go.

A generation that is gone has left the status, and what it counted with it; a status has the last
ten reloads.  So what was seen is remembered here, for each instance.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..ctl.fields import Status, label, listed, measure

#: Of a generation, where its workers count (docs/control.md).
COUNTED = ("accepted", "finished", "errors", "lost")
RESULTS = ("reloaded", "failed")
BUCKETS = 32


@dataclass(slots=True)
class _Generation:
    counts: dict[str, float] = field(default_factory=dict)
    waits: list[float] | None = None

    def see(self, told: Status) -> None:
        for name in COUNTED:
            value = measure(told, name)
            if value is not None:
                # Workers write these: one that counts backwards must not take us along.
                self.counts[name] = max(value, self.counts.get(name, 0.0))
        waits = _waits(told)
        if waits is not None:
            before = self.waits or [0.0] * BUCKETS
            self.waits = [max(pair) for pair in zip(waits, before, strict=True)]

    def add(self, other: _Generation) -> None:
        for name, value in other.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + value
        if other.waits is not None:
            before = self.waits or [0.0] * BUCKETS
            self.waits = [a + b for a, b in zip(other.waits, before, strict=True)]


class Counters:
    """Of one instance."""

    def __init__(self) -> None:
        self.reloads = dict.fromkeys(RESULTS, 0)
        self.last_success_at: float | None = None
        self.last_result: str | None = None
        self.forwarded: float | None = None
        self._started_at: float | None = None
        self._gone = _Generation()
        self._living: dict[tuple[float, float], _Generation] = {}
        self._reloads: set[tuple[float, float]] = set()

    def see(self, status: Status) -> None:
        """Take in a status."""
        self._see_forwarded(status)
        self._see_generations(status)
        self._see_reloads(status)

    @property
    def _all(self) -> _Generation:
        found = _Generation()
        for each in (self._gone, *self._living.values()):
            found.add(each)
        return found

    def count(self, name: str) -> float | None:
        """Return one of COUNTED over all generations; None where workers do not count."""
        return self._all.counts.get(name)

    @property
    def waits(self) -> list[float] | None:
        """How many connections waited how long: as in a status, bucket n is below 2^n us."""
        return self._all.waits

    def _see_forwarded(self, status: Status) -> None:
        forwarded, started_at = measure(status, "forwarded"), measure(status, "started_at")
        if started_at != self._started_at:
            self._started_at, self.forwarded = started_at, None  # another protector's
        if forwarded is not None:
            # It is written down with events only: what was forwarded since the last one before a
            # crash is forgotten by the program that comes back.
            self.forwarded = max(forwarded, self.forwarded or 0.0)

    def _see_generations(self, status: Status) -> None:
        there: dict[tuple[float, float], _Generation] = {}
        for told in listed(status, "generations"):
            # The number alone begins anew with a new protector.
            key = (measure(told, "number") or 0.0, measure(told, "opened_at") or 0.0)
            there[key] = self._living.pop(key, _Generation())
            there[key].see(told)
        for each in self._living.values():
            self._gone.add(each)
        self._living = there

    def _see_reloads(self, status: Status) -> None:
        there = set()
        for told in listed(status, "reloads"):
            result = label(told, "result")
            if result not in RESULTS:
                continue  # it runs
            key = (measure(told, "generation") or 0.0, measure(told, "began_at") or 0.0)
            there.add(key)
            self.last_result = result
            if key not in self._reloads:
                self.reloads[result] += 1
            ended = measure(told, "ended_at")
            if result == "reloaded" and ended is not None:
                self.last_success_at = max(ended, self.last_success_at or 0.0)
        self._reloads = there


def _waits(told: Status) -> list[float] | None:
    waited = told.get("wait_us")
    buckets = waited.get("buckets") if isinstance(waited, dict) else None
    if not isinstance(buckets, list) or len(buckets) != BUCKETS:
        return None
    counts = [measure({"": each}, "") for each in buckets]
    return None if None in counts else [each or 0.0 for each in counts]
