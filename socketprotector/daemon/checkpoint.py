"""What the next program needs, kept ready for it at any time.

Descriptors go to whoever keeps them (systemd's store, or the guard); how they belong
together is written to the state memfd.  Descriptors first, then the state, then the act: so
whatever the state tells of can be found, whenever we are killed.  Only what has changed is given
away and written: each worker's step costs what one worker costs, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from .. import __version__
from ..core.events import Action
from ..core.fleet import Fleet
from ..core.snapshot import CLASSES, FORMERLY, Snapshot
from ..system import inherited
from ..system.log import Log
from ..system.sd_notify import Store
from ..system.state_file import Codec, StateError, StateFile
from .effects import Effects

CODEC = Codec(CLASSES, FORMERLY)
_FULL = "workers that come now do not outlive us; docs/reliability.md, How many workers"


class Heritage:
    """Writes down, after each step, where another program could go on."""

    def __init__(
        self,
        file: StateFile,
        store: Store,
        log: Log,
        others: Callable[[], Mapping[str, int]],
    ) -> None:
        """`others` names the descriptors that are neither generations', workers' nor listeners'."""
        self._file = file
        self._store = store
        self._log = log
        self._others = others
        self._written: Snapshot | None = None  # what the state says, as far as we know
        self._failing = False
        self._behind = False
        self._full = False

    @property
    def told(self) -> bool:
        """Whether who keeps descriptors has been told of all; the next program relies on that."""
        return self._store.told

    def descriptors(self, effects: Effects) -> dict[str, int]:
        """Return every descriptor that another program would need, by name."""
        return {**self._others(), **effects.descriptors()}

    def save(self, effects: Effects, fleet: Fleet, actions: Iterable[Action] = ()) -> bool:
        """Make it so that a kill from here on loses nothing that can be kept.

        Returns whether the state says how things are.  Does nothing where nobody keeps
        descriptors: then a kill takes all of them anyway.
        """
        if not self._store.keeps:
            return True
        wanted = {**self._others(), **effects.own_descriptors()}
        wanted.pop(inherited.GUARD, None)  # each program gets a line of its own
        self._store.sync(wanted, effects.pool.descriptors)
        if self._store.full and not self._full:
            self._log.write("warning", "store-full", descriptors=self._store.kept, hint=_FULL)
        self._full = self._store.full
        if not self._write(effects, fleet, actions):
            return False
        if self._store.told and self._store.complete:
            self._behind = False
        elif not self._behind:
            self._log.write("warning", "keeper-behind", hint="no upgrade until it has read on")
            self._behind = True
        return True

    def write(self, effects: Effects, fleet: Fleet) -> bool:
        """Write the state; say whether another program could go on from it now.

        It could not without a descriptor that whoever keeps them was not told of yet: the
        next program takes for kept whatever it is given.
        """
        wanted = self.descriptors(effects).keys() - {inherited.GUARD}
        return self._write(effects, fleet, ()) and self._store.has(wanted)

    def _write(self, effects: Effects, fleet: Fleet, actions: Iterable[Action]) -> bool:
        snapshot, before = effects.snapshot(fleet, actions, __version__), self._written
        self._written = None  # until it is
        try:
            if before is None or not self._file.takes_changes:
                self._file.write(CODEC.encode(snapshot))
            elif changes := CODEC.changes(before, snapshot):
                self._file.write_change(changes)
        except OSError as error:
            if not self._failing:
                self._log.write("error", "state-not-written", error=error.strerror)
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
    snapshot = CODEC.decode(whole, changes)
    if not isinstance(snapshot, Snapshot):
        raise StateError("the state is no snapshot of a protector")
    return snapshot
