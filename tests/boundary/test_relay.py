"""The relay as a process: what it keeps, what it passes on, and when it ends."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from socketprotector import relay


@pytest.fixture
def tail() -> Iterator[int]:
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


def test_the_ring_keeps_the_last_of_everything(tail: int) -> None:
    chance = random.Random(1)
    everything = b""
    for _ in range(200):
        data = chance.randbytes(chance.choice((0, 1, 7, 1000, relay.TAIL_BYTES // 3, 70_000)))
        total = relay.keep(tail, len(everything), data)
        everything += data
        since = chance.randrange(len(everything) + 1)

        assert total == relay.written(tail) == len(everything)
        start = max(since, total - relay.TAIL_BYTES)
        assert relay.kept(tail, since) == everything[start:]


def test_nothing_kept_is_nothing(tail: int) -> None:
    assert relay.written(tail) == 0
    assert relay.kept(tail, 0) == b""
    assert relay.kept(tail, 12) == b""


def run(tail: int, data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-I", "-S", str(relay.__file__), "test", str(tail)],
        input=data,
        pass_fds=[tail],
        capture_output=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a line\n",
        b"no end",
        b"\xff\xfe\0\n<3>an error\n<9>odd\n<\n<3\n",
        b"x" * 100_000,
        b"\n" * 1000,
    ],
    ids=["nothing", "a line", "no end", "odd bytes", "very long", "empty lines"],
)
def test_it_takes_whatever_comes_and_ends_with_its_last_writer(tail: int, data: bytes) -> None:
    ended = run(tail, data)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    assert relay.kept(tail, 0) == data[-relay.TAIL_BYTES :]


def test_a_new_relay_goes_on_where_the_last_one_ended(tail: int) -> None:
    run(tail, b"one\n")
    mark = relay.written(tail)
    run(tail, b"two\n")

    assert relay.kept(tail, mark) == b"two\n"
    assert relay.kept(tail, 0) == b"one\ntwo\n"
