"""The line of each key and of each list value in a TOML text: tomllib does not give it.

For a text that tomllib has read, so that nothing here looks for mistakes.  Source: the
specification of TOML 1.0.0.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right

#: The way to a value: names of tables and keys, numbers within a list.
Path = tuple[str | int, ...]

_BLANK = re.compile(r"[ \t]*")
#: What may stand between values of a list, and between statements.
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'",
    re.DOTALL,
)
_PLAIN = re.compile(r"[^,\]}#\r\n]+")


def find(text: str) -> dict[Path, int]:
    """Return the line, counted from 1, of each table, key and value of a list.

    Of a table that is defined in several places, the first one.
    """
    return _Scanner(text).statements()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self._found: dict[Path, int] = {}
        self._lists: dict[Path, int] = {}  # how many tables a list of them ([[...]]) has

    def statements(self) -> dict[Path, int]:
        table: Path = ()
        self._skip(_SPACE)
        while self._at < len(self._text):
            if self._take("["):
                listed = self._take("[")
                begin = self._at
                table = self._resolve(self._key())
                self._at += 2 if listed else 1  # the brackets that close it
                if listed:
                    number = self._lists.get(table, 0)
                    self._lists[table] = number + 1
                    table = (*table, number)
                self._note(table, begin)
            else:
                self._pair(table)
            self._skip(_SPACE)
        return self._found

    def _resolve(self, key: Path) -> Path:
        """A table below a list of tables belongs to the last one of them."""
        found: Path = ()
        for name in key[:-1]:
            found = (*found, name)
            if found in self._lists:
                found = (*found, self._lists[found] - 1)
        return (*found, key[-1])

    def _pair(self, table: Path) -> None:
        begin = self._at
        path = (*table, *self._key())
        self._note(path, begin)
        self._at += 1  # the equals sign
        self._value(path)

    def _key(self) -> Path:
        names: list[str] = []
        while True:
            self._skip(_BLANK)
            bare = _BARE.match(self._text, self._at)
            if bare:
                names.append(bare[0])
                self._at = bare.end()
            else:
                names.append(str(tomllib.loads(f"x={self._skip(_STRING)}")["x"]))
            self._skip(_BLANK)
            if not self._take("."):
                return tuple(names)

    def _value(self, path: Path) -> None:
        self._skip(_BLANK)
        if (listed := self._take("[")) or self._take("{"):
            number = 0
            self._skip(_SPACE)
            while not self._take("]" if listed else "}"):
                if listed:
                    self._note((*path, number), self._at)
                    self._value((*path, number))
                else:
                    self._pair(path)
                number += 1
                self._skip(_SPACE)
                self._take(",")
                self._skip(_SPACE)
        elif not self._skip(_STRING):
            self._skip(_PLAIN)

    def _note(self, path: Path, at: int) -> None:
        line = bisect_right(self._starts, at)
        for length in range(1, len(path) + 1):
            self._found.setdefault(path[:length], line)

    def _take(self, mark: str) -> bool:
        found = self._text.startswith(mark, self._at)
        self._at += len(mark) if found else 0
        return found

    def _skip(self, what: re.Pattern[str]) -> str:
        match = what.match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]
