"""Lines that tell a waiting operator what the protector waits for, at a start and at a reload.

The resident process does not load this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .lazy_dataclass import field, frozen, mutable
from .text import escape, in_units

#: A time below this many seconds is shown in seconds.
IN_SECONDS = 120
#: Kinds of waits whose reasons contain counts, and therefore change all the time.
_COUNTING = ("canary", "rolling")
#: An unchanged reason of a wait is repeated after this time, with the time left.
_REPEATED_S = 10.0
#: A changed reason is shown only this long after the previous line about the same wait.
_CHANGED_S = 1.0
#: A wait is shown only if it lasts this long.
_LASTS_S = 0.5


@frozen
class Wait:
    """One entry of `waits_for` in a status."""

    kind: str
    generation: int
    reason: str
    left_s: float | None

    @property
    def text(self) -> str:
        """The reason, and the longest time that the wait can still last."""
        if self.left_s is None:
            return self.reason
        whole = math.ceil(self.left_s)
        left = f"{whole} s" if whole < IN_SECONDS else in_units(whole)
        return f"{self.reason}, {left} left"


@mutable
class WaitLines:
    """Shows the reason of each wait, and repeats the reason every _REPEATED_S of a long wait."""

    tell: Callable[[str], None]
    current: Sequence[Wait] = ()
    _shown: dict[tuple[str, int], tuple[str, float]] = field(default_factory=dict)

    def show(self, waits: Sequence[Wait], at: float) -> None:
        """Show the waits of this moment.  at: seconds, by any clock."""
        self.current = waits
        earlier, self._shown = self._shown, {}
        for each in waits:
            key = each.kind, each.generation
            reason, shown_at = earlier.get(key, ("", at - _CHANGED_S + _LASTS_S))
            as_before = reason == each.reason or (reason and each.kind in _COUNTING)
            if at - shown_at >= (_REPEATED_S if as_before else _CHANGED_S):
                self.tell(f"waiting: {escape(each.text)}")
                reason, shown_at = each.reason, at
            self._shown[key] = reason, shown_at
