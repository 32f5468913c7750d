"""docs/log.md names every event that is ever written to the log."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from socketprotector.core.events import ReportKind
from socketprotector.model.log_format import LEVELS

ROOT = Path(__file__).parents[3]


def written() -> Iterator[str]:
    """The events that stand in calls: log.write("info", "ready", ...), and the guard's own."""
    for path in (ROOT / "socketprotector").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            words = [each for call in node.args for each in constants(call)]
            if node.func.attr in ("write", "_write") and words and words[0] in LEVELS:
                yield from words[1:]
            elif path.name == "guard.py" and node.func.attr in ("log", "start_later"):
                yield from words[:1]  # start_later() passes its own on


def constants(node: ast.expr) -> list[str]:
    """A text, or both of `"adopted" if snapshot else "start"`."""
    if isinstance(node, ast.IfExp):
        return [*constants(node.body), *constants(node.orelse)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def test_every_event_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "log.md").read_text()
    told = [
        name
        for row in re.findall(r"^\| (`[a-z][a-z, `-]*`) \|", text, re.MULTILINE)
        for name in re.findall(r"`([a-z-]+)`", row)
    ]

    assert sorted(told) == sorted({*written(), *(news.value for news in ReportKind)})
