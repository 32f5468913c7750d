"""An open generation: its record, and the scoreboard in which its workers count connections.

After an upgrade or a kill, the next program gets the record from the state, and the scoreboard's
descriptor by name (system/inherited.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from socketprotector_client import wire

from ..model.lazy_dataclass import mutable, replace
from ..model.records import Counts, GenerationRecord, Program
from ..system import inherited
from ..system.process import boot_ticks
from ..system.program_spec import change_of
from ..system.scoreboard import Board


@mutable
class OpenGeneration:
    """One open generation.  The generation owns its scoreboard; the delivery owns its sockets."""

    record: GenerationRecord
    board: Board | None = None  # None: no scoreboard, so no counts of running workers
    #: Whether spread.py has logged the event no-spread.
    warned_unable: bool = False

    @classmethod
    def make(cls, number: int, program: Program) -> OpenGeneration:
        try:
            board = Board.make()
        except OSError:
            board = None  # better no counts than no generation
        record = GenerationRecord(
            number,
            program,
            knows=known_to(program),
            opened_at=time.time(),
            start=boot_ticks(),
        )
        return cls(record, board)

    @classmethod
    def adopt(cls, record: GenerationRecord, board: int | None) -> OpenGeneration:
        """Adopt a generation that an earlier program opened; take ownership of its scoreboard."""
        # The record of an earlier version may lack `knows`.
        if record.knows is None:
            record = replace(record, knows=known_to(record.program))
        # Such a record may also lack `probes`.  Without the value 0, begin_share() would count
        # accepted clients as probes.
        if record.serving_since and record.probes is None:
            record = replace(record, probes=0)
        return cls(record, Board(board) if board is not None else None)

    @property
    def program(self) -> Program:
        return self.record.program

    def update_record(self, **changes: object) -> None:
        """Replace the record by a changed copy: a checkpoint detects changes by identity."""
        self.record = replace(self.record, **changes)  # type: ignore[arg-type]

    def note_draining(self) -> None:
        if self.record.drained_at is None:
            self.update_record(drained_at=time.time())

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors that the next program needs, by name."""
        name = f"{inherited.GENERATION}{self.record.number}.board"
        return {name: self.board.fd} if self.board is not None else {}

    @property
    def is_finishing(self) -> bool:
        """Return whether the workers must finish: the generation gets no more clients."""
        return self.record.ended

    def note_finishing(self) -> None:
        """Record that the workers must finish, and that the generation gets no more clients."""
        if not self.record.ended:
            self.update_record(ended=True)

    def knows(self, index: int) -> bool:
        """Return whether the generation was opened with the listener that has this index."""
        known = self.record.knows
        return known is None or index in known

    def counts(self, slot: int) -> Counts | None:
        """Return the sum of the counts of the worker in a slot and of its forked children.

        None: the worker does not count connections, or the scoreboard is missing or unreadable.
        """
        try:
            found = self.board.read(slot) if self.board is not None else None
            if found is None or self.board is None:
                return None
            children = map(self.board.read_any, self.board.child_slots(slot))
            return sum(filter(None, children), found)
        except OSError:
            return None

    @property
    def accepted(self) -> int | None:
        """Return how many connections the workers have accepted; None: no worker has counted."""
        slots = self.board.written_slots() if self.board is not None else ()
        found = [self.record.past, *map(self.counts, slots)]
        counted = [each.accepted for each in found if each is not None]
        return sum(counted) if counted else None

    @property
    def met(self) -> int | None:
        """Return how many clients the workers have accepted, without probes; None: unknown."""
        accepted = self.accepted
        return accepted and max(0, accepted - (self.record.probes or 0))

    def begin_share(self) -> None:
        """Record that clients may come from now on; the connections accepted so far are probes."""
        if self.record.probes is None:
            self.update_record(probes=self.accepted or 0)

    def note_probe(self) -> None:
        """Record that the workers have accepted a probe."""
        if self.record.probes is not None:
            self.update_record(probes=self.record.probes + 1)

    def take_counts(self, slot: int, kept: int = 0) -> int | None:
        """Move an exited worker's counts from its slot to the generation's record; clear the slot.

        Returns how many connections the worker's exit has lost; None: unknown (see counts()).
        kept: how many connections the worker's forked children keep open.
        """
        found = self.counts(slot)
        try:
            if self.board is not None:
                self.board.clear(slot)
        except OSError:
            # The slot keeps the counts, and the record gets them below.  So never read the slot
            # again: `accepted` would add the same counts twice.
            self.forget_board()
        if found is None:
            return None
        past = (self.record.past or Counts()) + replace(found, active=0)
        lost = max(0, found.active - kept)
        self.update_record(lost=self.record.lost + lost, past=past)
        return lost

    def scoreboard_slot(self, slot: int) -> tuple[int, int] | None:
        """Return the scoreboard's descriptor and a slot's offset; None: no board has this slot."""
        if self.board is None or self.board.offset(slot) < 0:
            return None
        return self.board.fd, self.board.offset(slot)

    def forget_board(self) -> None:
        """Close the scoreboard; from now on the counts of running workers are unknown."""
        if self.board is not None:
            self.board.close()
            self.board = None


class Generations(dict[int, OpenGeneration]):
    """The open generations by number; the attribute `released` has the released generations.

    All workers of a released generation have exited.  Clients that these workers did not accept may
    still wait; another generation then serves them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.released: dict[int, OpenGeneration] = {}

    def program_of(self, number: int) -> Program | None:
        """Return a generation's program; None: the generation is not open."""
        return self[number].program if number in self else None

    def program_change(self, number: int | None) -> str:
        """Return a warning if a generation's program file was changed in place; otherwise ""."""
        return change_of(self[number].record) if number is not None else ""

    def release(self, number: int) -> OpenGeneration:
        """Move a generation to `released`, because its last worker has exited."""
        each = self.pop(number)
        each.update_record(released=True)
        each.forget_board()
        self.released[number] = each
        return each

    def forget_released(self, clients_wait: Callable[[int], bool]) -> None:
        """Forget the released generations, except those for which clients_wait returns True."""
        self.released = {n: each for n, each in self.released.items() if clients_wait(n)}

    def records(self) -> tuple[GenerationRecord, ...]:
        """Return the records that the next program needs."""
        return tuple(each.record for each in (*self.values(), *self.released.values()))

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors of all open generations, by name."""
        return {name: fd for each in self.values() for name, fd in each.descriptors().items()}


def known_to(program: Program) -> frozenset[int] | None:
    """Return the indices of the listeners that a program's workers know; None: all listeners."""
    if not program.listeners:
        return None
    names = program.listeners.split()
    return frozenset(n for n, name in enumerate(names) if name != wire.REMOVED_LISTENER)
