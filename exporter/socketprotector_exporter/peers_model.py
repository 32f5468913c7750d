"""What the page shows of another host, made of what its exporter answers at /metrics.

Pure: times are arguments, and everything returned is JSON.  The other host is not trusted: what it
answers is read line by line, whatever its length; names of instances are cut and have no control
characters.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from socketprotector.ctl.api import text

from .metrics import PHASES
from .web_series import rounded

#: The longest line that is read; ours have 200 bytes.
LINE_BYTES = 65_536
#: Ours have 20 of an instance.  Each takes a microsecond or two, so this bounds what a host costs.
_SAMPLES = 10_000
_NAMED = 3
_NAME_CHARACTERS = 80
#: Possessive: what does not match is given up after one look, so nobody can keep us busy.
_SAMPLE = re.compile(
    rb"^socketprotector_(up|serving|held|lame_duck|healthy|last_reload_successful|phase"
    rb"|connections_(?:accepted_total|taken_total|active))"
    rb'\{((?:[^"\n}]++|"(?:[^"\\\n]++|\\.)*+")*+)\} (\S+)',
    re.MULTILINE,
)
_LABEL = re.compile(rb'(instance|phase)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")
#: The first that the exporter has is how connections are counted.
_COUNTS = ("connections_accepted_total", "connections_taken_total")

#: What may be said of an instance, the worst first, and how bad it is.
STATES = {
    "no answer": "bad",
    "not serving": "bad",
    "unhealthy": "bad",
    "reload failed": "bad",
    "unknown": "warn",
    "holding": "warn",
    "draining": "warn",
    "stopping": "warn",
    "starting": "busy",
    "settling": "busy",
    "reloading": "busy",
    "serving": "good",
}
#: And of a host.
ASKING, SILENT, EMPTY = "asking", "not answering", "no instance"
_TONES = {**STATES, ASKING: "wait", SILENT: "bad", EMPTY: "warn"}
_WORST = tuple(STATES)


class NoMetrics(Exception):
    """What came is not what an exporter answers; the text says what it is instead."""


@dataclass(slots=True)
class Sampled:
    """An instance: the values of its metrics by name, without `socketprotector_`."""

    values: dict[str, float] = field(default_factory=dict)
    phase: str = ""

    @property
    def state(self) -> str:
        """The worst that is to be said of it, one of STATES."""
        value = self.values.get
        if value("up") != 1:
            return "no answer"
        if self.phase == "waiting":
            return "not serving"
        if value("serving") != 1:
            return self.phase if self.phase in STATES and self.phase != "serving" else "unknown"
        if value("healthy") == 0:
            return "unhealthy"
        if value("last_reload_successful") == 0:
            return "reload failed"
        if value("held") == 1:
            return "holding"
        if value("lame_duck") == 1:
            return "draining"
        return self.phase if self.phase in STATES else "serving"

    @property
    def count(self) -> tuple[str, float] | None:
        """How many connections there were, and which count that is; None where none is known."""
        return next(((each, self.values[each]) for each in _COUNTS if each in self.values), None)


class Scan:
    """Takes in an answer piece by piece, and keeps of it what is shown."""

    def __init__(self) -> None:
        self.instances: dict[str, Sampled] = {}
        self._rest = b""
        self._is_empty = True
        self._samples = 0

    def feed(self, piece: bytes) -> None:
        """Take in a piece.  Raises NoMetrics."""
        whole, _, self._rest = (self._rest + piece).rpartition(b"\n")
        if len(self._rest) > LINE_BYTES:
            raise NoMetrics("sends no metrics of ours")
        self._take(whole)

    def end(self) -> dict[str, Sampled]:
        """Return the instances by name, after the last piece.  Raises NoMetrics."""
        self._take(self._rest)
        if not self.instances and not self._is_empty:
            raise NoMetrics("sends no metrics of ours")
        return self.instances

    def _take(self, lines: bytes) -> None:
        if lines:
            self._is_empty = False
        samples = _SAMPLE.findall(lines)
        self._samples += len(samples)
        if self._samples > _SAMPLES:
            raise NoMetrics(f"sends more than {_SAMPLES} samples of ours")
        for metric, labels, value in samples:
            found = {name: _unescaped(said) for name, said in _LABEL.findall(labels)}
            name = found.get(b"instance", "")
            one = self.instances.setdefault(name, Sampled())
            number = _number(value)
            if metric != b"phase":
                if number is not None:
                    one.values[metric.decode()] = number
            elif number == 1:
                phase = found.get(b"phase", "")
                one.phase = phase if phase in PHASES else ""


def _unescaped(value: bytes) -> str:
    value = value[: 4 * _NAME_CHARACTERS]  # no character of it has more bytes
    whole = _ESCAPED.sub(
        lambda found: "\n" if found[1] == "n" else found[1], value.decode("utf-8", "replace")
    )
    return text.escape(whole)[:_NAME_CHARACTERS]


def _number(value: bytes) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


class Host:
    """One line of the file of `--peers`, answering or not."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: The same after a restart, so that a page that stayed open recognizes it.
        self.id = hashlib.blake2s(name.encode(), digest_size=5).hexdigest()
        self.forget()

    def forget(self) -> None:
        """Nobody asks it any more: what it said may be so no longer."""
        self._state, self._note = ASKING, ""
        self._since: float | None = None
        self._instances: int | None = None
        self._rate: float | None = None
        self._active: float | None = None
        self._counted: tuple[float, Mapping[tuple[str, str], float]] | None = None

    def failed(self, why: str, clock: float) -> None:
        """Take in that it gave no answer.  why: in some words; clock: since the epoch."""
        self._instances = self._rate = self._active = self._counted = None
        self._becomes(SILENT, why, clock)

    def saw(self, instances: Mapping[str, Sampled], at: float, clock: float) -> None:
        """Take in an answer.  at: a monotonic time; clock: since the epoch."""
        living = {name: one for name, one in instances.items() if one.values.get("up") == 1}
        counts = {(name, one.count[0]): one.count[1] for name, one in living.items() if one.count}
        self._instances = len(instances)
        self._rate = None
        if self._counted and len(counts) == len(living):
            self._rate = _rate(*self._counted, at, counts)
        self._counted = at, counts
        active = [one.values.get("connections_active") for one in living.values()]
        self._active = sum(filter(None, active)) if active and None not in active else None
        states = {name: one.state for name, one in instances.items()}
        worst = min(states.values(), key=_WORST.index, default=EMPTY)
        theirs = sorted(name for name, state in states.items() if state == worst)
        self._becomes(worst, "" if worst == "serving" else _names(theirs), clock)

    def _becomes(self, state: str, note: str, clock: float) -> None:
        if state != self._state:
            self._state, self._since = state, clock
        self._note = note

    def shown(self) -> dict[str, Any]:
        """Return all that is shown of it; what is not known is null."""
        return {
            "id": self.id,
            "name": self.name,
            "tone": _TONES[self._state],
            "state": self._state,
            "note": self._note,
            "since": self._since,
            "instances": self._instances,
            "rate": rounded(self._rate),
            "active": self._active,
        }


def _rate(
    before_at: float,
    before: Mapping[tuple[str, str], float],
    at: float,
    counts: Mapping[tuple[str, str], float],
) -> float | None:
    """Return connections a second; None where one is not known, or counts from its start anew."""
    if not counts or at <= before_at:
        return None
    more = [count - before.get(each, math.inf) for each, count in counts.items()]
    return sum(more) / (at - before_at) if min(more) >= 0 else None


def _names(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
