"""Which control sockets to ask, and what they answer: each time anew, as instances come and go."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ..ctl import discovery
from ..ctl.errors import NoProtector
from ..ctl.fields import measure
from ..ctl.query_all import SocketAnswer, ask_all
from ..model.errors import UsageError
from .counters import Counters
from .metrics import MetricSet, serves

#: Far below the 10 s that Prometheus waits by itself.
ANSWER_S = 2.0


@dataclass(frozen=True, slots=True)
class Targets:
    """The instances named on the command line; none: all there are."""

    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    def sockets(self) -> tuple[list[tuple[str, str]], Sequence[str]]:
        """Return name and path ("": not found) of those asked for by name; the others' paths."""
        paths = self.paths if self.names or self.paths else discovery.sockets()
        return [(name, _by_name(name)) for name in self.names], paths


def _by_name(name: str) -> str:
    try:
        return discovery.by_name(name)
    except (NoProtector, UsageError):
        return ""


def _labels(found: Sequence[SocketAnswer]) -> list[str]:
    """What to call instances: the path of the socket where nothing else tells two apart."""
    names = discovery.names(found)
    return [
        name if names.count(name) == 1 else each.path
        for name, each in zip(names, found, strict=True)
    ]


class ProtectorCollector(Collector):
    """Asks all that are wanted, and remembers what must not be forgotten."""

    def __init__(self, wanted: Targets) -> None:
        self._wanted = wanted
        self._totals: dict[str, Counters] = {}  # by the path of the control socket
        self._alone = threading.Lock()

    def collect(self) -> list[Metric]:
        """Ask everybody, and return what they say as metrics."""
        series = MetricSet()
        # One scrape after the other: an answer that is older must not be counted after a newer.
        with self._alone:
            answers = self._ask()
            known = {found.path for _, found in answers if found is not None}
            self._totals = {path: t for path, t in self._totals.items() if path in known}
            for name, found in answers:
                if found is None or found.result is None:
                    series.add_silent(name)
                    continue
                totals = self._totals.setdefault(found.path, Counters())
                totals.see(found.result)
                series.add(name, found.result, totals)
        return [family for family in series.families() if family.samples]

    def describe(self) -> list[Metric]:
        """Query no instance when this is registered."""
        return list(MetricSet().families())

    def unready(self) -> list[str]:
        """Return a line for each instance that was asked for and does not serve."""
        answers = self._ask()
        if not answers:
            return ["no protector has a control socket"]
        return [f"{name}: {why}" for name, found in answers if (why := _why_not(found))]

    def _ask(self) -> list[tuple[str, SocketAnswer | None]]:
        named, paths = self._wanted.sockets()
        found = ask_all([*(path for _, path in named if path), *paths], within_s=ANSWER_S)
        by_path = {each.path: each for each in found}
        others = [by_path[path] for path in paths]
        return [
            *((name, by_path.get(path)) for name, path in named),
            *zip(_labels(others), others, strict=True),
        ]


def _why_not(found: SocketAnswer | None) -> str:
    if found is None:
        return "there is no control socket"
    if found.result is None:
        return found.why
    if serves(found.result) and found.result.get("held_s") is None:
        return ""
    held = measure(found.result, "held_s") is not None
    return "held" if held else str(found.result.get("phase"))
