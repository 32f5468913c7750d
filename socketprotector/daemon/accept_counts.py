"""How many connections each generation has open that accepts them itself, as the kernel tells.

For `status`: what a generation accepts has a mark of its own (system/accept_marks.py).  To ask the
kernel takes at most ASKING_SHARE of our time, however many connections there are and however often
we are asked; in between the answer of before is given again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from ..system import accept_marks
from ..system.listener import Listener
from .accept_watch import ASKING_SHARE


@dataclass(slots=True, repr=False, eq=False)
class AcceptCounts:
    """Asks for all generations at once."""

    listeners: Callable[[], Sequence[Listener]]
    #: By the listener's index; those where the kernel does not tell are missing.
    _found: dict[int, Counter[int]] = field(default_factory=dict)
    _again_at: float = 0.0

    def active(self, marks: Collection[tuple[int, int]]) -> int | None:
        """Return how many connections of these marks processes have open; None: it is not known.

        marks: of a generation, with the indices of their listeners; none: it is not known.
        """
        if marks and time.monotonic() >= self._again_at:
            self._ask()
        if not marks or any(index not in self._found for index, _ in marks):
            return None
        return sum(self._found[index][mark] for index, mark in marks)

    def _ask(self) -> None:
        began = time.monotonic()
        self._found.clear()
        for each in self.listeners():
            if each.has_sibling:
                try:
                    self._found[each.index] = accept_marks.connections(each.socket)
                except OSError:
                    continue
        ended = time.monotonic()
        self._again_at = ended + (ended - began) / ASKING_SHARE
