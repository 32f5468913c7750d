"""Forked children: what their parent refuses, and how they know it."""

from __future__ import annotations

import os
import time

import pytest
from socketprotector_client.children import Children
from socketprotector_client.seat import MOST, Seats


def test_more_children_than_there_are_seats_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot fork 1025 processes: at most 1024"):
        Children().run(lambda: None, MOST + 1, lambda: None, lambda: False)


def test_forks_that_fail_wait_ever_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    children = Children()
    waits = []
    for _ in range(12):
        children._failed()
        waits.append(children._fork_at)
    assert waits == [0, 0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5]


def test_a_child_whose_parent_died_at_the_fork_knows_that_it_is_an_orphan() -> None:
    """This process stands for the child: its parent has not made the seats."""
    seats, orphaned = Seats(), []
    seat = seats.take(0, lambda: orphaned.append(True))
    seat.leave()
    os.close(seat.parents_end)
    assert orphaned
