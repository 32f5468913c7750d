"""Keeps ready, at any time, all that the next program needs.

Descriptors go to the fd store (systemd's, or the guard); the state memfd says what they are for.
Descriptors first, then the state, then the action: so whatever the state mentions exists, whenever
we are killed.  Only changes are stored and written: one worker's step costs what one worker costs,
however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..core.snapshot import CODEC, Snapshot
from ..model.codec import DecodeError, refusal
from ..model.lazy_dataclass import mutable
from ..system import inherited
from ..system.log import Log
from ..system.sd_notify import Store
from ..system.state_file import StateError, StateFile
from .effects import Effects

_FULL = "workers that come now do not outlive us; docs/reliability.md, How many workers"


@mutable
class Checkpoint:
    """Writes down, after each step, where another program could go on."""

    file: StateFile
    store: Store
    log: Log
    #: Names the descriptors that are neither generations', workers' nor listeners'.
    others: Callable[[], Mapping[str, int]]
    _effects: Effects | None = None
    _snapshot: Callable[[], Snapshot] | None = None
    _written: Snapshot | None = None  # what the state says, as far as we know
    _failing: bool = False
    _behind: bool = False
    _full: bool = False

    def begin(self, effects: Effects, snapshot: Callable[[], Snapshot]) -> None:
        """There is something to be kept from now on: descriptors, and what belongs to them."""
        self._effects, self._snapshot = effects, snapshot

    def descriptors(self) -> dict[str, int]:
        """Return every descriptor that another program would need, by name."""
        assert self._effects is not None
        return {**self.others(), **self._effects.descriptors()}

    def save(self) -> bool:
        """Make it so that a kill from here on loses nothing that can be kept.

        Returns whether the state says how things are.  Does nothing without an fd
        store: then a kill takes all descriptors anyway.
        """
        if self._effects is None:
            return True
        if not self.store.keeps:
            self.store.sync({}, self._effects.pool.descriptors)
            return True
        wanted = {**self.others(), **self._effects.own_descriptors()}
        wanted.pop(inherited.GUARD, None)  # each program gets a line of its own
        self.store.sync(wanted, self._effects.pool.descriptors)
        if self.store.full and not self._full:
            self.log.write("warning", "store-full", descriptors=len(self.store.kept), hint=_FULL)
        self._full = self.store.full
        if not self._write():
            return False
        if self.store.flushed and self.store.complete:
            self._behind = False
        elif not self._behind:
            self.log.write(
                "warning",
                "keeper-behind",
                hint="no upgrade until the guard or systemd has caught up",
            )
            self._behind = True
        return True

    def write(self) -> bool:
        """Write the state; say whether another program could go on from it now.

        It could not without a descriptor that the fd store was not sent yet: the next program
        takes what it inherits for stored.
        """
        wanted = self.descriptors().keys() - {inherited.GUARD}
        return self._write() and self.store.has(wanted)

    def _write(self) -> bool:
        assert self._snapshot is not None
        snapshot, before = self._snapshot(), self._written
        self._written = None  # until it is
        try:
            if before is None or not self.file.takes_changes:
                self.file.write(CODEC.encode(snapshot))
            elif changes := CODEC.changes(before, snapshot):
                self.file.write_change(changes)
        except OSError as error:
            if not self._failing:
                self.log.write("error", "state-not-written", error=error.strerror)
            self._failing = True
            return False
        self._written = snapshot
        self._failing = False
        return True


def read(fd: int) -> Snapshot | None:
    """Return what another program has written to its state memfd; None for an empty one.

    Raises StateError when it is a newer program's, or damaged.
    """
    file = StateFile(fd)
    if file.empty:
        return None
    whole, *changes = file.read()
    try:
        snapshot = CODEC.decode(whole, changes)
    except DecodeError as error:
        raise StateError(refusal("the state", error)) from error
    if not isinstance(snapshot, Snapshot):
        raise StateError("the state is no snapshot of a protector")
    return snapshot
