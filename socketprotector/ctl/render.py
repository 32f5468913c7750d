"""Formats values for people (numbers with units, tables, colours), and prints them.

On a terminal, lines have colours (unless NO_COLOR is set), and tables are cut at the right edge.
Elsewhere the output is plain, so that awk can read it.  This module escapes all text
(`model.text.escape`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..model.text import escape
from .client import Message

#: The text for an unknown value.
UNKNOWN = "-"
#: Phase, state, result or level -> its colour.
_STYLES = {
    **dict.fromkeys(("serving", "ready", "reloaded", "passed", "healthy"), "green"),
    **dict.fromkeys(
        ("starting", "settling", "reloading", "running", "retiring", "orphaned", "warning"),
        "yellow",
    ),
    **dict.fromkeys(
        ("failed", "unhealthy", "abandoned", "dead", "denied", "silent", "error"), "red"
    ),
    **dict.fromkeys(("draining", "waiting", "stopping"), "cyan"),
}
_BARS = " ▁▂▃▄▅▆▇█"
_UNITS_S = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
#: Headings of the columns with text, aligned at the left.  Other columns have numbers.
_LEFT = {"NAME", "PHASE", "LISTENS", "CONTROL", "STATE", "CHILDREN", "SAYS", "PEER", "LOCAL"}

Cell = str | int | float | None
Row = Sequence[Cell]


# -- values -----------------------------------------------------------------------------


def count(value: object) -> str:
    """Return 12345 as 12,345; UNKNOWN if the value is not a whole number."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else UNKNOWN


def counts(message: Message, *names: str) -> list[str]:
    """Return several fields of a message, each formatted by count()."""
    return [count(message.get(name)) for name in names]


def duration_text(seconds: object) -> str:
    """Return 90061 seconds as 1d1h, 60 as 1m; UNKNOWN if the value is not a number."""
    if not isinstance(seconds, int | float):
        return UNKNOWN
    span_s = max(0.0, float(seconds))
    if span_s < 60:
        return f"{span_s:.1f}s" if span_s < 10 else f"{span_s:.0f}s"
    whole = int(span_s)
    parts: list[str] = []
    for unit, size in _UNITS_S:
        if whole >= size or parts:
            parts.append(f"{whole // size}{unit}" if whole >= size else "")
            whole %= size
    return "".join(parts[:2])


def age_text(now: object, at: object) -> str:
    """Return the time from `at` to `now`, formatted by duration_text().

    Returns UNKNOWN if `at` or `now` is not a number.
    """
    if isinstance(now, int | float) and isinstance(at, int | float):
        return duration_text(now - at)
    return UNKNOWN


def latency_text(microseconds: object) -> str:
    """Return 63 as 63us, and 1023 as 1.0ms; UNKNOWN if the value is not a number."""
    if not isinstance(microseconds, int | float):
        return UNKNOWN
    if microseconds < 1000:
        return f"{microseconds:.0f}us"
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.1f}ms"
    return f"{microseconds / 1e6:.1f}s"


def size(number: object) -> str:
    """Return 1536 bytes as 1.5K; UNKNOWN if the value is not a whole number."""
    if not isinstance(number, int):
        return UNKNOWN
    if number < 1024:
        return str(number)
    return f"{number / 1024:.1f}K" if number < 1 << 20 else f"{number / (1 << 20):.1f}M"


def time_text(at: object) -> str:
    """Return seconds since the epoch in the form 1970-01-01T00:00:00Z; UNKNOWN if invalid."""
    if not isinstance(at, int | float):
        return UNKNOWN
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return UNKNOWN


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the last `width` values as bars; the bar of the highest value is a full block."""
    last = values[-width:]
    most = max(last, default=0.0)
    steps = len(_BARS) - 1
    return "".join(
        _BARS[max(1, round(value / most * steps)) if value > 0 else 0] if most > 0 else _BARS[0]
        for value in last
    )


# -- columns ----------------------------------------------------------------------------


def columns(headings: str, rows: Iterable[Row]) -> Table:
    """Return a table without ruled lines.  headings: the titles, separated by blanks."""
    # On a terminal one blank separates columns, so that a generation's row fits into 80 characters.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in headings.split():
        table.add_column(heading, justify="left" if heading in _LEFT else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(each) for each in row))
    return table


def cell(value: Cell) -> Text:
    """Return a value as escaped text, coloured if it is a word of _STYLES; None as UNKNOWN."""
    text = UNKNOWN if value is None else str(value)
    return styled(text, _STYLES.get(text, ""))


def styled(text: str, style: str = "") -> Text:
    """Return a text in one style, escaped so that it cannot control the terminal."""
    return Text(escape(text), style=style)


def line(*parts: Cell) -> Text:
    """Return a line of several values, without blanks between them."""
    return Text.assemble(*(cell(each) for each in parts))


def console() -> Console:
    """Return the console of stdout."""
    # COLUMNS=0 or LINES=0 means an unknown size, but rich would take 0 literally and show nothing.
    unknown = (("COLUMNS", "0"), ("LINES", "0"))
    environment = {k: v for k, v in os.environ.items() if (k, v) not in unknown}
    return Console(highlight=False, markup=False, emoji=False, _environ=environment)


def show(*things: Table | Text) -> None:
    """Print tables and lines: coloured and fitted on a terminal, complete and plain elsewhere."""
    screen = console()
    for thing in things:
        if screen.is_terminal:
            screen.print(thing, overflow="ellipsis" if isinstance(thing, Table) else "fold")
        else:
            print(*(text.rstrip() for text in _plain(thing)), sep="\n", flush=True)


def _plain(thing: Table | Text) -> list[str]:
    """Return a table or line as lines without colours, none of them cut."""
    if isinstance(thing, Text):
        return [thing.plain]
    cells = [[str(column.header), *map(str, column.cells)] for column in thing.columns]
    widths = [max(map(cell_len, column)) for column in cells]
    found = []
    for row in zip(*cells, strict=True):
        parts = []
        for text, width, column in zip(row, widths, thing.columns, strict=True):
            gap = " " * (width - cell_len(text))
            parts.append(gap + text if column.justify == "right" else text + gap)
        found.append("  ".join(parts))
    return found
