"""Back-off: a single crash costs no time, and a program that always crashes costs little CPU.

After the first quick deaths in a row, the next try begins at once.  After each further quick death,
the wait before the next try grows.  This holds for the workers of a slot, for generations, and for
a guarded protector.
"""

from __future__ import annotations

#: The first two quick deaths are free; from the third on the delay doubles, up to a maximum.
FREE_DEATHS = 2
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 60.0


def backoff_s(quick_deaths: int) -> float:
    """Return the seconds to wait before the next try, from the number of quick deaths in a row."""
    if quick_deaths <= FREE_DEATHS:
        return 0.0
    # The exponent is bounded because a float overflows after a thousand doublings.
    doublings = min(quick_deaths - FREE_DEATHS - 1, 16)
    return float(min(MAX_DELAY_S, FIRST_DELAY_S * 2**doublings))
