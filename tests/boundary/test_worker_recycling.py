"""When a worker has done enough: connections, memory, age."""

from __future__ import annotations

import os
import subprocess

import pytest

from socketprotector.daemon.worker_recycling import exceeded, resident_bytes
from socketprotector.model.settings import Limits

MIB = 2**20


def of(limits: Limits, key: str = "k", *, age_s: float = 0.0, accepted: int | None = 0) -> str:
    return exceeded(limits, key, age_s=age_s, pid=os.getpid(), accepted=accepted) or ""


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
    assert of(limits, accepted=1000) == "accepted 1000 connections, its limit is 1000"
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

    assert of(Limits(memory_bytes=used * 2)) == ""
    assert of(Limits(memory_bytes=MIB)).endswith(" MiB resident, its limit is 1 MiB")


def test_of_a_process_that_is_gone_nothing_is_known() -> None:
    process = subprocess.Popen(["true"])
    process.wait()

    assert resident_bytes(process.pid) is None
    assert exceeded(Limits(memory_bytes=1), "k", age_s=0, pid=process.pid, accepted=0) is None


@pytest.mark.parametrize(
    "limits", [Limits(connections=1), Limits(memory_bytes=1), Limits(age_s=0.1)]
)
def test_any_of_them_is_a_limit(limits: Limits) -> None:
    assert limits.any
