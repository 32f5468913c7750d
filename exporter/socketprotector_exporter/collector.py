"""Finds the control sockets and collects their answers, once for each scrape.

Simultaneous requests share an answer, so a slow instance delays each client only once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from socketprotector.ctl.api import (
    SocketAnswer,
    discovery,
    escape,
    query_all,
    unhealthy,
    why_not_ready,
)

from .counters import Counters
from .joined import Joined
from .metrics import MetricSet

#: Far below Prometheus's default limit of 10 s.
ANSWER_S = 2.0


def labels(found: Sequence[SocketAnswer], taken: Sequence[str] = ()) -> list[str]:
    """Return distinct labels of instances: names, or the socket's path for an ambiguous name.

    taken: the labels of other instances.
    """
    names = list(map(_label, discovery.names(found)))
    paths = [_label(each.path) for each in found]
    return [
        name if names.count(name) == 1 and name not in (*paths, *taken) else path
        for name, path in zip(names, paths, strict=True)
    ]


def _label(name: str) -> str:
    """Return a name as a label: valid UTF-8, although a file's name may have any bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class ProtectorCollector(Collector):
    """Queries the instances at each scrape, and remembers their counts."""

    def __init__(self, names: Sequence[str] = (), paths: Sequence[str] = ()) -> None:
        """Query the instances with these names or control sockets; without any, all instances."""
        self._names = names
        self._paths = paths
        self._totals: dict[str, Counters] = {}  # by the path of the control socket
        self._metrics = Joined(lambda _: self._collect())
        self._all = Joined(lambda _: self._query())
        self._one = Joined(lambda path: query_all([path], within_s=ANSWER_S)[0])
        self._denied: frozenset[str] = frozenset()  # control sockets that this user may not use

    def collect(self) -> list[Metric]:
        """Query the instances, and return their answers as metrics."""
        return self._metrics.get()

    def _collect(self) -> list[Metric]:
        """Collect.  Never run twice at once: an older answer must not be counted after a newer."""
        series = MetricSet()
        answers = self._query()
        known = {found.path for _, found in answers if found is not None}
        self._totals = {path: t for path, t in self._totals.items() if path in known}
        for name, found in answers:
            if found is None or found.result is None:
                series.add_silent(name)
                continue
            totals = self._totals.setdefault(found.path, Counters())
            series.add(name, found.result, totals)
        return [family for family in series.families() if family.samples]

    def describe(self) -> list[Metric]:
        """Return the families without samples, so that registering queries no instance."""
        return list(MetricSet().families())

    def paths(self) -> list[str]:
        """Return the paths of the chosen control sockets, or of all."""
        named = filter(None, discovery.paths_by_name(self._names))
        paths = self._paths if self._names or self._paths else discovery.sockets()
        return list(dict.fromkeys([*named, *paths]))

    def unready(self, name: str = "") -> tuple[list[str], list[str]]:
        """Return a line for each unready instance, and a line for each ready but unhealthy one.

        name: only this instance, without waiting for others; "": all instances.
        """
        answers = self.query_one(name) if name else self._all.get()
        if not answers:
            return ["no protector has a control socket"], []
        unready = [f"{name}: {why}" for name, found in answers if (why := _why_not(found))]
        ready = [(name, found.result) for name, found in answers if found and not _why_not(found)]
        says = [(name, unhealthy(status)) for name, status in ready if status is not None]
        return unready, [f"{name}: unhealthy: {why}" for name, why in says if why is not None]

    def query_one(self, name: str) -> list[tuple[str, SocketAnswer | None]]:
        """Query one of the chosen instances by its name, without waiting for others.

        Returns its name and answer, or None if there is no such control socket.
        """
        if self._paths and name not in self._names:  # only the instances know their names
            return [each for each in self._all.get() if each[0] == name] or [(name, None)]
        chosen = name in self._names or not self._names
        path = discovery.paths_by_name([name])[0] if chosen else ""
        return [(name, self._one.get(path) if path else None)]

    def _query(self) -> list[tuple[str, SocketAnswer | None]]:
        paths = self._paths if self._names or self._paths else discovery.sockets()
        named = discovery.paths_by_name(self._names)
        found = query_all([*filter(None, named), *paths], within_s=ANSWER_S)
        self._report_denied({each.path for each in found if each.why == "denied"})
        by_path = {each.path: each for each in found}
        others = [by_path[path] for path in paths]
        chosen = list(map(_label, self._names))
        return [
            *zip(chosen, map(by_path.get, named), strict=True),
            *zip(labels(others, chosen), others, strict=True),
        ]

    def _report_denied(self, paths: set[str]) -> None:
        """Write a line for each instance that denies access to this user and did not before."""
        before, self._denied = self._denied, frozenset(paths)
        for path in sorted(paths - before):
            text = (
                f"{path}: permission denied; start that instance with --status-group, or, if it "
                "has DynamicUser=, run the exporter as root"
            )
            with suppress(OSError):  # the reader of stderr has exited
                print(f"socketprotector-exporter: {escape(text)}", file=sys.stderr, flush=True)


def _why_not(found: SocketAnswer | None) -> str:
    if found is None:
        return "there is no control socket"
    return found.why if found.result is None else why_not_ready(found.result)
