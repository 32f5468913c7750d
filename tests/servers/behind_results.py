"""What tests.servers.behind has measured: a file of JSON lines, and the tables made of it.

A line is one run of one cell: a server behind a proxy, with its parts.  Parts of several runs of a
cell add up to that cell, and a later run of a part replaces an earlier one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

#: What is in a table for a cell that was not measured.
NOT_RUN = "not run"


@dataclass(frozen=True)
class Cell:
    """A server behind a proxy, and how clients reach it."""

    server: str
    transport: str  # between proxy and server: unix, tcp, or tcp with nodelay
    proxy: str
    kept: bool  # the proxy keeps connections to the server
    clients: int

    def __str__(self) -> str:
        kept = "kept" if self.kept else "single"
        return f"{self.server}, {self.transport}, {self.proxy}, {kept}, {self.clients}"


@dataclass(frozen=True)
class Count:
    """The requests of clients during a part."""

    requests: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # of failures

    @property
    def text(self) -> str:
        """Return what a table says."""
        return f"{self.kinds.total():,} of {self.requests:,}"

    def __add__(self, other: Count) -> Count:
        return Count(self.requests + other.requests, self.kinds + other.kinds)


#: The parts of each cell, by name.
Found = dict[Cell, dict[str, Count]]


def add(file: Path, cell: Cell, parts: dict[str, Count]) -> None:
    """Append a run to a results file."""
    counts = {name: [each.requests, each.kinds] for name, each in parts.items()}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**asdict(cell), "parts": counts}) + "\n")


def read(file: Path) -> Found:
    """Return what a results file contains; nothing if there is none."""
    found: Found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        fields = json.loads(line)
        parts = fields.pop("parts")
        counts = {name: Count(of, Counter(kinds)) for name, (of, kinds) in parts.items()}
        found.setdefault(Cell(**fields), {}).update(counts)
    return found


def tables(found: Found) -> str:
    """Return two tables in Markdown: of the reloads, and of all other parts."""
    servers = list(dict.fromkeys(each.server for each in found))
    rows = sorted(
        dict.fromkeys((each.server, each.transport) for each in found),
        key=lambda row: servers.index(row[0]),
    )
    names = list(dict.fromkeys(name for parts in found.values() for name in parts))
    reloads = [name for name in names if name.endswith(" reloads")]
    others = [name for name in names if name not in reloads]
    ways = [
        (proxy, kept, clients)
        for proxy in sorted({each.proxy for each in found}, reverse=True)
        for kept in (False, True)
        for clients in sorted({each.clients for each in found})
    ]

    def reloaded(server: str, transport: str) -> list[str]:
        cells = [Cell(server, transport, *way) for way in ways]
        return [_sum([found.get(cell, {})], reloads) for cell in cells]

    def went_on(server: str, transport: str, kept: bool) -> list[str]:
        wanted = [
            parts
            for cell, parts in found.items()
            if (cell.server, cell.transport, cell.kept) == (server, transport, kept)
        ]
        return [_sum(wanted, [name]) for name in others]

    heads = [f"{proxy}{', kept' if kept else ''}, {clients}" for proxy, kept, clients in ways]
    first = _table(["server", "over", *heads], ([*row, *reloaded(*row)] for row in rows))
    second = _table(
        ["server", "over", "connections", *others],
        (
            [*row, "kept" if kept else "single", *counts]
            for row in rows
            for kept in (False, True)
            if set(counts := went_on(*row, kept)) != {NOT_RUN}
        ),
    )
    return f"{first}\n{second}"


def _sum(cells: Sequence[dict[str, Count]], names: Sequence[str]) -> str:
    counts = [parts[name] for parts in cells for name in names if name in parts]
    return sum(counts, Count()).text if counts else NOT_RUN


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
