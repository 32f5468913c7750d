"""The load of the tests: socketprotector/demo/load.py's, but no faster than a test needs.

As fast as the machine can it would take the processors from the tests beside it, and say no more:
what is looked for are failures, not figures.  `make test-all` lets it run free.
"""

from __future__ import annotations

from typing import Any

from socketprotector.demo import load
from socketprotector.demo.load import Snapshot
from tests.rounds import rounds

__all__ = ["GAP_S", "Load", "Snapshot"]

#: Of each of some four clients that wait for their answers, before they ask again.
GAP_S = rounds(10, 0) / 1000
_PER_S = rounds(150, 0) or None


class Load(load.Load):
    """As there; as many conversations at a time, but no more than 150 are begun in a second."""

    def __init__(self, address: str, **more: Any) -> None:
        super().__init__(address, **{"rate_per_s": _PER_S, **more})
