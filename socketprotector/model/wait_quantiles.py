"""Quantiles of the times that connections have waited, from the histograms of workers.

Bucket n of a histogram counts the waits below 2**n us: see docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Sequence


def quantile_us(waits: Sequence[int], share: float) -> int | None:
    """Return the upper limit (us) of the bucket in which the waits reach this share of all waits.

    waits: the counts of a histogram's buckets.
    Returns None if no wait was counted.
    """
    wanted, seen = share * sum(waits), 0
    for bucket, count in enumerate(waits):
        seen += count
        if wanted and seen >= wanted:
            return int(2**bucket - 1)
    return None
