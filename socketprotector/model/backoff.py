"""Back-off: one accident costs nothing, and a program that cannot live costs the machine little.

So the first quick deaths, of a slot's workers, of generations, or of a guarded protector, are
followed by the next try at once, and later ones by a longer wait each time.
"""

from __future__ import annotations

#: The first two quick deaths are free; from the third on the delay doubles, up to a maximum.
FREE_DEATHS = 2
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 60.0


def backoff_s(quick_deaths: int) -> float:
    """Seconds to wait before the next try after so many quick deaths in a row."""
    if quick_deaths <= FREE_DEATHS:
        return 0.0
    # The exponent is bounded because a float overflows after a thousand doublings.
    doublings = min(quick_deaths - FREE_DEATHS - 1, 16)
    return float(min(MAX_DELAY_S, FIRST_DELAY_S * 2**doublings))
