"""How values are shown."""

from __future__ import annotations

from socketprotector.ctl import render
from tests.together import together


@together(
    ("number", "shown"),
    [
        (1023, "1023"),
        (1024, "1.0K"),
        (1536, "1.5K"),
        (102_400, "100.0K"),
        (1_048_575, "1024.0K"),
        (1_048_576, "1.0M"),
        (None, "-"),
    ],
)
def test_sizes_are_in_powers_of_1024(number: int | None, shown: str) -> None:
    assert render.size(number) == shown
