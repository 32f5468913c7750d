"""Finds the line of each key and list value in a valid TOML text; tomllib does not report lines.

This module cuts the text into statements, which tomllib reads one by one.  For this, the module
recognizes only strings, comments and brackets.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

#: The path to a value: the names of tables and keys, and the index in a list.
Path = tuple[str | int, ...]

#: Strings and comments, whose brackets, commas and line ends have no meaning.
_OPAQUE = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'"
    r"|#[^\n]*",
    re.DOTALL,
)
#: A bracket, comma or line end.  After `[`, `{` or `,` it includes the space before the next value.
_MARK = re.compile(r"[\[{,]\s*|[\]}\n]")
_DEEPER = {"[": 1, "{": 1, "]": -1, "}": -1}


def find(text: str) -> dict[Path, int]:
    """Return the line, counted from 1, of each table, key and list value.

    If a table is written in several places, its line is the first.  A list of tables ([[...]])
    counts as one table.
    """
    text = text.replace("\r\n", "\n") + "\n"
    masked = _OPAQUE.sub(lambda each: (" " if each[0][0] == "#" else "x") * len(each[0]), text)
    starts = [0, *(found.end() for found in re.finditer("\n", text))]
    lines: dict[Path, int] = {}
    table: Path = ()
    begin = depth = 0
    values: list[int] = []  # the positions where a list's values begin
    for mark in _MARK.finditer(masked):
        depth += _DEEPER.get(mark[0][0], 0)
        if depth == 1 and (mark[0][0] == "[" or (values and mark[0][0] == ",")):
            values.append(mark.end())
        if depth or mark[0] != "\n":
            continue
        is_header = masked[begin : mark.start()].lstrip().startswith("[")
        parsed = tomllib.loads(text[begin : mark.start()])
        for path, value in _walk(parsed, () if is_header else table):
            lines.setdefault(path, bisect_right(starts, begin))
            if is_header:
                table = path
            elif isinstance(value, list):
                for index, at in zip(range(len(value)), values, strict=False):
                    lines.setdefault((*path, index), bisect_right(starts, at))
        begin, values = mark.end(), []
    return lines


def _walk(parsed: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    for name, value in parsed.items() if isinstance(parsed, dict) else ():
        yield (*path, name), value
        yield from _walk(value, (*path, name))
