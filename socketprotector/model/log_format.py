"""The format of a log line: key=value text or a JSON object, and how ours are recognized.

Pure.  Whatever a field holds, a line is one line of printable characters.
"""

from __future__ import annotations

# Not `json`: the guard, which writes lines of this form, would keep a megabyte of it.
from _json import encode_basestring_ascii
from time import gmtime, strftime

from . import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

LEVELS = {"debug": 7, "info": 6, "warning": 4, "error": 3}
FORMATS = ("text", "json")
_PLAIN, _FAINT = "\x1b[0m", "\x1b[2m"
_COLOURS = {"debug": _FAINT, "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[1;31m"}


def stamp(now: float) -> str:
    """Return a time since the epoch as it stands in the log: UTC, to the millisecond."""
    seconds = strftime("%Y-%m-%dT%H:%M:%S", gmtime(now))
    return f"{seconds}.{int(now % 1 * 1000):03d}Z"


def as_text(level: str, event: str, fields: Mapping[str, object], now: float | None = None) -> str:
    """`TIME LEVEL event=EVENT NAME=VALUE...`, or without the first two for a reader that adds them.

    Such a reader gets a priority instead (sd-daemon(3)).
    """
    pairs = _pairs(event, fields)
    if now is None:
        return f"<{LEVELS[level]}>{pairs}\n"
    return f"{stamp(now)} {level} {pairs}\n"


def as_coloured(level: str, event: str, fields: Mapping[str, object], now: float) -> str:
    """The same for a terminal."""
    shown = f"{_COLOURS[level]}{level}{_PLAIN}"
    return f"{_FAINT}{stamp(now)}{_PLAIN} {shown} {_pairs(event, fields)}\n"


def as_json(
    level: str, event: str, fields: Mapping[str, object], now: float, *, prioritized: bool = False
) -> str:
    """One object: time, level, event and the fields; behind a priority where one is wanted."""
    content = {"time": stamp(now), "level": level, "event": event, **plain(fields)}
    pairs = ", ".join(f"{_json(name)}: {_json(value)}" for name, value in content.items())
    return f"{f'<{LEVELS[level]}>' if prioritized else ''}{{{pairs}}}\n"


def plain(fields: Mapping[str, object]) -> dict[str, str | float]:
    """Return fields as JSON has values: what is neither a number nor true or false is its text."""
    return {
        name: value if isinstance(value, str | int | float) else str(value)
        for name, value in fields.items()
    }


def is_own(line: str) -> bool:
    """Return whether `Log` wrote this line: workers may write to the same file."""
    prioritized = line[:1] == "<" and line[2:3] == ">"
    rest = line[3:] if prioritized else line
    if rest.startswith('{"time": "'):
        return '", "level": "' in rest and '", "event": "' in rest
    if prioritized:
        return rest.startswith("event=")
    _, _, rest = line.partition("Z ")
    level, _, rest = rest.partition(" ")
    return level in LEVELS and rest.startswith("event=")


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
