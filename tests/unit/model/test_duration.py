"""How durations are written: one unit, several, or none."""

from __future__ import annotations

import pytest

from socketprotector.model.duration import Duration
from tests.together import together


@together(
    ("text", "seconds"),
    [
        ("1h30m", 5400),
        ("2m30s", 150),
        ("1d12h", 129_600),
        ("1d2h3m4s5ms6us", 93_784.005_006),
        ("1m500ms", 60.5),
        ("1m1.5s", 61.5),
        ("0h5m", 300),
        ("90m", 5400),
        ("1d", 86_400),
        ("1.5h", 5400),
        (" 10s ", 10),
        ("500ms", 0.5),
        ("20us", 0.000_02),
        ("2.5", 2.5),
        ("1e-3", 0.001),
        ("1e1s", 10),
    ],
)
def test_units_are_added_up(text: str, seconds: float) -> None:
    assert Duration().read(text) == pytest.approx(seconds)


@together(
    "text",
    [
        *("", "h", "soon", "nan", "inf", "-1s", "1e9"),
        *("30m1h", "1h1h", "1h30", "1h 30m", "1h-30m", "h30m", "1e1h30m", "1w"),
        "9" * 400 + "h1m",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration; write 500ms, 10s, 1h30m or seconds"):
        Duration().read(text)


def test_nothing_at_all_is_refused_where_0_means_nothing() -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Duration(zero=False).read("0m0s")
