"""The page's model of one instance, from its statuses and events.

Pure: times are arguments, and everything returned is JSON.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from socketprotector.ctl.api import (
    Status,
    failing,
    is_lame_duck,
    label,
    listed,
    measure,
    number_in,
    other_waits_of,
    quantile_us,
    rollout_text,
    share_of,
    text,
    text_in,
    unhealthy,
    valid_dry_run,
)

from .web_series import SPARKLINES, History, Key, Window, key_of, rounded
from .web_text import cut, event_line, line, verdict_of

#: The workers and forked children that are drawn; further workers are only counted.
CELLS = 96
#: The ending generations that are drawn; older ones are only counted, to keep a card short.
ENDING_LANES = 4
_ENDING = ("draining", "abandoned")
#: How many of the workers that keep a draining generation alive are named.
_NAMED = 4
_MOST_WARNINGS, _WARNING_CHARACTERS = 10, 500
_PHASES = ("starting", "settling", "serving", "draining", "abandoned")
_WITHOUT_CONNECTIONS = ("starting", "abandoned")
#: Phase -> the field with the time when it began; for other phases, the time of opening.
_SINCE = {
    "serving": "serving_since_at",
    "settling": "serving_since_at",
    "draining": "draining_since_at",
}


class Instance:
    """The instance behind one control socket, living or not."""

    def __init__(self, path: str) -> None:
        self.path = path
        #: The same after a restart of the exporter, so that an open page recognizes the instance.
        self.id = hashlib.blake2s(path.encode("utf-8", "replace"), digest_size=5).hexdigest()
        self.name = path
        self.history = History()
        self.status: Status | None = None
        self.why = "connecting"  # why there is no status; "": there is one
        self._stopped = False
        self._seen_at = 0.0
        self._newest = 0  # the number of the newest generation
        self._generation_of: dict[int, int] = {}  # worker's number -> generation's number
        self._shown: dict[str, Any] = {}
        self._window = Window()
        #: Generation -> connections and workers when its drain began.
        self._most: dict[Key, tuple[float, int]] = {}
        self._failed: dict[str, Any] | None = None

    def lost(self, why: str, *, has_socket: bool = True) -> None:
        """Record that the instance does not answer; its last status stays shown.

        has_socket: whether the socket's file exists.  Usually a stop removes it; a kill does not.
        """
        if not has_socket and self._shown and self.why in ("", "gone"):
            self._stopped = True
        self.why = "stopped" if self._stopped else why
        self._window.clear()
        self._newest = 0  # the next status may come from another protector

    def see(self, status: Status, at: float, clock: float) -> None:
        """Update from a status.  at: a monotonic time; clock: seconds since the epoch."""
        self.status, self.why = status, ""
        self._stopped, self._seen_at = False, clock
        self._number(status)
        self._window.see(status, at)
        self._shown = self._see(status)
        self.history.put(clock, **{name: self._shown[name] for name in SPARKLINES})

    def shown(self) -> dict[str, Any]:
        """Return the shown fields, without the history."""
        found = {"id": self.id, "name": self.name, "why": self.why, **self._shown}
        if self.why and self._shown:
            found["seen"] = self._seen_at  # the time of the last status
        return found

    # -- events ------------------------------------------------------------------

    def hear(self, message: Status) -> dict[str, Any]:
        """Update from an event, and return its shown fields."""
        happened = label(message, "event")
        if happened == "stopped":
            self._stopped = True
        number = self._generation_in(message)
        shown = {"id": self.id, "name": self.name, **event_line(message, number)}
        if number:
            # Numbers begin at 1 again with another protector at this socket.
            shown["release"] = f"{self._shown['started']} {number}"
        return shown

    def _number(self, status: Status) -> None:
        self._generation_of = {}
        for each in listed(status, "generations"):
            number = number_in(each, "number")
            self._newest = max(self._newest, number)
            for worker in listed(each, "workers"):
                self._generation_of[number_in(worker, "number")] = number

    def _generation_in(self, message: Status) -> int:
        """Return the number of an event's generation; 0: none."""
        if not self._newest:
            return 0  # before the first status
        if label(message, "event") == "reloading":
            return self._newest + 1  # the generation is not opened yet
        worker = number_in(message, "worker")
        number = number_in(message, "generation") or self._generation_of.get(worker, 0)
        if number and worker:
            self._generation_of[worker] = number
        self._newest = max(self._newest, number)
        return number

    # -- the shown fields --------------------------------------------------------

    def _see(self, status: Status) -> dict[str, Any]:
        generations = listed(status, "generations")
        notes = _notes_of_generations(status)
        lanes = [
            self._lane(each, *notes.get(number_in(each, "number"), ("", "")))
            for each in generations
        ]
        living = {key_of(each) for each in generations}
        self._most = {key: most for key, most in self._most.items() if key in living}
        waits = self._window.waits(living)
        return {
            "phase": line(label(status, "phase") or "unknown"),
            "notes": _notes(status),
            "waits_for": _waits(status),
            "warnings": _warnings(status),
            "health": _health(status),
            "version": line(text_in(status, "version")),
            "pid": number_in(status, "pid"),
            "started": measure(status, "started_at"),
            "restarts": number_in(status, "restarts"),
            "crashes": number_in(status, "crashes"),
            "listens": [line(text_in(each, "address")) for each in listed(status, "listeners")],
            "rate": self._rate(lanes),
            "active": _sum(lane["active"] for lane in lanes if lane["counts"]),
            "queue": _sum(lane["queue"] for lane in lanes if lane["counts"]),
            "limit": measure(status, "queue_limit"),
            "backlog": _sum(measure(each, "backlog") for each in listed(status, "listeners")),
            "p50": quantile_us(waits, 0.50),
            "p99": quantile_us(waits, 0.99),
            "unknown": _unknown(status),
            **_shown_lanes(lanes),
            "failed": self._last_failure(status),
            "tried": _tried(status),
        }

    def _lane(self, generation: Status, shown_as: str, note: str) -> dict[str, Any]:
        """Return the lane of a generation.

        shown_as: shown instead of the phase; note: what shown_as means.
        """
        key, phase = key_of(generation), label(generation, "phase")
        workers = listed(generation, "workers")
        waits = self._window.waits([key])
        release = cut(line(text_in(generation, "release")), 80)
        notes = (f"release {release}" if release else "", note)
        return {
            "number": number_in(generation, "number"),
            "phase": shown_as or (phase if phase in _PHASES else "unknown"),
            "note": "; ".join(filter(None, notes)),
            "since": measure(generation, _SINCE.get(phase or "", "opened_at")),
            "path": line(text_in(generation, "path")),
            # Without connections there is no unknown count.
            "counts": phase not in _WITHOUT_CONNECTIONS,
            "unknown": _unknown_of(generation),
            "rate": rounded(self._window.taken_rate(key)),
            "active": measure(generation, "active"),
            "queue": measure(generation, "queue"),
            "untaken": measure(generation, "oldest_waiting_s"),
            "p50": quantile_us(waits, 0.50),
            "p99": quantile_us(waits, 0.99),
            "ready": sum(label(each, "state") in ("ready", "retiring") for each in workers),
            "size": len(workers),
            "workers": list(islice(_cells(workers), CELLS)),
            "drain": self._drain(key, generation, workers, drains=phase == "draining"),
        }

    def _drain(
        self, key: Key, generation: Status, workers: Sequence[Status], *, drains: bool
    ) -> dict[str, Any] | None:
        """Return the progress of a drain, and the workers that keep the generation alive.

        The unit is connections; or workers, if connections are not counted.
        """
        active, most = measure(generation, "active"), self._most.get(key, (0.0, 0))
        if not drains:  # remembered, because the numbers only fall during a drain
            self._most[key] = active or 0.0, len(workers)
            return None
        self._most[key] = max(most[0], active or 0.0), max(most[1], len(workers))
        left, most_of_them = (active, most[0]) if active is not None else (len(workers), most[1])
        keeping = [each for each in workers if _keeps_alive(each)]
        keeping.sort(key=lambda each: -(measure(each, "active") or 0.0))
        return {
            "left": left,
            "of": max(left, most_of_them),
            "what": "connections" if active is not None else "workers",
            "by": [_keeper(each) for each in keeping[:_NAMED]],
            "more": max(0, len(keeping) - _NAMED),
        }

    def _last_failure(self, status: Status) -> dict[str, Any] | None:
        ended = [each for each in listed(status, "reloads") if label(each, "result") != "running"]
        failed = [each for each in ended if label(each, "result") == "failed"]
        if failed:
            self._failed = verdict_of(failed[-1])
        if self._failed is None:
            return None
        return {**self._failed, "last": bool(failed) and failed[-1] is ended[-1]}

    def _rate(self, lanes: Iterable[Mapping[str, Any]]) -> float | int | None:
        """Return connections per second, by the protector's counts or the workers'."""
        forwarded = self._window.forwarded_rate()
        if forwarded is not None:
            return rounded(forwarded)
        return rounded(_sum(lane["rate"] for lane in lanes if lane["counts"]))


