"""Saves the state and the descriptors from which the next program resumes.

The next program replaces us after a crash or an upgrade.  We save after each decision of
core/decide.py, before the decision's actions are carried out.

Descriptors go to the store: the guard or, if there is no guard, systemd's fd store.  The state
memfd says what each descriptor is for.  We first store new descriptors, then write the state, then
remove old descriptors from the store.  So whenever we are killed, the store has the descriptors
that the state mentions.  Exceptions:

* The store is full.
* The guard or systemd reads slowly, so we could not yet send our message with the descriptor.
* We could not copy the descriptor for the message, because we have reached our descriptor limit.

We store and write only changes, so the cost of a change does not grow with the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from ..core.snapshot import CODEC, Snapshot
from ..model.codec import DecodeError
from ..model.lazy_dataclass import mutable, replace
from ..system import inherited
from ..system.cleanup import on_error
from ..system.log import Log
from ..system.sd_notify import Store
from ..system.state_file import StateError, StateFile, unreadable
from .effects import Effects

_FULL = (
    "a crash of SocketProtector would end the workers that start from now on; raise "
    "FileDescriptorStoreMax= and LimitNOFILE= to 8192 or more, or run fewer workers"
)


@mutable
class Checkpoint:
    """Stores the descriptors and writes the state."""

    file: StateFile
    store: Store
    log: Log
    #: Returns, by name, the descriptors for the next program, except the descriptors of Effects.
    process_descriptors: Callable[[], Mapping[str, int]]
    _effects: Effects | None = None
    _snapshot: Callable[[], Snapshot] | None = None
    _written: Snapshot | None = None  # the last snapshot written; None: none yet, or a write failed
    _failing: bool = False  # the last write of the state has failed
    #: Whether we have logged keeper-behind: the guard or systemd has not taken all descriptors yet.
    _behind: bool = False
    _was_full: bool = False  # the store had no room for all descriptors at the last save

    def begin(self, effects: Effects, snapshot: Callable[[], Snapshot]) -> None:
        """Enable save(); until then save() does nothing.  snapshot: returns the state to write."""
        self._effects, self._snapshot = effects, snapshot

    def descriptors(self) -> dict[str, int]:
        """Return all descriptors that the next program needs, by name."""
        assert self._effects is not None
        return {**self.process_descriptors(), **self._effects.descriptors()}

    def save(self) -> bool:
        """Store the descriptors and write the state, so that the next program can resume.

        Returns False if the state could not be written.  Without a store, writes nothing and
        returns True: a kill closes all descriptors, so no program could resume from the state.
        """
        if self._effects is None:
            return True
        if not self.store.keeps:
            # Call sync() even without a store: it empties Named.changed (inherited.py), which
            # would otherwise grow with each worker.
            self.store.sync({}, self._effects.pool.descriptors)
            return True
        wanted = {**self.process_descriptors(), **self._effects.own_descriptors()}
        # Leave out our socket to the guard: the guard makes a new socket for each program.
        wanted.pop(inherited.GUARD, None)
        if not self.store.sync(wanted, self._effects.pool.descriptors, self._write):
            return False
        full = bool(self.store.left_out)
        if full and not self._was_full:
            self.log.write("warning", "store-full", descriptors=len(self.store.kept), hint=_FULL)
        self._was_full = full
        if self.store.flushed and self.store.complete:
            self._behind = False
        elif not self._behind:
            self.log.write(
                "warning",
                "keeper-behind",
                hint="an upgrade must wait until the guard or systemd has taken all descriptors",
            )
            self._behind = True
        return True

    def write(self) -> bool:
        """Write the state; return whether an upgrade may execute the next program now.

        The next program assumes that the store already has each inherited descriptor, except the
        descriptors that the state lists as left out.  So an upgrade must wait until all other
        descriptors have been sent to the store.
        """
        # If the last write failed, the store still has old descriptors.  Remove them now: the next
        # program does not inherit them, so it would never remove them.
        if not self.save():
            return False
        wanted = self.descriptors().keys() - {inherited.GUARD}
        return self._write() and self.store.has(wanted)

    def copies(self) -> dict[str, int]:
        """Return memfds with copies of the settings and the state, by name; the caller closes them.

        Raises OSError, and StateError if the state cannot be written.
        """
        if not self._write():
            raise StateError("the state cannot be written")
        settings = self.process_descriptors()[inherited.SETTINGS]
        content = os.pread(settings, os.fstat(settings).st_size, 0)
        found = {inherited.STATE: self.file.copy()}
        with on_error(os.close, found[inherited.STATE]):
            found[inherited.SETTINGS] = inherited.memory_file(inherited.SETTINGS, content)
        return found

    def _write(self) -> bool:
        assert self._snapshot is not None
        snapshot = replace(self._snapshot(), left_out=self.store.left_out)
        before = self._written
        self._written = None  # until the write has succeeded
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
    """Return the snapshot in an earlier program's state memfd; None: the memfd is empty.

    Raises StateError if the state is damaged, and NewerStateError if a newer version wrote it.
    """
    file = StateFile(fd)
    if file.empty:
        return None
    whole, *changes = file.read()
    try:
        snapshot = CODEC.decode(whole, changes)
    except DecodeError as error:
        raise unreadable(error) from error
    if not isinstance(snapshot, Snapshot):
        raise StateError("the state has no snapshot of a protector")
    return snapshot
