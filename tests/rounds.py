"""How often a test tries: a few rounds in `make test`, many in `make test-all`.

Every promise is tried in both; what more rounds find is a moment that few of them meet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

#: `make test-all` sets it.
MANY = os.environ.get("SOCKETPROTECTOR_ROUNDS") == "many"


_T = TypeVar("_T")


def some(each: Sequence[_T], few: Sequence[_T]) -> Sequence[_T]:
    """Return which combinations to try: in `few` there is each part of one."""
    return each if MANY else few


def rounds(few: int, many: int) -> int:
    """Return how often to try."""
    return many if MANY else few
