"""The table in tests/servers.md of what clients have seen: a row for each server."""

from __future__ import annotations

from tests.running import ROOT
from tests.servers.catalogue import SERVERS
from tests.servers.trials import TRIALS

PAGE = ROOT / "tests" / "servers.md"
_BEGIN, _END = "<!-- trials -->\n", "<!-- /trials -->\n"

#: By server and by trial.
Rows = dict[str, dict[str, str]]


def _parts(text: str) -> tuple[str, str, str]:
    before, begin, rest = text.partition(_BEGIN)
    table, end, after = rest.partition(_END)
    assert end, f"{PAGE}: no marks"
    return before + begin, table, end + after


def read(text: str) -> Rows:
    """Return what a page says."""
    lines = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in _parts(text)[1].splitlines()
    ]
    titles = lines[0][1:] if lines else []
    return {name: dict(zip(titles, cells, strict=True)) for name, *cells in lines[2:]}


def write(text: str, new: Rows) -> str:
    """Return the page with other cells; those of which nothing is said stay as they are."""
    before, _, after = _parts(text)
    old = read(text)
    lines = [["server", *TRIALS], ["---"] * (1 + len(TRIALS))]
    for name in SERVERS:
        cells = {**old.get(name, {}), **new.get(name, {})}
        lines.append([name, *(cells.get(title, "") for title in TRIALS)])
    return before + "".join(f"| {' | '.join(line)} |\n" for line in lines) + after
