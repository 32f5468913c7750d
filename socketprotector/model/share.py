"""Shares of new clients, in ten thousandths: a canary's, and which connections are in it.

Pure.
"""

from __future__ import annotations

from .lazy_dataclass import frozen

#: The share of a generation that gets all new clients.
WHOLE = 10_000


@frozen
class Canary:
    """The share that a new generation has first, and for how long."""

    share: int  # of WHOLE
    for_s: float
    at_least: int = 0  # with fewer connections in this time it gets as long again, then fails

    @property
    def text(self) -> str:
        return percent(self.share)


def percent(share: int) -> str:
    """Return a share as text: `5%`, `0.25%`."""
    return f"{share / (WHOLE / 100):g}%"


def read_percent(text: str) -> int:
    """Return the share that `5%` or `0.25%` stands for.  Raises ValueError."""
    number, sign, rest = text.partition("%")
    try:
        share = float(number) * (WHOLE / 100)
    except ValueError:
        share = 0.0
    if sign and not rest and 0 < share < WHOLE and share == round(share):
        return round(share)
    raise ValueError(f"{text} is no share: it takes 0.01% to 99.99%, such as 5%")


def in_share(count: int, share: int) -> bool:
    """Return whether the connection with this number (0, 1, ...) is in the share.

    Any n connections in a row contain n times the share, rounded down or up.
    """
    return (count + 1) * share // WHOLE > count * share // WHOLE
