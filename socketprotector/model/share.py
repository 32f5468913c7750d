"""Shares of new clients, in ten thousandths, and which connections belong to a share.

Pure.
"""

from __future__ import annotations

from .lazy_dataclass import frozen
from .text import in_units, shortened

#: The share of a generation that gets all new clients.  Shares are in ten thousandths, also in the
#: state.
WHOLE = 10_000
#: How long a canary has its share by default.
CANARY_FOR_S = 60.0


@frozen
class Canary:
    """The share that a new generation gets first, and for how long."""

    share: int  # in parts of WHOLE
    for_s: float
    at_least: int = 0  # with fewer connections, for_s begins again once; if still fewer, it fails

    @property
    def text(self) -> str:
        """The share as text."""
        return percent(self.share)

    @property
    def described(self) -> str:
        """The canary as text, with its time."""
        least = f", at least {self.at_least}" if self.at_least else ""
        return f"{self.text} for {in_units(self.for_s)}{least}"


def percent(share: int) -> str:
    """Return a share as text: `5%`, `0.25%`."""
    return f"{share // 100}.{share % 100:02}".rstrip("0").rstrip(".") + "%"


def percentage_text(percentage: float) -> str:
    """Return a percentage of `status` as text: `5%` for 5.0."""
    return percent(round(percentage * WHOLE / 100))


def read_percent(text: str) -> int:
    """Return the share that a text such as `5%` or `0.25%` means.  Raises ValueError."""
    whole, point, hundredths = text.removesuffix("%").partition(".")
    digits = whole + hundredths.ljust(2, "0")
    is_complete = bool(whole) and bool(hundredths) == bool(point)
    if text.endswith("%") and len(digits) < 6 and len(hundredths) < 3 and is_complete:
        share = int(digits) if digits.isascii() and digits.isdigit() else 0
        if 0 < share < WHOLE:
            return share
    raise ValueError(f"{shortened(text)!r} is no share: write 0.01% to 99.99%, such as 5%")


def in_share(count: int, share: int) -> bool:
    """Return True if the connection with this number (0, 1, ...) is in the share.

    Any n connections in a row contain n times the share, rounded down or up.
    """
    return (count + 1) * share // WHOLE > count * share // WHOLE
