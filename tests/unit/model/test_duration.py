"""How durations are written: one unit, several, or none."""

from __future__ import annotations

import ast

import pytest

from socketprotector.model.duration import Duration
from socketprotector.model.text import in_units
from tests.running import ROOT
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
        *("", "h", "soon", "nan", "-1s", "-inf"),
        *("30m1h", "1h1h", "1h30", "1h 30m", "1h-30m", "h30m", "1e1h30m", "1w"),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration; write 500ms, 10s, 1h30m or seconds"):
        Duration().read(text)


@together("text", ["inf", "1e9", "1e400", "11574d2h", "9" * 400, "9" * 400 + "h1m", "9" * 5000])
def test_what_is_too_long_is_said_to_be(text: str) -> None:
    with pytest.raises(ValueError, match="too long; write at most 11574d") as refused:
        Duration().read(text)
    assert len(str(refused.value)) < 90


def test_nothing_at_all_is_refused_where_0_means_nothing() -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Duration(zero=False).read("0m0s")


@pytest.mark.parametrize(
    "written",
    [
        *("0s", "1us", "20us", "1.5ms", "100ms", "500ms", "999.999ms", "1s", "2.5s", "59s", "1m"),
        *("1m0.5s", "1m30s", "1h", "1h30m", "1h0.25s", "1d", "1d1s", "1d2h3m4.005006s", "30d"),
        *("11574d1h46m39s", "11574d1h46m39.999999s"),
    ],
)
def test_they_are_shown_as_an_operator_writes_them(written: str) -> None:
    assert in_units(Duration().read(written)) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0s"), (1e-7, "0s"), (0.1 + 0.2, "300ms"), (59.999_999_9, "1m"), (86_400, "1d")],
)
def test_to_the_microsecond(seconds: float, written: str) -> None:
    assert in_units(seconds) == written


def test_no_text_has_a_number_that_may_get_an_exponent() -> None:
    """2.592e+06 s is how `:g` writes 30 days."""
    found = [
        f"{path.name}: {ast.unparse(node)}"
        for path in (ROOT / "socketprotector").rglob("*.py")
        if "g}" in (text := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FormattedValue) and node.format_spec is not None
        if ast.unparse(node.format_spec).rstrip("'").endswith("g")
    ]

    assert not found
