"""What a generation's number stands for: its program, its channel, its scoreboard.

What its dead workers have counted is kept here, too; all of it is in the state, but for the
descriptors, which have names (system/inherited.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from socketprotector_client import wire

from ..model.records import Counts, GenerationRecord, Program
from ..system import clock
from ..system.channel import Channel
from ..system.scoreboard import Board


@dataclass(slots=True)
class Home:
    """Owns the channel and the scoreboard."""

    program: Program
    channel: Channel
    board: Board | None = None  # none could be made: then nobody counts
    serving_since: float = 0.0  # CLOCK_MONOTONIC; the others are for people
    opened_at: float = field(default_factory=clock.date)
    served_at: float | None = None
    drained_at: float | None = None
    past: Counts | None = None  # of workers that have ended
    lost: int = 0  # connections that were open in those
    side: int = 0  # where its workers accept, if they do: see socket_steering.py

    @classmethod
    def make(cls, program: Program, queue: int, side: int) -> Home:
        """Make channel and scoreboard.  Raises OSError when the channel cannot be made."""
        channel = Channel.make(queue)
        channel.knows = known(program)
        try:
            board = Board.make()
        except OSError:
            board = None  # nobody needs it so much as to fail without
        return cls(program, channel, board, side=side)

    @classmethod
    def adopt(cls, record: GenerationRecord, descriptors: Mapping[str, int]) -> Home:
        """Go on with one that an earlier program opened; takes ownership.

        Raises KeyError without the channel's read end.
        """
        channel = Channel.adopt(descriptors)
        channel.knows = known(record.program)
        return cls(
            record.program,
            channel,
            Board(descriptors["board"]) if "board" in descriptors else None,
            record.serving_since,
            record.opened_at,
            record.served_at,
            record.drained_at,
            record.past,
            record.lost,
            record.side,
        )

    def record(self, number: int, *, released: bool) -> GenerationRecord:
        return GenerationRecord(
            number,
            self.program,
            self.serving_since,
            self.ended,
            released,
            self.opened_at,
            self.served_at,
            self.drained_at,
            self.past,
            self.lost,
            self.side,
        )

    def descriptors(self) -> dict[str, int]:
        """Return what an adopter needs, by name."""
        found = self.channel.descriptors()
        if self.board is not None:
            found["board"] = self.board.fd
        return found

    @property
    def ended(self) -> bool:
        """Whether its workers read end of file, after what is queued."""
        return self.channel.write.fileno() < 0

    def counts(self, slot: int) -> Counts | None:
        """Return what the worker in a place has counted; None where it does not."""
        try:
            return self.board.read(slot) if self.board is not None else None
        except OSError:
            return None

    def bury(self, slot: int) -> int | None:
        """Take over what a dead worker has counted; return how many connections died with it.

        None where it did not count.  Makes the place ready for the next one.
        """
        found = self.counts(slot)
        try:
            if self.board is not None:
                self.board.clear(slot)
        except OSError:
            self.forget_board()  # better nothing known than counted twice
        if found is None:
            return None
        self.lost += found.active
        self.past = (self.past or Counts()) + found.closed()
        return found.active

    def place(self, slot: int) -> tuple[int, int] | None:
        """Return the scoreboard's descriptor and a worker's offset in it, if it has a place."""
        if self.board is None or self.board.place(slot) < 0:
            return None
        return self.board.fd, self.board.place(slot)

    def forget_board(self) -> None:
        """Close the scoreboard: nobody is left who counts."""
        if self.board is not None:
            self.board.close()
            self.board = None


def known(program: Program) -> frozenset[int] | None:
    """Return the listeners that a program was told of, by index; None for one of old."""
    if not program.listeners:
        return None
    told = program.listeners.split()
    return frozenset(n for n, each in enumerate(told) if each != wire.REMOVED_LISTENER)
