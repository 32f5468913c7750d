"""Parses one-line JSON without `re`, which json.loads() needs for spaces (late_stdlib.py)."""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_SPACES = " \t\r\n"


def parse(text: bytes, members: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the value of a JSON text in UTF-8, as json.loads() does.

    members: turns an object's pairs of name and value into its value; by default a dict.
    Raises ValueError, and RecursionError if the text is nested too deep.
    """
    decoded = text.decode().strip(_SPACES)
    value, end = json.JSONDecoder(object_pairs_hook=members).raw_decode(decoded)
    if end != len(decoded):
        raise json.JSONDecodeError("Extra data", decoded, end)
    return value
