"""Parses a message of a control socket, and limits its values, so that no caller has to.

The peer may be a newer protector, or no protector at all.  The numbers of a parsed message can be
shown and added up, its texts can be encoded, and its lists, texts and nesting are limited.
"""

from __future__ import annotations

import json
from typing import Any

#: The limit of values in a line; each takes about 100 bytes.  A status of 1,000 workers has
#: 20,000 values.
_VALUES = 200_000
#: The deepest nesting.  A status has 8 levels, down to the buckets of a generation's waits.
_DEPTH = 16
_CHARACTERS = 1 << 18
#: The limit of members in a list or an object: a generation may have thousands of workers.
_MEMBERS = 1 << 16
#: A larger number can be neither a count nor a time.
_GREATEST = 1 << 63


def message_in(line: bytes) -> dict[str, Any] | None:
    """Parse a line; None if it is not a message.

    Numbers without a meaning, and values that are nested too deep, become None: no protector sends
    them.  Long texts and lists are cut.
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
            # Most values are counts; a function call for each would be the largest cost here.
            each if type(each) is int and 0 <= each <= _GREATEST else _bounded(each, depth - 1)
            for each in value[:_MEMBERS]
        ]
    if kind is str:
        return _text(value)
    if kind is int or kind is float:
        return value if -_GREATEST <= value <= _GREATEST else None  # NaN becomes None, too
    return value if kind is bool else None


def _text(value: str) -> str:
    if value.isascii():
        return value if len(value) <= _CHARACTERS else value[:_CHARACTERS]
    # JSON can contain half of a surrogate pair, which cannot be encoded.
    return value[:_CHARACTERS].encode("utf-8", "replace").decode()
