"""The page's model of another host, from its exporter's answer at /metrics.

Pure: times are arguments, and everything returned is JSON.  The other host is not trusted: its
answer is read line by line, whatever its length; names of instances are cut and have no control
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

#: The longest line that is read; our exporter's lines have 200 bytes.
LINE_BYTES = 65_536
#: Our exporter sends 20 samples for an instance.  A sample costs 1 or 2 us.
_SAMPLES = 10_000
_NAMED = 3
_NAME_CHARACTERS = 80
#: With possessive quantifiers a mismatch fails at once, so no host can keep us busy.
_SAMPLE = re.compile(
    rb"^socketprotector_(up|serving|held|lame_duck|healthy|last_reload_successful|phase"
    rb"|connections_(?:accepted_total|taken_total|active))"
    rb'\{((?:[^"\n}]++|"(?:[^"\\\n]++|\\.)*+")*+)\} (\S+)',
    re.MULTILINE,
)
_LABEL = re.compile(rb'(instance|phase)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")
#: The counts of connections, the preferred one first.
_COUNTS = ("connections_accepted_total", "connections_taken_total")

#: The states of an instance, the worst first -> the tone in which the page shows it.
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
#: Further states of a host.
ASKING, SILENT, EMPTY = "asking", "not answering", "no instance"
_TONES = {**STATES, ASKING: "wait", SILENT: "bad", EMPTY: "warn"}
_WORST = tuple(STATES)


class NoMetrics(Exception):
    """An answer does not come from an exporter; the text says why."""


@dataclass(slots=True)
class Sampled:
    """An instance: the values of its metrics by name, without `socketprotector_`."""

    values: dict[str, float] = field(default_factory=dict)
    phase: str = ""

    @property
    def state(self) -> str:
        """The first of STATES, the worst first, that applies."""
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
        """The first known count of connections, with its name; None if none is known."""
        return next(((each, self.values[each]) for each in _COUNTS if each in self.values), None)


class Scan:
    """Parses an answer piece by piece, and keeps the shown part."""

    def __init__(self) -> None:
        self.instances: dict[str, Sampled] = {}
        self._rest = b""
        self._is_empty = True
        self._samples = 0

    def feed(self, piece: bytes) -> None:
        """Parse a piece.  Raises NoMetrics."""
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
    value = value[: 4 * _NAME_CHARACTERS]  # a character has 4 bytes at most
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
    """A host in the file of `--peers`, whether it answers or not."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: The same after a restart of the exporter, so that an open page recognizes the host.
        self.id = hashlib.blake2s(name.encode(), digest_size=5).hexdigest()
        self.forget()

    def forget(self) -> None:
        """Drop the last answer, which may be outdated at the next use."""
        self._state, self._note = ASKING, ""
        self._since: float | None = None
        self._instances: int | None = None
        self._rate: float | None = None
        self._active: float | None = None
        self._counted: tuple[float, Mapping[tuple[str, str], float]] | None = None

    def failed(self, why: str, clock: float) -> None:
        """Record that the host gave no answer.  why: in a few words; clock: since the epoch."""
        self._instances = self._rate = self._active = self._counted = None
        self._becomes(SILENT, why, clock)

    def saw(self, instances: Mapping[str, Sampled], at: float, clock: float) -> None:
        """Note the host's answer.  at: a monotonic time; clock: seconds since the epoch."""
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
        """Return the shown fields; an unknown value is null."""
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
    """Return connections per second; None if a count is unknown, or was reset by a restart."""
    if not counts or at <= before_at:
        return None
    more = [count - before.get(each, math.inf) for each, count in counts.items()]
    return sum(more) / (at - before_at) if min(more) >= 0 else None


def _names(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
