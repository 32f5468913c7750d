"""What a run has found, as Markdown: pure functions of its notes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.figures import median
from bench.rivals.catalogue import QUOTED, RIVALS
from bench.rivals.situations import SITUATIONS

Seen = dict[str, Any]
KINDS = ("refused", "reset", "timed_out", "empty", "wrong", "local")
REFERENCE = "direct"
#: A difference of less than that is the machine's.
NOISE = 0.05
#: A longest gap of at most this is no gap: a scheduler's turn.
NO_GAP_MS = 5.0
BEST = 4
GAP = "longest gap, ms: median of the turns (longest of all)"


@dataclass(frozen=True)
class Note:
    """What was seen of one rival in one situation, in one turn."""

    rival: str
    situation: str
    turn: int
    seen: Seen
    error: str = ""

    def line(self) -> str:
        return json.dumps(vars(self), sort_keys=True)


def read(lines: Iterable[str]) -> list[Note]:
    """Return the notes of earlier runs, without an incomplete last line."""
    found = []
    for line in lines:
        try:
            found.append(Note(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def done(notes: Iterable[Note]) -> set[tuple[str, str, int]]:
    """Return what needs no second try."""
    return {(each.rival, each.situation, each.turn) for each in notes if not each.error}


def order(names: Sequence[str], turns: int) -> list[tuple[int, str]]:
    """Return the turns of all, A B B A."""
    return [
        (turn, name) for turn in range(turns) for name in (reversed(names) if turn % 2 else names)
    ]


class Results:
    """The notes of one run, by rival and situation."""

    def __init__(self, notes: Iterable[Note]) -> None:
        self._seen: dict[tuple[str, str], dict[int, Seen]] = defaultdict(dict)
        errors: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
        for each in notes:
            place = each.rival, each.situation
            if each.error:
                errors[place][each.turn] = each.error
            else:
                self._seen[place][each.turn] = each.seen
                errors[place].pop(each.turn, None)  # a second run has measured it
        self._errors = {place: [*found.values()] for place, found in errors.items()}

    def turns(self, rival: str, situation: str) -> list[Seen]:
        return list(self._seen.get((rival, situation), {}).values())

    def errors(self, rival: str, situation: str) -> list[str]:
        """Return why turns were not measured."""
        return self._errors.get((rival, situation), [])

    def middle(self, rival: str, situation: str, name: str) -> float | None:
        found = [float(each[name]) for each in self.turns(rival, situation) if name in each]
        return median(found) if found else None

    def most(self, rival: str, situation: str, name: str) -> float | None:
        found = [float(each[name]) for each in self.turns(rival, situation) if name in each]
        return max(found, default=None)

    def failures(self, rival: str, situation: str) -> tuple[Counter[str], int] | None:
        """Return the failed ones by kind, and all that were tried."""
        turns = self.turns(rival, situation)
        if not turns or "failed" not in turns[0]:
            return None
        kinds: Counter[str] = Counter()
        for each in turns:
            kinds.update({kind: each[kind] for kind in KINDS})
        tried = sum(each["connections"] for each in turns) + kinds.total()
        return +kinds, tried

    def share(self, rival: str, situation: str) -> float | None:
        """Return the share that failed."""
        found = self.failures(rival, situation)
        return found and found[0].total() / max(1, found[1])

    def ratio(self, rival: str, situation: str, name: str, beside: str = REFERENCE) -> float | None:
        """Return the median of the ratios of neighbours."""
        ours, theirs = (self._seen.get((each, situation), {}) for each in (rival, beside))
        both = sorted(ours.keys() & theirs.keys())
        ratios = [ours[turn][name] / theirs[turn][name] for turn in both if theirs[turn].get(name)]
        return median(ratios) if ratios else None


def best(results: Results, names: Iterable[str]) -> list[str]:
    """Return the best rivals: the fewest failures under reloads, then the shortest gap."""
    ranked = []
    for name in names:
        share, gap = results.share(name, "reload"), results.middle(name, "reload", "gap_us")
        if share is not None and gap is not None and _is_rival(name):
            ranked.append((share, gap, name))
    return [name for _, _, name in sorted(ranked)[:BEST]]


def failed(results: Results, rival: str, situation: str) -> str:
    """Return the failures by kind, as a cell."""
    found = results.failures(rival, situation)
    if found is None:
        return "-"
    kinds, tried = found
    by_kind = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    return f"{kinds.total():,} of {tried:,}" + (f": {by_kind}" if by_kind else "")


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def _gap(results: Results, rival: str, situation: str) -> str:
    """Return the median of the turns' longest gaps, and the longest of all, in ms."""
    middle = results.middle(rival, situation, "gap_us")
    most = results.most(rival, situation, "gap_us")
    return "-" if middle is None else f"{number(middle, 1, 1e-3)} ({number(most, 1, 1e-3)})"