def _shown_lanes(lanes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the lanes, the newest first, and the number of older ones left out."""
    lanes.sort(key=lambda lane: -lane["number"])
    ending = [lane for lane in lanes if lane["phase"] in _ENDING]
    left_out = ending[ENDING_LANES:]
    return {
        "lanes": [lane for lane in lanes if lane not in left_out],
        "more_lanes": len(left_out),
    }


def _tried(status: Status) -> dict[str, Any] | None:
    """Return the result of the last dry run; None if a reload has begun since."""
    dry_run = valid_dry_run(status)
    if dry_run is None:
        return None
    return {**verdict_of(dry_run), "passed": label(dry_run, "result") == "passed"}


def _notes_of_generations(status: Status) -> dict[int, tuple[str, str]]:
    """Return generation -> (text instead of its phase, note), for unusual situations.

    In a dry run a generation gets no client; while a new one settles, the old one is kept.
    """
    found = {}
    dry_run = status.get("dry_run")
    if isinstance(dry_run, dict):
        found[number_in(dry_run, "generation")] = "", "dry run: it gets no client"
    generations = listed(status, "generations")
    settling = [each for each in generations if label(each, "phase") == "settling"]
    for new in settling:
        olds = [each for each in generations if label(each, "phase") == "serving"]
        check = cut(line(text_in(new, "settle_check")), 80)
        note = f"--settle-check probes {check}" if check else ""
        if share := _share_note(status, number_in(new, "number")):
            note = f"{share}{'; ' if note else ''}{note}"
        for old in olds:
            number = number_in(old, "number")
            if shares := _share_note(status, number):
                found[number] = "", shares
                continue
            found[number] = "standby", "gets new clients again if the new one fails"
            note += f"{'; ' if note else ''}generation {number} stands by"
        found[number_in(new, "number")] = "", note
    return found


def _share_note(status: Status, generation: int) -> str:
    """Return a generation's share of new connections; "" if the share is unknown, none or all."""
    share = share_of(status, generation)
    return f"{share:.4g}% of new connections" if share and share < 100 else ""


def _waits(status: Status) -> list[str]:
    """Return how far the rollout is, and what it waits for."""
    rollout = rollout_text(status)
    shown = [f"rollout: {rollout}"] if rollout else []
    return [line(each) for each in (*shown, *(wait.text for wait in other_waits_of(status)))]


def _unknown(status: Status) -> list[str]:
    """Return the names of an instance's unknown figures."""
    generations = listed(status, "generations")
    counting = [each for each in generations if label(each, "phase") not in _WITHOUT_CONNECTIONS]
    found = [name for each in counting for name in _unknown_of(each)]
    if measure(status, "forwarded") is not None:  # the protector counts them
        found = [name for name in found if name != "rate"]
    return sorted(set(found))


def _unknown_of(generation: Status) -> list[str]:
    """Return the names of a generation's unknown figures, which its workers do not count."""
    known = {
        "active": measure(generation, "active") is not None,
        "queue": measure(generation, "queue") is not None,
        "rate": measure(generation, "accepted") is not None,
        "waits": isinstance(generation.get("wait_us"), dict),
    }
    return [name for name, is_known in known.items() if not is_known]


def _notes(status: Status) -> list[str]:
    """Return notes for the operator, beside the phase."""
    found = []
    if measure(status, "held_s") is not None:
        found.append("held: no connection is accepted")
    if (why := unhealthy(status)) is not None:
        found.append(cut(f"unhealthy: {line(why)}"))
    elif _health(status) == "unknown" and (last := text_in(status["health"], "last")):
        found.append(cut(f"health unknown: {line(last)}"))
    if is_lame_duck(status):
        found.append("lame duck: /readyz answers 503")
    for each in listed(status, "generations"):
        if why := failing(each):
            found.append(cut(f"generation {number_in(each, 'number')}: {line(why)}"))
        if (untaken := measure(each, "oldest_waiting_s")) is not None:
            number = number_in(each, "number")
            found.append(f"generation {number}: a client has waited for {untaken:.0f} s")
    return found


def _warnings(status: Status) -> list[str]:
    """Return the warnings about the settings, which were also shown at the start."""
    found = status.get("warnings")
    texts = [each for each in found if isinstance(each, str)] if isinstance(found, list) else []
    more = len(texts) - _MOST_WARNINGS
    shown = [cut(text.escape(each), _WARNING_CHARACTERS) for each in texts[:_MOST_WARNINGS]]
    command = f"socketprotectorctl --name {shlex.quote(label(status, 'name') or '')} status"
    return [*shown, *([f"and {more} more: {command}"] if more > 0 else [])]


def _health(status: Status) -> str:
    """Return the state by --health; empty without it."""
    health = status.get("health")
    if not isinstance(health, dict):
        return ""
    state = text_in(health, "state")
    return state if state in ("healthy", "unhealthy") else "unknown"


def _cells(workers: Iterable[Status]) -> Iterator[list[Any]]:
    """Yield the cell of each worker, followed by those of its forked children."""
    for each in workers:
        yield _cell(each)
        for child in listed(each, "processes"):
            number = f"{number_in(each, 'number')}.{number_in(child, 'number')}"
            yield [number, number_in(child, "pid"), "child", measure(child, "active"), ""]


def _cell(worker: Status) -> list[Any]:
    """Return a worker's number, pid, state, connections and STATUS=."""
    return [
        number_in(worker, "number"),
        number_in(worker, "pid"),
        line(label(worker, "state") or "unknown"),
        measure(worker, "active"),
        cut(line(text_in(worker, "status")), 80),
    ]


def _keeps_alive(worker: Status) -> bool:
    # A worker with an unknown count, or with processes that outlive the worker, may do so, too.
    return measure(worker, "active") != 0.0


def _keeper(worker: Status) -> str:
    pid, active = number_in(worker, "pid"), measure(worker, "active")
    if label(worker, "state") == "orphaned":
        return f"processes that worker {number_in(worker, 'number')} has left (ps -s {pid})"
    known = "" if active is None else f": {active:.0f}"
    return f"worker {number_in(worker, 'number')} (pid {pid}){known}"


def _sum(values: Iterable[float | None]) -> float | None:
    """Return the sum; None if a value is unknown, or if there are no values."""
    found = list(values)
    return sum(found) if found and None not in found else None  # type: ignore[arg-type]
