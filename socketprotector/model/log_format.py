"""The format of a log line, key=value text or a JSON object, and a test for our own lines.

Pure.  Each line is one line of printable characters, whatever its fields contain.
"""

from __future__ import annotations

# Not from `json`, which takes a megabyte: the guard writes such lines, too, and must stay small.
from _json import encode_basestring_ascii
from time import gmtime, strftime

from . import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

LEVELS = {"debug": 7, "info": 6, "warning": 4, "error": 3}
FORMATS = ("text", "json")
_STAMP = len("1970-01-01T00:00:00.000Z")
_PLAIN, _FAINT = "\x1b[0m", "\x1b[2m"
_COLOURS = {"debug": _FAINT, "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[1;31m"}


def stamp(now: float) -> str:
    """Return a time since the epoch in the log's format: UTC, to the millisecond."""
    seconds = strftime("%Y-%m-%dT%H:%M:%S", gmtime(now))
    return f"{seconds}.{int(now % 1 * 1000):03d}Z"


def as_text(level: str, event: str, fields: Mapping[str, object], now: float | None = None) -> str:
    """Return `TIME LEVEL event=EVENT NAME=VALUE...`.

    Without `now`, the line has a priority (sd-daemon(3)) instead of time and level, for a log
    reader that adds time and level itself.
    """
    pairs = _pairs(event, fields)
    if now is None:
        return f"<{LEVELS[level]}>{pairs}\n"
    return f"{stamp(now)} {level} {pairs}\n"


def as_coloured(level: str, event: str, fields: Mapping[str, object], now: float) -> str:
    """Return the text line with colours, for a terminal."""
    shown = f"{_COLOURS[level]}{level}{_PLAIN}"
    return f"{_FAINT}{stamp(now)}{_PLAIN} {shown} {_pairs(event, fields)}\n"


def as_json(
    level: str, event: str, fields: Mapping[str, object], now: float, *, prioritized: bool = False
) -> str:
    """Return one JSON object: time, level, event and the fields.

    prioritized: whether a priority (sd-daemon(3)) comes before the object.
    """
    content = {"time": stamp(now), "level": level, "event": event, **plain(fields)}
    pairs = ", ".join(f"{_json(name)}: {_json(value)}" for name, value in content.items())
    return f"{f'<{LEVELS[level]}>' if prioritized else ''}{{{pairs}}}\n"


def plain(fields: Mapping[str, object]) -> dict[str, str | float]:
    """Return the fields with JSON values: numbers and booleans stay, all others become text."""
    return {
        name: value if isinstance(value, str | int | float) else str(value)
        for name, value in fields.items()
    }


def is_own(line: str) -> bool:
    """Return True if `Log` wrote this line, False if a worker that shares the file wrote it."""
    prioritized = line[:1] == "<" and line[2:3] == ">"
    rest = line[3:] if prioritized else line
    if rest.startswith('{"time": "'):
        return '", "level": "' in rest and '", "event": "' in rest
    if prioritized:
        return rest.startswith("event=")
    # Do not look for a later "Z ": then the line begins with a worker's unfinished line.
    end, rest = line[_STAMP - 1 : _STAMP + 1], line[_STAMP + 1 :]
    level, _, rest = rest.partition(" ")
    return end == "Z " and level in LEVELS and rest.startswith("event=")


def _json(value: str | float) -> str:
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, bool):
        return str(value).lower()
    return float.__repr__(value) if isinstance(value, float) else int.__repr__(value)


def _pairs(event: str, fields: Mapping[str, object]) -> str:
    pairs = [f"event={text.field(event)}"]
    pairs += [f"{name}={text.field(value)}" for name, value in fields.items()]
    return " ".join(pairs)