def rows(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def everyone(results: Results, names: Iterable[str]) -> str:
    """Return the table of all."""
    body = [
        (
            name,
            number(results.ratio(name, "short", "per_second"), 2),
            number(results.middle(name, "short", "per_second"), 0),
            number(results.middle(name, "short", "p999_us"), 1, 1e-3),
            number(results.middle(name, "short", "cpu_us"), 0),
            failed(results, name, "reload") + _still(results, name, "reload"),
            _gap(results, name, "reload"),
            number(results.middle(name, "reload", "p999_us"), 1, 1e-3),
            number(results.middle(name, "reload", "reloads"), 0),
        )
        for name in names
    ]
    return rows(
        (
            *("name", f"connections/s / {REFERENCE}", "connections/s", "p99.9, ms"),
            *("CPU a connection, us", "reload each second: failed", GAP),
            *("p99.9, ms", "reloads a round"),
        ),
        body,
    )


def _still(results: Results, rival: str, situation: str) -> str:
    """Say where no release could be deployed afterwards."""
    turns = results.turns(rival, situation)
    bad = [each for each in turns if each.get("replaced") is False]
    return "; **no reload afterwards**" if bad else ""


def _cell(results: Results, rival: str, situation: str) -> str:
    if situation in RIVALS[rival].without:
        return "has none"
    if not results.turns(rival, situation):
        return "failed" if results.errors(rival, situation) else "-"
    if situation == "memory":
        return " / ".join(
            number(results.most(rival, situation, name)) for name in ("idle_mb", "most_mb")
        )
    if situation == "first":
        missed = results.most(rival, situation, "missed")
        said = number(results.middle(rival, situation, "first_ms"), 0)
        return said + (f"; {missed:.0f} never" if missed else "")
    parts = [failed(results, rival, situation), _gap(results, rival, situation)]
    parts.append(number(results.middle(rival, situation, "p999_us"), 1, 1e-3))
    if not SITUATIONS[situation].reloads:
        parts.insert(0, f"{number(results.ratio(rival, situation, 'per_second'), 2)}")
    return "; ".join(parts) + _still(results, rival, situation)


def chosen(results: Results, names: Sequence[str]) -> str:
    """Return the table of the faults: a row for each situation of each rival."""
    situations = [name for name, each in SITUATIONS.items() if not each.everyone]
    body = [
        (name, SITUATIONS[situation].title, _cell(results, name, situation))
        for situation in situations
        for name in names
    ]
    cell = (
        f"failed; {GAP}; p99.9, ms (first connections/s / {REFERENCE} without reloads; "
        "memory: MB idle / at the peak of a reload; first answer: ms)"
    )
    return rows(("name", "situation", cell), body)


@dataclass(frozen=True)
class _Measure:
    """What can be better: of one situation."""

    situation: str
    what: str
    name: str  # in the notes; "share": the share that failed
    more: bool = False  # is better
    same_worker: bool = False  # says something of the supervisor only there
    scale: float = 1.0
    unit: str = ""


def _measures() -> list[_Measure]:
    found = []
    for situation, each in SITUATIONS.items():
        if situation in ("memory", "first"):
            continue
        found.append(_Measure(situation, "failed", "share", scale=100, unit=" %"))
        if each.reloads:
            gap = "longest gap, median"
            found.append(_Measure(situation, gap, "gap_us", scale=1e-3, unit=" ms"))
        else:
            found.append(_Measure(situation, "connections/s", "per_second", True, True))
        found.append(
            _Measure(situation, "p99.9", "p999_us", same_worker=True, scale=1e-3, unit=" ms")
        )
    found += [
        _Measure("short", "CPU a connection", "cpu_us", same_worker=True, unit=" us"),
        _Measure("memory", "idle", "idle_mb", unit=" MB"),
        _Measure("memory", "at the peak of a reload", "most_mb", unit=" MB"),
        _Measure("first", "median", "first_ms", unit=" ms"),
    ]
    return found


def has_our_worker(name: str) -> bool:
    """Whether it serves by the same worker as ours, so that rates compare supervisors."""
    rival = RIVALS[name]
    return any("{worker}" in text for text in (rival.command, *rival.files.values()))


def _is_rival(name: str) -> bool:
    return RIVALS[name].compared and not RIVALS[name].ours


def _is_ours(name: str) -> bool:
    return RIVALS[name].compared and RIVALS[name].ours


def _value(results: Results, measure: _Measure, rival: str) -> float | None:
    if measure.name == "share":
        return results.share(rival, measure.situation)
    return results.middle(rival, measure.situation, measure.name)


def better(results: Results, names: Sequence[str]) -> list[str]:
    """Return a line for each measure in which a rival is better than the best of ours."""
    lines = []
    for measure in _measures():
        values = {
            name: value for name in names if (value := _value(results, measure, name)) is not None
        }
        ours = {name: value for name, value in values.items() if _is_ours(name)}
        if not ours:
            continue
        sign = -1 if measure.more else 1
        our_best = min(ours, key=lambda name: sign * ours[name])
        ahead = [
            name
            for name, value in values.items()
            if _is_rival(name)
            and (not measure.same_worker or has_our_worker(name))
            and _ahead(measure, value, ours[our_best])
        ]
        if ahead:
            ahead.sort(key=lambda name: sign * values[name])
            said = ", ".join(_said(measure, name, values[name]) for name in ahead)
            title = SITUATIONS[measure.situation].title
            own = _said(measure, our_best, ours[our_best])
            lines.append(f"{title}, {measure.what}: {said}; ours: {own}")
    return lines


def _said(measure: _Measure, name: str, value: float) -> str:
    return (
        f"{name} {number(value, 3 if measure.name == 'share' else 1, measure.scale)}{measure.unit}"
    )


def _ahead(measure: _Measure, theirs: float, ours: float) -> bool:
    if measure.name == "share":
        return theirs < ours
    if measure.name == "gap_us" and ours * measure.scale <= NO_GAP_MS:
        return False
    if measure.more:
        return theirs > ours * (1 + NOISE)
    return theirs < ours * (1 - NOISE)


def gaps(results: Results, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return, for each situation with a reload: our gaps beside the best rival's.

    Medians are compared, because chance decides the longest gap of a few turns.  The last element
    names the modes that meet the target.
    """
    found = []
    for situation, each in SITUATIONS.items():
        if situation in ("memory", "first") or not each.reloads:
            continue
        all_gaps = {
            name: value / 1e3
            for name in names
            if (value := results.middle(name, situation, "gap_us")) is not None
        }
        theirs = {name: gap for name, gap in all_gaps.items() if _is_rival(name)}
        shown = (name for name in all_gaps if name not in theirs)
        beside = {name: all_gaps[name] for name in sorted(shown, key=_is_ours, reverse=True)}
        compared = {name: gap for name, gap in beside.items() if _is_ours(name)}
        if theirs and compared:
            best_name = min(theirs, key=theirs.__getitem__)
            least = max(theirs[best_name] * (1 + NOISE), NO_GAP_MS)
            said = ", ".join(f"{name} {_gap(results, name, situation)}" for name in beside)
            text = f"{said} against {_gap(results, best_name, situation)} of {best_name}"
            meet = [name for name, gap in compared.items() if gap <= least]
            found.append((each.title, text, _verdict(meet, compared)))
    return found


def _verdict(meet: Sequence[str], compared: Iterable[str]) -> str:
    if not meet:
        return "**missed**"
    return "holds" if set(meet) == set(compared) else f"**missed**; holds for {', '.join(meet)}"


def manuals(names: Iterable[str], versions: dict[str, str]) -> str:
    """Return a row for each rival: its command, and the words of its manual."""
    body = [
        (
            name,
            versions.get(name, "-"),
            f"`{', '.join(RIVALS[name].reload)}`" if RIVALS[name].reload else "-",
            RIVALS[name].manual,
            RIVALS[name].source,
        )
        for name in names
    ]
    return rows(("name", "version", "reload", "its manual", "source"), body)


def not_run(missing: dict[str, str]) -> str:
    """Return those of which only the words are known."""
    body = [(each.name, each.says, each.source, each.why) for each in QUOTED]
    body += [(name, RIVALS[name].manual, RIVALS[name].source, why) for name, why in missing.items()]
    return rows(("name", "its manual", "source", "not run"), body)


def errors(results: Results, names: Iterable[str]) -> list[str]:
    """Return what could not be measured, and why."""
    return [
        f"{name}, {SITUATIONS[situation].title}: {error}"
        for name in names
        for situation in SITUATIONS
        for error in results.errors(name, situation)
    ]
