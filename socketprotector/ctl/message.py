"""Reads a message of a control socket, and bounds what can be in it: once, for all who read on.

The peer may be a newer protector, or no protector at all.  After this its numbers can be shown and
added up, its texts can be encoded, and no list, text or nesting is without an end.
"""

from __future__ import annotations

import json
from typing import Any

#: The values of a line, which take about 100 bytes each: the status of 1,000 workers has 20,000.
_VALUES = 200_000
#: A status has 8: the buckets of a generation's waits.
_DEPTH = 16
_CHARACTERS = 1 << 18
#: Of a list or an object: a generation may have thousands of workers.
_MEMBERS = 1 << 16
#: Beyond this no count and no time is meant.
_GREATEST = 1 << 63


def message_in(line: bytes) -> dict[str, Any] | None:
    """Return the message that a line is; None where it is none.

    Null is in the place of what no protector sends: numbers without a meaning, and what is nested
    too deep.  Long texts and lists are cut.
    """
    if sum(map(line.count, (b",", b":", b"[", b"{"))) > _VALUES:
        return None
    try:
        message = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return _bounded(message, _DEPTH) if type(message) is dict else None


def _bounded(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind is dict and depth:
        members = value.items() if len(value) <= _MEMBERS else list(value.items())[:_MEMBERS]
        return {_text(name): _bounded(each, depth - 1) for name, each in members}
    if kind is list and depth:
        return [
            # Most are counts, and a call for each costs more than all else here.
            each if type(each) is int and 0 <= each <= _GREATEST else _bounded(each, depth - 1)
            for each in value[:_MEMBERS]
        ]
    if kind is str:
        return _text(value)
    if kind is int or kind is float:
        return value if -_GREATEST <= value <= _GREATEST else None  # NaN is neither
    return value if kind is bool else None


def _text(value: str) -> str:
    if value.isascii():
        return value if len(value) <= _CHARACTERS else value[:_CHARACTERS]
    # Half of a surrogate pair, which JSON can name, is no character.
    return value[:_CHARACTERS].encode("utf-8", "replace").decode()
