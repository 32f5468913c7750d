"""What stands in a status, taken only where it is what it should be.

A status comes from a protector that may be newer than we are, or from no protector at all.
What is missing, null or of the wrong kind is None, and becomes no metric: never a 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Status = dict[str, Any]


def number(where: Status, name: str) -> float | None:
    """Return a finite number that is not below 0."""
    value = where.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def text(where: Status, name: str) -> str | None:
    """Return a text; nobody's label gets longer than this."""
    value = where.get(name)
    return value[:200] if isinstance(value, str) else None


def objects(where: Status, name: str) -> Iterator[Status]:
    """Yield the objects of a list."""
    value = where.get(name)
    for each in value if isinstance(value, list) else ():
        if isinstance(each, dict):
            yield each
