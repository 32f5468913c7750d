"""A generation that is open: its record, and its scoreboard.

All that the next program needs is one record, replaced as a whole; the descriptors have names
(system/inherited.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from socketprotector_client import wire

from ..model.lazy_dataclass import mutable, replace
from ..model.records import Counts, GenerationRecord, Program
from ..system import inherited
from ..system.scoreboard import Board


@mutable
class OpenGeneration:
    """Owns the scoreboard; what brings it clients is its delivery's."""

    record: GenerationRecord
    board: Board | None = None  # None: it could not be made, and nothing is counted

    @classmethod
    def make(cls, number: int, program: Program) -> OpenGeneration:
        """Make one with a scoreboard."""
        try:
            board = Board.make()
        except OSError:
            board = None  # not worth failing for
        return cls(GenerationRecord(number, program, opened_at=time.time()), board)

    @classmethod
    def adopt(cls, record: GenerationRecord, board: int | None) -> OpenGeneration:
        """Go on with one that an earlier program opened; takes ownership of its scoreboard."""
        return cls(record, Board(board) if board is not None else None)

    @property
    def program(self) -> Program:
        return self.record.program

    def update_record(self, **changes: object) -> None:
        """Put another record in its place: a checkpoint sees by identity what has changed."""
        self.record = replace(self.record, **changes)  # type: ignore[arg-type]

    def note_draining(self) -> None:
        """Note since when it drains."""
        if self.record.drained_at is None:
            self.update_record(drained_at=time.time())

    def descriptors(self) -> dict[str, int]:
        """Return what an adopter needs, by name."""
        name = f"{inherited.CHANNEL}{self.record.number}.board"
        return {name: self.board.fd} if self.board is not None else {}

    @property
    def ended(self) -> bool:
        """Whether its workers get no more: they read end of file, or were told to finish."""
        return self.record.ended

    def note_ended(self) -> None:
        """Note that its workers get no more."""
        if not self.record.ended:
            self.update_record(ended=True)

    def knows(self, index: int) -> bool:
        """Whether its workers were told of a listener."""
        known = known_to(self.program)
        return known is None or index in known

    def counts(self, slot: int) -> Counts | None:
        """Return what the worker in a slot has counted; None where it does not."""
        try:
            return self.board.read(slot) if self.board is not None else None
        except OSError:
            return None

    def take_counts(self, slot: int) -> int | None:
        """Take over what a dead worker has counted; return how many connections died with it.

        None where it did not count.  Makes the slot ready for the next one.
        """
        found = self.counts(slot)
        try:
            if self.board is not None:
                self.board.clear(slot)
        except OSError:
            self.forget_board()  # better nothing known than counted twice
        if found is None:
            return None
        past = (self.record.past or Counts()) + replace(found, active=0)
        self.update_record(lost=self.record.lost + found.active, past=past)
        return found.active

    def scoreboard_slot(self, slot: int) -> tuple[int, int] | None:
        """Return the scoreboard's descriptor and a worker's offset in it, if it has a place."""
        if self.board is None or self.board.offset(slot) < 0:
            return None
        return self.board.fd, self.board.offset(slot)

    def forget_board(self) -> None:
        """Close the scoreboard: no worker is left that counts."""
        if self.board is not None:
            self.board.close()
            self.board = None


class Generations(dict[int, OpenGeneration]):
    """Those that are open, by number; and those that are released, while clients of theirs wait."""

    def __init__(self) -> None:
        super().__init__()
        self.released: dict[int, OpenGeneration] = {}

    def release(self, number: int) -> OpenGeneration:
        """Have one no longer open; clients of its own may wait for another one."""
        each = self.pop(number)
        each.update_record(released=True)
        each.forget_board()
        self.released[number] = each
        return each

    def forget_released(self, kept: Callable[[int], bool]) -> None:
        """Forget those that are released, but where clients of theirs wait."""
        self.released = {number: each for number, each in self.released.items() if kept(number)}

    def records(self) -> tuple[GenerationRecord, ...]:
        """Return what another program would have to know."""
        return tuple(each.record for each in (*self.values(), *self.released.values()))

    def descriptors(self) -> dict[str, int]:
        """Return all of their descriptors, by name."""
        return {name: fd for each in self.values() for name, fd in each.descriptors().items()}


def known_to(program: Program) -> frozenset[int] | None:
    """Return the listeners that a program was told of, by index; None for one of old."""
    if not program.listeners:
        return None
    told = program.listeners.split()
    return frozenset(n for n, each in enumerate(told) if each != wire.REMOVED_LISTENER)
