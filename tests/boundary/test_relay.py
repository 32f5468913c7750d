"""The relay as a process: what it keeps, what it passes on, and when it ends."""

from __future__ import annotations

import os
import random
import socket
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


def with_pipes(
    tail: int, kind: str, *told: tuple[bytes, bytes], to: int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    """Run it with a line on which pipes come, each with what was written into it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        for message, data in told:
            receive, send = os.pipe()
            socket.send_fds(ours, [message], [receive])
            os.write(send, data)
            os.close(receive)
            os.close(send)
        ours.shutdown(socket.SHUT_WR)
        with theirs:
            return subprocess.run(
                [sys.executable, "-I", "-S", str(relay.__file__), "test", str(tail),
                 str(theirs.fileno()), kind],
                stdin=subprocess.DEVNULL,
                stdout=to,
                stderr=subprocess.PIPE,
                pass_fds=[tail, theirs.fileno()],
                timeout=30,
            )  # fmt: skip


def test_each_of_several_pipes_has_its_prefix(tail: int) -> None:
    told = [(b"+1 1 11", b"one\ntwo"), (b"+2 1 22", b"<4>three\n\n"), (b"+3 2 33", b"")]
    ended = with_pipes(tail, "lines", *told)

    assert (ended.returncode, ended.stderr) == (0, b"")
    lines = ended.stdout.splitlines()
    assert sorted(lines) == [b"[1 11] one", b"[1 11] two", b"[1 22] ", b"[1 22] <4>three"]
    assert sorted(relay.kept(tail, 0).splitlines()) == sorted(lines)


def test_for_the_journal_the_priority_stays_in_front(tail: int) -> None:
    ended = with_pipes(tail, "journal", (b"+1 1 11", b"<4>three\nfour\n"))

    assert ended.stdout == b"<4>[1 11] three\n[1 11] four\n"


def test_a_pipe_that_is_told_of_again_is_the_same(tail: int) -> None:
    ended = with_pipes(tail, "lines", (b"+1 1 11", b"one\n"), (b"+1 1 11", b"other\n"))

    assert ended.stdout == b"[1 11] one\n"


def test_a_place_that_takes_nothing_does_not_end_it(tail: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    ended = with_pipes(tail, "lines", (b"+1 1 11", b"one\n"), to=full)
    os.close(full)

    assert ended.returncode == 0
    assert relay.kept(tail, 0) == b"[1 11] one\n"


def test_a_new_relay_goes_on_where_the_last_one_ended(tail: int) -> None:
    run(tail, b"one\n")
    mark = relay.written(tail)
    run(tail, b"two\n")

    assert relay.kept(tail, mark) == b"two\n"
    assert relay.kept(tail, 0) == b"one\ntwo\n"
