"""The scoreboard in real shared memory, from both sides."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import threading
from collections.abc import Iterator

import pytest
from socketprotector_client import wire
from socketprotector_client.scoreboard import Scoreboard

from socketprotector.daemon.generation import OpenGeneration
from socketprotector.model.records import Counts, GenerationRecord, Program
from socketprotector.system.scoreboard import SLOTS, Board
from tests.rounds import rounds

READS = rounds(5_000, 20_000)


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.make()
    yield made
    made.close()


@pytest.fixture
def record(board: Board) -> Iterator[memoryview]:
    """The words of place 2, as a worker writes them."""
    with mmap.mmap(board.fd, wire.BOARD_BYTES, offset=board.offset(2)) as shared:
        words = memoryview(shared).cast("Q")
        yield words
        words.release()


def accepted(board: Board) -> int | None:
    """Return how many connections the workers of a generation with this board have accepted."""
    program = Program("/w", ("w",), "/", (), 0, (), 0)
    return OpenGeneration(GenerationRecord(1, program), board).accepted


def test_what_a_worker_counts_is_read(board: Board) -> None:
    worker = Scoreboard(os.dup(board.fd), board.offset(2))
    worker.count_taken(7, 99)
    worker.count_error()

    found = board.read(2)

    assert found is not None
    assert (found.accepted, found.errors, sum(found.waits)) == (1, 1, 1)
    assert board.accepted_at(2) == {7: 99}
    assert board.read(1) is None  # no worker is there
    board.clear(2)
    assert board.read(2) is None
    assert board.accepted_at(2) == {}


def test_places_beyond_the_last_are_not_counted(board: Board) -> None:
    assert board.offset(SLOTS - 1) == (SLOTS - 1) * wire.BOARD_BYTES
    assert board.offset(SLOTS) == -1
    assert board.read(SLOTS) is None
    assert board.accepted_at(SLOTS) == {}
    board.clear(SLOTS)


def test_it_cannot_be_resized_and_its_seals_cannot_be_removed(board: Board) -> None:
    for size in (0, wire.BOARD_BYTES, 4 * SLOTS * wire.BOARD_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(board.fd, size)
    with pytest.raises(PermissionError):
        os.pwrite(board.fd, b"x", 2 * SLOTS * wire.BOARD_BYTES)


def test_an_unused_place_costs_no_memory(board: Board) -> None:
    board.read(500)
    board.accepted_at(500)

    assert os.fstat(board.fd).st_blocks == 0


def test_garbage_is_taken_with_a_limit(board: Board, record: memoryview) -> None:
    for word in range(wire.BOARD_WORDS):
        record[word] = 2**64 - 1
    record[wire.BOARD_STATE] = wire.BOARD_COUNTED

    found = board.read(2)

    assert found is not None
    assert found.accepted == 2**53
    assert found.active == 2**20
    assert set(found.waits) == {2**53}


def test_only_the_slots_that_were_written_are_looked_at(board: Board) -> None:
    assert [*board.written_slots()] == []
    for slot in (2, 7, SLOTS - 1):
        Scoreboard(os.dup(board.fd), board.offset(slot)).count_taken(7, 99)
    os.pwrite(board.fd, b"x", (SLOTS + 3) * wire.BOARD_BYTES)  # a forked child's record

    assert [*board.written_slots()] == [2, 7, SLOTS - 1]
    board.clear(7)
    assert accepted(board) == 2


def test_each_slot_is_looked_at_where_the_system_finds_no_written_ones(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EINVAL, "no SEEK_DATA")

    Scoreboard(os.dup(board.fd), board.offset(2)).count_taken(7, 99)
    monkeypatch.setattr(os, "lseek", fail)

    assert [*board.written_slots()] == [*range(SLOTS)]
    assert accepted(board) == 1


def test_no_more_connections_are_open_than_were_taken(board: Board, record: memoryview) -> None:
    record[wire.BOARD_STATE] = wire.BOARD_COUNTED
    record[wire.BOARD_ACCEPTED], record[wire.BOARD_ACTIVE] = 3, 4

    assert board.read(2) == Counts(accepted=3, active=3)


def test_a_value_is_never_seen_half_written(board: Board, record: memoryview) -> None:
    """In bytes it changes from 11... to 22...: whatever else is read was torn."""
    one, other = (struct.unpack("Q", bytes([byte]) * 6 + b"\0\0")[0] for byte in (0x11, 0x22))
    record[wire.BOARD_STATE] = wire.BOARD_COUNTED
    record[wire.BOARD_ERRORS] = one
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            record[wire.BOARD_ERRORS] = one
            record[wire.BOARD_ERRORS] = other

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {found.errors for _ in range(READS) if (found := board.read(2))}
    finally:
        stop.set()
        writer.join()

    assert seen <= {one, other}
