"""Quantiles of a histogram of waits."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from socketprotector.model.wait_quantiles import quantile_us
from tests.together import together


@together(
    ("waits", "share", "found"),
    [
        ((), 0.5, None),
        ((0, 0, 0), 0.5, None),
        ((1,), 0.5, 0),  # shorter than a microsecond
        ((0, 1), 0.99, 1),
        ((0, 0, 1), 0.5, 3),
        ((50, 0, 0, 50), 0.5, 0),
        ((49, 0, 0, 51), 0.5, 7),
        ((99, 0, 0, 1), 0.99, 0),
        ((98, 0, 0, 2), 0.99, 7),
        ((0,) * 31 + (1,), 0.5, 2**31 - 1),
        ((2**53,) * 32, 0.99, 2**31 - 1),  # the most that is believed
    ],
)
def test_a_share_of_waits(waits: Sequence[int], share: float, found: int | None) -> None:
    assert quantile_us(waits, share) == found


@given(st.lists(st.integers(0, 2**53), min_size=1, max_size=32), st.sampled_from((0.5, 0.99)))
def test_a_share_is_known_wherever_anything_was_counted(waits: list[int], share: float) -> None:
    found = quantile_us(waits, share)

    assert (found is None) == (not any(waits))
    if found is not None:
        bucket = found.bit_length()
        assert sum(waits[: bucket + 1]) >= 0.999999 * share * sum(waits)
        assert waits[bucket]
