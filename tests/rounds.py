"""How often a test tries: a few rounds in `make test`, many in `make test-all`.

Every promise is tried in both; what more rounds find is a moment that few of them meet.
"""

from __future__ import annotations

import os

#: `make test-all` sets it.
MANY = os.environ.get("SOCKETPROTECTOR_ROUNDS") == "many"


def rounds(few: int, many: int) -> int:
    """Return how often to try."""
    return many if MANY else few
