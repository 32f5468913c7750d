"""Parses a message from a control socket, and makes its values safe for all callers.

The peer may be a newer protector, or another program.  In a parsed message, all numbers are
finite and within ±2**63, and all texts can be encoded.  The size and nesting of the message are
limited.
"""

from __future__ import annotations

import json
from typing import Any

#: The limit of values in a line.  A value takes about 100 bytes of memory.  To count values without
#: parsing, we count commas, colons and opening brackets.  The status of a protector with 1,000
#: workers has 30,000 values.
_VALUES = 200_000
#: The limit of nesting.  An answer with a status has 8 levels, down to a worker's forked child.
_DEPTH = 16
#: The limit of characters in a text; a longer text is cut.
_CHARACTERS = 1 << 18
#: The limit of members in a list or object.  A generation may have thousands of workers.
_MEMBERS = 1 << 16
#: A larger number becomes None; no valid count or time is larger.
_GREATEST = 1 << 63


def message_in(line: bytes) -> dict[str, Any] | None:
    """Return the message in a line; None if the line is not a message.

    Long texts, lists and objects are cut.  NaN, numbers out of range and values nested too deep
    become None; no protector sends such values.
    """
    if sum(map(line.count, (b",", b":", b"[", b"{"))) > _VALUES:
        return None
    try:
        message = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return _bounded(message, _DEPTH) if type(message) is dict else None


def _bounded(value: Any, depth: int) -> Any:
    """Return a value within the limits.  depth: how many more levels of nesting are allowed."""
    kind = type(value)
    if kind is dict and depth:
        members = value.items() if len(value) <= _MEMBERS else list(value.items())[:_MEMBERS]
        return {_text(name): _bounded(each, depth - 1) for name, each in members}
    if kind is list and depth:
        return [
            # Most values are counts.  A function call for each would take most of the parsing time.
            each if type(each) is int and 0 <= each <= _GREATEST else _bounded(each, depth - 1)
            for each in value[:_MEMBERS]
        ]
    if kind is str:
        return _text(value)
    if kind is int or kind is float:
        return value if -_GREATEST <= value <= _GREATEST else None  # NaN becomes None, too
    return value if kind is bool else None


def _text(value: str) -> str:
    """Return a text that can be encoded, cut to _CHARACTERS."""
    if value.isascii():
        return value if len(value) <= _CHARACTERS else value[:_CHARACTERS]
    # JSON can contain half of a surrogate pair, which cannot be encoded.
    return value[:_CHARACTERS].encode("utf-8", "replace").decode()
