"""Reads a recording of a terminal: what was written, as words that can be compared.

A cast is asciicast v2: a line of JSON about it, then one for each event, `[s, "o", TEXT]`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

_SEQUENCE = re.compile(r"\x1b(?:\[[\d;?]*[A-Za-z]|\][^\x07]*\x07|[()][A-Z0-9])")
#: One line up: what follows is written over that line.
_UP = re.compile(r"\r?\n(?:\x1b\[\?25h)?\r\x1b\[1A")
#: What is not said each time: what a terminal shows for a moment; how far socketprotectorctl has
#: come, where that takes a while; how many connections a process held when it was killed.
_AT_TIMES = re.compile(
    r"\d+ failed +[\d,]+ so far +[\d,]+ connections/s"
    r"|generation \d+ is starting|ready \d/\d|switched: new connections go to generation \d+"
    r"|waits for generation \d+ \([^)]*\)"
    r"|waiting: .*?(?= (?:waiting|ready|switched:|reloaded:|stopped:|socketprotectorctl:))"
    r"|, \d+ cut by our kill -9"
)
#: Where it runs, and with which interpreter.
_FOLDER = re.compile(r"/\S*/socketprotector-demo-\w+")
_PYTHON = re.compile(r"\bpython[\d.]+\b")


def of_cast(path: Path) -> str:
    """Return all that a program has written."""
    _, *events = path.read_text(encoding="utf-8").splitlines()
    return "".join(text for _, kind, text in map(json.loads, events) if kind == "o")


def words_of(said: str) -> list[str]:
    """Return the words that are the same each time, with N for each number."""
    text = " ".join(_SEQUENCE.sub("", said).split())
    text = _PYTHON.sub("python", _FOLDER.sub("FOLDER", _AT_TIMES.sub("", text)))
    return re.sub(r"\d[\d,.]*", "N", text).split()


def lines_of(said: str) -> tuple[list[str], set[str]]:
    """Return the lines that stay, and the set of these with all that were written over."""
    stay, all_of_them = list[str](), set[str]()
    for line in _SEQUENCE.sub("", _UP.sub("\r", said)).split("\n"):
        pieces = [each.rstrip() for each in line.removesuffix("\r").split("\r")]
        stay.append(pieces[-1])
        all_of_them.update(pieces)
    return stay, all_of_them
