"""Parses durations on the command lines of SocketProtector and socketprotectorctl.

This module needs click, which the resident process does not load.  So text.in_units, which shows
durations, is in another module.  The types of other options are in launch/option_values.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from .text import UNITS_US, in_units, shortened

#: The limit of a duration, 31 years: a longer duration must be a mistake.
_MOST_S = 1e9

_UNITS = {unit: us / 1_000_000 for unit, us in UNITS_US.items()}
#: Several units, each at most once, the greatest first.
_SEVERAL = re.compile("(?=.)" + "".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in _UNITS))


class Value(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1.3 (Debian 12)
    """A type of option value.  Its `read` function raises ValueError with a reason."""

    def __init__(
        self, name: str, read: Callable[[str], Any], show: Callable[[Any], str] = str
    ) -> None:
        self.name = name
        self._read = read
        self.show = show

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Duration(Value):
    """A duration, written as `500ms`, `10s`, `1h30m`, `1d` or plain seconds."""

    def __init__(self, *, zero: bool = True, least_s: float = 0.0) -> None:
        super().__init__("TIME", self.read, in_units)
        self._zero, self._least_s = zero, least_s

    def read(self, text: str) -> float:
        """Return the duration in seconds.  Raises ValueError with the reason and valid forms."""
        text = text.strip()
        seconds = _seconds(text)
        if seconds >= _MOST_S:
            most = in_units(_MOST_S // 86_400 * 86_400)
            raise ValueError(f"{shortened(text)!r} is too long; write at most {most}")
        if not seconds >= 0:  # negative, or NaN
            raise ValueError(f"{text!r} is no duration; write 500ms, 10s, 1h30m or seconds")
        if seconds == 0 and not self._zero:
            raise ValueError("it must be above 0")
        if seconds < self._least_s:
            raise ValueError(f"{text!r}: it must be {in_units(self._least_s)} or more")
        return seconds


def _seconds(text: str) -> float:
    """Return a duration in seconds; -1 if the text is malformed."""
    if several := _SEVERAL.fullmatch(text):
        parts = zip(several.groups("0"), _UNITS.values(), strict=True)
        return sum(float(number) * seconds for number, seconds in parts)
    # Otherwise any form that float() accepts, with at most one unit.
    unit = next((u for u in reversed(_UNITS) if text.endswith(u)), "")
    try:
        return float(text.removesuffix(unit)) * _UNITS.get(unit, 1.0)
    except ValueError:
        return -1.0
