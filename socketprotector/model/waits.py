"""How long connections have waited, as workers count it: bucket n of a histogram is below 2**n us.

The buckets themselves: docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Sequence


def quantile_us(waits: Sequence[int], share: float) -> int | None:
    """Return the longest wait of the bucket in which so large a share of all has been reached.

    None where nothing was counted.
    """
    wanted, seen = share * sum(waits), 0
    for bucket, count in enumerate(waits):
        seen += count
        if wanted and seen >= wanted:
            return int(2**bucket - 1)
    return None
