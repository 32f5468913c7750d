"""A start closes what its caller has left open, and tries no other number."""

from __future__ import annotations

import os

import pytest

from socketprotector.launch import start


@pytest.mark.parametrize("has_proc", [True, False])
def test_open_descriptors_are_closed_except_those_that_are_kept(
    monkeypatch: pytest.MonkeyPatch, has_proc: bool
) -> None:
    closed, tried = os.open(os.devnull, os.O_RDONLY), list[tuple[int, int]]()
    kept = {int(fd) for fd in os.listdir("/proc/self/fd")} - {closed}
    real, listdir = os.closerange, os.listdir

    def closerange(low: int, high: int) -> None:
        tried.append((low, high))
        real(low, high)

    monkeypatch.setattr(os, "closerange", closerange)
    monkeypatch.setattr(os, "listdir", lambda path: listdir(path if has_proc else "/no/proc"))
    start._close_open(exclude=kept)

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(closed)
    assert (sum(high - low for low, high in tried) <= 2) == has_proc  # perhaps the list's own
