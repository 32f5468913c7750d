"""Orders to end connections evenly, as workers find them, and what status shows of them."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.daemon import spread
from socketprotector.daemon.generation import OpenGeneration
from socketprotector.model.lazy_dataclass import replace
from socketprotector.model.records import Counts, GenerationRecord, Program, WorkerRecord
from socketprotector.system.log import Log
from socketprotector.system.scoreboard import Board

PROGRAM = Program(
    path="/bin/true",
    argv=("true",),
    directory="/",
    environment=(),
    umask=0,
    limits=(),
    nice=0,
    drain_spread_s=600.0,
)
FIRST = WorkerRecord(1, 1, 4711, 0, slot=0, ready_by="notify")
SECOND = replace(FIRST, number=2, slot=1)
OTHER = replace(FIRST, number=3, generation=2)
NS = 10**9


class Said:
    """The log as far as it is written here."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def write(self, level: str, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    @property
    def log(self) -> Log:
        return cast("Log", self)


@pytest.fixture
def generation() -> Iterator[OpenGeneration]:
    board = Board.make()
    yield OpenGeneration(GenerationRecord(1, PROGRAM), board)
    board.close()


def declare(generation: OpenGeneration, *slots: int) -> None:
    """As workers on the client library do."""
    assert generation.board is not None
    for slot in slots:
        with mmap.mmap(generation.board.fd, wire.BOARD_BYTES, offset=slot * wire.BOARD_BYTES) as it:
            it[8 * wire.BOARD_SPREADS : 8 * wire.BOARD_SPREADS + 8] = (1).to_bytes(8, "little")


def until(generation: OpenGeneration, slot: int) -> int:
    assert generation.board is not None
    return generation.board.spread(slot)[1]


def test_each_worker_of_the_generation_is_ordered(generation: OpenGeneration) -> None:
    before = time.monotonic_ns()

    spread.order(generation, [FIRST, SECOND, OTHER], 600.0, Said().log)

    found = [until(generation, slot) for slot in (0, 1)]
    assert all(0 <= each - before - 600 * NS < 60 * NS for each in found)
    spread.order(generation, [FIRST, SECOND], 0.0, Said().log)
    assert [until(generation, slot) for slot in (0, 1)] == found


def test_an_earlier_end_counts_and_a_later_one_does_not(generation: OpenGeneration) -> None:
    spread.order(generation, [FIRST, SECOND], 0.0, Said().log, worker=2)
    assert (until(generation, 0), until(generation, 1)) == (0, wire.SPREAD_NEVER)

    spread.order(generation, [FIRST, SECOND], 600.0, Said().log)
    first = until(generation, 1)
    spread.order(generation, [FIRST, SECOND], 9000.0, Said().log)
    assert until(generation, 1) == first < wire.SPREAD_NEVER
    spread.order(generation, [FIRST, SECOND], 3.0, Said().log)
    assert until(generation, 1) < first


def test_workers_that_do_not_follow_are_reported_once(generation: OpenGeneration) -> None:
    said = Said()
    declare(generation, 0)

    spread.warn_if_unable(generation, [FIRST, OTHER], said.log)
    assert not said.lines
    spread.warn_if_unable(generation, [FIRST, replace(SECOND, ready_by="timer")], said.log)
    assert not said.lines
    spread.order(generation, [FIRST, SECOND], 600.0, said.log)
    spread.warn_if_unable(generation, [FIRST, SECOND], said.log)

    [(event, fields)] = said.lines
    assert (event, fields["workers"]) == ("no-spread", 1)


def test_an_order_that_ends_nothing_reports_nobody(generation: OpenGeneration) -> None:
    said = Said()

    spread.order(generation, [FIRST], 0.0, said.log)

    assert not said.lines


def test_status_shows_the_rate_and_the_time(generation: OpenGeneration) -> None:
    slots = [(0, Counts(active=300)), (1, Counts(active=60)), (2, None)]
    assert spread.closing_rate(generation, slots) is None
    declare(generation, 0)
    spread.order(generation, [FIRST, SECOND], 600.0, Said().log)

    found = spread.closing_rate(generation, slots)

    # The second worker does not declare that it follows.
    assert found is not None
    assert found["left_s"] == pytest.approx(600, abs=60)
    assert found["per_s"] == pytest.approx(300 / found["left_s"])


def test_without_a_scoreboard_nothing_is_ordered_and_nothing_shown() -> None:
    said = Said()
    bare = OpenGeneration(GenerationRecord(1, PROGRAM))

    spread.order(bare, [FIRST], 600.0, said.log)
    spread.warn_if_unable(bare, [FIRST], said.log)

    assert spread.closing_rate(bare, [(0, Counts(active=3))]) is None
    assert not said.lines
