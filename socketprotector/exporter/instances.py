"""Whom to ask, and what they say: each time anew, as instances come and go."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from .. import control_path
from ..ctl import find
from ..ctl.failure import NoProtector
from ..ctl.survey import Found, ask_all
from ..errors import UsageError
from .reading import number
from .series import Series, serves
from .totals import Totals

#: Far below the 10 s that Prometheus waits by itself.
ANSWER_S = 2.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Who was asked for on the command line; neither: all there are."""

    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    def sockets(self) -> list[tuple[str, str]]:
        """Return the name and the path of each; a path of "" has not been found."""
        if not self.names and not self.paths:
            paths = find.sockets()
            return list(zip(_labels(paths), paths, strict=True))
        named = [(name, _by_name(name)) for name in self.names]
        return named + list(zip(_labels(self.paths), self.paths, strict=True))


def _by_name(name: str) -> str:
    try:
        return find.by_name(name)
    except (NoProtector, UsageError):
        return ""


def _labels(paths: Sequence[str]) -> list[str]:
    """What to call instances by their sockets: the whole path where two have one name."""
    keys = [control_path.key(path) for path in paths]
    return [key if keys.count(key) == 1 else path for key, path in zip(keys, paths, strict=True)]


class Instances(Collector):
    """Asks all that are wanted, and remembers what must not be forgotten."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._totals: dict[str, Totals] = {}
        self._alone = threading.Lock()

    def collect(self) -> list[Metric]:
        """Ask everybody, and return what they say as metrics."""
        series = Series()
        # One scrape after the other: an answer that is older must not be counted after a newer.
        with self._alone:
            answers = self._ask()
            known = {name for name, _ in answers}
            self._totals = {n: totals for n, totals in self._totals.items() if n in known}
            for name, found in answers:
                if found is None or found.result is None:
                    series.add_silent(name)
                    continue
                totals = self._totals.setdefault(name, Totals())
                totals.see(found.result)
                series.add(name, found.result, totals)
        return [family for family in series.families() if family.samples]

    def describe(self) -> list[Metric]:
        """Nobody is to be asked when this is registered."""
        return list(Series().families())

    def unready(self) -> list[str]:
        """Return a line for each instance that was asked for and does not serve."""
        answers = self._ask()
        if not answers:
            return ["no protector has a control socket"]
        return [f"{name}: {why}" for name, found in answers if (why := _why_not(found))]

    def _ask(self) -> list[tuple[str, Found | None]]:
        sockets = self._wanted.sockets()
        paths = [path for _, path in sockets if path]
        answers = dict(zip(paths, ask_all(paths, within_s=ANSWER_S), strict=True))
        return [(name, answers.get(path)) for name, path in sockets]


def _why_not(found: Found | None) -> str:
    if found is None:
        return "there is no control socket"
    if found.result is None:
        return found.why
    if serves(found.result) and found.result.get("held_s") is None:
        return ""
    held = number(found.result, "held_s") is not None
    return "held" if held else str(found.result.get("phase"))
