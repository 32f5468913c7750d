"""What a worker writes into its record, read back as the protector does."""

from __future__ import annotations

import gc
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from socketprotector_client import wire
from socketprotector_client.connection import Connection, OpenConnections
from socketprotector_client.scoreboard import Scoreboard

PLACE = 3 * wire.BOARD_BYTES
US = 1000


class Record:
    """A scoreboard of one record, as its reader sees it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("board")
        os.ftruncate(self.fd, 4 * wire.BOARD_BYTES)
        self.board = Scoreboard(os.dup(self.fd), PLACE)

    def words(self) -> tuple[int, ...]:
        data = os.pread(self.fd, wire.BOARD_BYTES, PLACE)
        return struct.unpack(f"{wire.BOARD_WORDS}Q", data)

    def word(self, which: int) -> int:
        return self.words()[which]


@pytest.fixture
def record() -> Iterator[Record]:
    made = Record()
    yield made
    os.close(made.fd)
    del made.board
    gc.collect()  # the board and what it follows know each other


def connection(board: Scoreboard, opened: OpenConnections) -> Connection:
    one, other = socket.socketpair()
    other.close()
    made = Connection(fileno=one.detach())
    opened.add(made)
    return made


def test_a_worker_that_writes_says_so_at_once(record: Record) -> None:
    assert record.word(wire.BOARD_STATE) == wire.BOARD_COUNTED
    assert os.pread(record.fd, PLACE, 0) == bytes(PLACE)  # and nothing to the records of others


def test_a_worker_that_does_not_count_is_unknown_rather_than_zero(record: Record) -> None:
    record.board.leave_uncounted()
    assert record.word(wire.BOARD_STATE) == wire.BOARD_UNKNOWN

    record.board.follow([OpenConnections(lambda: None)])
    record.board.leave_uncounted()
    assert record.word(wire.BOARD_STATE) == wire.BOARD_COUNTED


@pytest.mark.parametrize(
    ("wait_us", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 2), (1000, 10), (2**40, 31), (-5, 0)]
)
def test_a_connection_is_counted_with_its_wait(
    record: Record, monkeypatch: pytest.MonkeyPatch, wait_us: int, bucket: int
) -> None:
    monkeypatch.setattr("time.monotonic_ns", lambda: 10**18)

    record.board.count_taken(7, 10**18 - wait_us * US)

    assert record.word(wire.BOARD_ACCEPTED) == 1
    waits = record.words()[wire.BOARD_WAITS : wire.BOARD_WAITS + wire.BOARD_WAIT_WORDS]
    assert [n for n, count in enumerate(waits) if count] == [bucket]
    assert record.word(wire.BOARD_ACCEPTED_AT + 7) == 10**18 - wait_us * US


def test_a_descriptor_beyond_the_record_has_no_place_in_it(record: Record) -> None:
    record.board.count_taken(wire.BOARD_DESCRIPTORS, 1)
    record.board.count_taken(wire.BOARD_DESCRIPTORS - 1, 1)

    assert record.word(wire.BOARD_ACCEPTED) == 2
    assert record.words()[-1] == 1


def test_what_the_protector_asks_is_not_counted(record: Record) -> None:
    record.board.count_taken(7, 1)
    before = record.words()

    record.board.count_taken(7, 0)

    after = record.words()
    assert after[wire.BOARD_ACCEPTED_AT + 7] == 0
    assert after[: wire.BOARD_ACCEPTED_AT] == before[: wire.BOARD_ACCEPTED_AT]


def test_what_is_open_is_counted_however_it_ends(record: Record) -> None:
    opened = OpenConnections(record.board.count_open)
    record.board.follow([opened])
    closed, dropped = connection(record.board, opened), connection(record.board, opened)
    record.board.count_taken(closed.fileno(), 1)
    assert record.word(wire.BOARD_ACTIVE) == 2

    closed.close()
    assert record.word(wire.BOARD_ACTIVE) == 1
    with pytest.warns(ResourceWarning):
        del dropped
    assert record.word(wire.BOARD_ACTIVE) == 0


def test_several_sources_are_counted_together(record: Record) -> None:
    first, second = OpenConnections(lambda: None), OpenConnections(lambda: None)
    record.board.follow([first, second])
    with connection(record.board, first), connection(record.board, second):
        record.board.count_open()
        assert record.word(wire.BOARD_ACTIVE) == 2

        record.board.follow([second])
        record.board.count_open()
        assert record.word(wire.BOARD_ACTIVE) == 1


def test_threads_lose_no_count(record: Record) -> None:
    opened = OpenConnections(record.board.count_open)
    record.board.follow([opened])

    def work() -> None:
        for _ in range(300):
            made = connection(record.board, opened)
            record.board.count_taken(made.fileno(), 1)
            record.board.count_error()
            made.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert record.word(wire.BOARD_ACCEPTED) == 1200
    assert record.word(wire.BOARD_ERRORS) == 1200
    assert record.word(wire.BOARD_ACTIVE) == 0


def test_a_forked_child_that_takes_makes_the_count_unknown(record: Record) -> None:
    record.board.count_taken(1, 1)
    child = os.fork()
    if child == 0:
        record.board.count_error()
        record.board.count_taken(2, 1)
        os._exit(0)
    os.waitpid(child, 0)

    assert record.word(wire.BOARD_STATE) == wire.BOARD_UNKNOWN
    assert (record.word(wire.BOARD_ACCEPTED), record.word(wire.BOARD_ERRORS)) == (1, 0)


def test_a_forked_child_that_takes_nothing_changes_nothing(record: Record) -> None:
    child = os.fork()
    if child == 0:
        record.board.count_error()
        os._exit(0)
    os.waitpid(child, 0)

    assert record.word(wire.BOARD_STATE) == wire.BOARD_COUNTED
    assert record.word(wire.BOARD_ERRORS) == 0


def test_what_is_left_of_a_worker_does_not_write_into_its_successors_record(
    record: Record,
) -> None:
    go, gone = os.pipe(), os.pipe()
    worker = os.fork()
    if worker == 0:
        board = Scoreboard(os.dup(record.fd), PLACE)
        if os.fork() == 0:
            os.read(go[0], 1)
            board.count_taken(2, 1)
            os.write(gone[1], b"!")
        os._exit(0)
    os.waitpid(worker, 0)  # what is reaped is followed by another

    os.write(go[1], b"!")
    os.read(gone[0], 1)

    assert record.word(wire.BOARD_STATE) == wire.BOARD_COUNTED
    for fd in (*go, *gone):
        os.close(fd)


@pytest.mark.parametrize("what", ["a socket", "nothing", "too short"])
def test_what_is_no_scoreboard_is_done_without(what: str) -> None:
    made = socket.socket() if what == "a socket" else None
    fd = made.detach() if made else -1 if what == "nothing" else os.memfd_create("short")

    board = Scoreboard(fd, 0)

    board.count_taken(5, 1)
    board.count_open()
    board.count_error()
