"""When a worker has done enough: connections, memory, age."""

from __future__ import annotations

import os
import subprocess
from itertools import pairwise

import pytest

from socketprotector.daemon import worker_recycling
from socketprotector.daemon.worker_recycling import (
    BornTooLarge,
    exceeded,
    resident_bytes,
    too_large,
)
from socketprotector.model.backoff import FREE_DEATHS, MAX_DELAY_S
from socketprotector.model.settings import Limits

MIB = 2**20


def of(limits: Limits, key: str = "k", *, age_s: float = 0.0, accepted: int | None = 0) -> str:
    return exceeded(limits, key, age_s=age_s, accepted=accepted) or ""


def test_without_limits_nothing_is_too_much() -> None:
    assert of(Limits(), age_s=1e9, accepted=2**53) == ""
    assert not Limits().any


def test_age() -> None:
    limits = Limits(age_s=60.0)

    assert of(limits, age_s=59.9) == ""
    assert of(limits, age_s=60.0) == "older than 1m"


def test_connections() -> None:
    limits = Limits(connections=1000)

    assert of(limits, accepted=999) == ""
    assert of(limits, accepted=1000) == "accepted 1000 connections (limit: 1000)"
    assert of(limits, accepted=None) == ""  # not counted


def share(key: str) -> int:
    """What a worker with this key may take with 1000+-100."""
    return next(
        n for n in range(890, 1110) if of(Limits(connections=1000, spread=100), key, accepted=n)
    )


def test_with_a_spread_each_has_its_own_share_and_keeps_it() -> None:
    shares = [share(f"secret-{number}") for number in range(200)]

    assert 900 <= min(shares) < 910
    assert 1090 < max(shares) <= 1100
    assert len(set(shares)) > 100
    assert shares[:10] == [share(f"secret-{number}") for number in range(10)]


def test_memory() -> None:
    used = resident_bytes(os.getpid())
    assert used is not None
    assert used > MIB

    assert too_large(Limits(memory_bytes=used * 2), os.getpid()) is None
    assert too_large(Limits(memory_bytes=MIB), os.getpid()) is not None


def test_a_size_and_its_limit_are_shown_in_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_recycling, "resident_bytes", lambda pid: {1: 300 * MIB}.get(pid))

    assert too_large(Limits(memory_bytes=300 * MIB + 1), 1) is None
    for limit, shown in ((300 * MIB, 300), (200 * MIB, 200)):
        reason = too_large(Limits(memory_bytes=limit), 1)
        assert reason == f"300 MiB resident (limit: {shown} MiB)"


def test_of_a_process_that_is_gone_nothing_is_known() -> None:
    process = subprocess.Popen(["true"])
    process.wait()

    assert resident_bytes(process.pid) is None
    assert too_large(Limits(memory_bytes=1), process.pid) is None


def replaced_at(large: BornTooLarge, seconds: int) -> list[int]:
    """When workers are replaced that are all too large at once, looked at each second."""
    number, at = 1, []
    for now in range(seconds):
        if large.may_replace(number, 1.0, float(now)):
            at.append(now)
            number += 1
        large.forget({number}, grown_worker_fits=False)
    return at


def test_workers_that_are_too_large_at_once_are_replaced_ever_more_seldom() -> None:
    large = BornTooLarge()

    at = replaced_at(large, 1000)

    assert at[: FREE_DEATHS + 1] == list(range(FREE_DEATHS + 1))
    assert large.is_loop
    gaps = [later - earlier for earlier, later in pairwise(at)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == MAX_DELAY_S


def test_it_is_known_when_the_next_one_may_be_replaced() -> None:
    large = BornTooLarge()
    assert large.next_s(1000.0) == 0.0
    *_, last = replaced_at(large, 1000)

    assert large.next_s(last + 0.0) == MAX_DELAY_S
    assert large.next_s(last + MAX_DELAY_S - 1.0) == 1.0
    assert large.next_s(last + MAX_DELAY_S + 1.0) == 0.0


def test_a_worker_is_counted_once_however_long_its_replacement_takes() -> None:
    large = BornTooLarge()

    assert all(large.may_replace(1, float(age), float(age)) for age in range(1, 60))

    assert not large.is_loop


def test_a_worker_that_has_grown_is_replaced_at_once_in_a_row_of_others_too() -> None:
    large = BornTooLarge()
    replaced_at(large, 100)

    assert large.may_replace(1000, 60.0, 100.0)
    waits = not large.may_replace(1001, 1.0, 100.0)
    assert waits
    assert not large.may_replace(1001, 60.0, 100.0), "it was too large at once"
    large.forget((), grown_worker_fits=True)
    assert not large.is_loop


@pytest.mark.parametrize(
    "limits", [Limits(connections=1), Limits(memory_bytes=1), Limits(age_s=0.1)]
)
def test_any_of_them_is_a_limit(limits: Limits) -> None:
    assert limits.any
