"""Shares: which connections are in one, and how a share is written."""

from __future__ import annotations

import random

import pytest

from socketprotector.model.share import WHOLE, in_share, percent, read_percent


def test_any_run_has_its_share_rounded_down_or_up() -> None:
    draw = random.Random(33)
    for _ in range(300):
        share = draw.choice([draw.randrange(1, WHOLE), draw.randrange(1, 100), WHOLE // 3])
        start = draw.randrange(10**6)
        chosen = [in_share(start + n, share) for n in range(400)]
        for _ in range(100):
            begin = draw.randrange(400)
            run = chosen[begin : begin + draw.randrange(400)]
            assert len(run) * share // WHOLE <= sum(run) <= -(-len(run) * share // WHOLE)


def test_none_and_all_are_shares_too() -> None:
    assert not any(in_share(n, 0) for n in range(100))
    assert all(in_share(n, WHOLE) for n in range(100))


@pytest.mark.parametrize("text", ["5%", "0.25%", "0.01%", "99.99%"])
def test_a_share_is_read_as_it_is_written(text: str) -> None:
    assert percent(read_percent(text)) == text


@pytest.mark.parametrize(
    "text", ["", "5", "%", "0%", "100%", "-1%", "0.001%", "5.%", ".5%", "5%%", "nan%", "inf%", "x%"]
)
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no share"):
        read_percent(text)
