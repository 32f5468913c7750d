"""Moves the symbolic link `current`, which names the release to start, and keeps the link's lock.

The protector that holds the lock owns the link: only the owner moves the link.  The owner keeps the
lock through upgrades and kills, until it stops.  Other protectors with the same link only read the
link.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ..model.errors import what_failed
from ..model.lazy_dataclass import frozen
from ..model.settings import Settings
from ..system import inherited, release_store
from ..system.helper import BackOff
from .runtime import Runtime

_RETRY_TIMER = "current"
_FIRST_DELAY_S, _LAST_DELAY_S = 1.0, 60.0


@frozen
class NotMoved:
    """A release to which `current` could not be moved yet."""

    release: str
    still_named: str  # what `current` named when the move failed
    why: str


class CurrentLink:
    """The link `current`, as one protector uses it."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        runtime: Runtime,
        lock: int | None,
        moved_late: Callable[[], None],
    ) -> None:
        """settings: returns the settings in force.

        lock: the lock's descriptor, if we had the lock before an upgrade or a kill; otherwise None.

        moved_late: called when a retry has moved the link.
        """
        self._settings = settings
        self._loop, self._log, self._persist = runtime.loop, runtime.log, runtime.persist
        self._lock = lock
        self._moved_late = moved_late
        #: The error of the last try to take the lock; "": no error, or no try.  It is no error if
        #: another protector has the lock.
        self.lock_error = ""
        self.not_moved: NotMoved | None = None
        self._back_off = BackOff(_FIRST_DELAY_S, _LAST_DELAY_S)

    @property
    def path(self) -> str:
        return self._settings().current

    @property
    def named(self) -> str:
        """The release that `current` names; "": none."""
        return release_store.leads_to(self.path, self._settings().releases)

    @property
    def in_the_way(self) -> str:
        """Why `current` cannot be moved (it is no symbolic link); "": it is a link, or missing."""
        return release_store.in_the_way(self.path)

    @property
    def due(self) -> str:
        """The release to which `current` must still be moved; "": no move is due."""
        return self.not_moved.release if self.not_moved is not None else ""

    @property
    def error(self) -> str:
        """Why `current` could not be locked (see lock_error) or moved; "": no error."""
        return self.lock_error or (self.not_moved.why if self.not_moved is not None else "")

    # -- the owner ---------------------------------------------------------------

    @property
    def is_owned(self) -> bool:
        return self._lock is not None

    def keep_lock(self) -> bool:
        """Return whether we have the lock; if its file was removed, first lock a new file.

        Otherwise two protectors could have a lock each.
        """
        if self._lock is not None and not release_store.is_lock(self.path, self._lock):
            os.close(self._lock)
            self._lock = None
            self.take_lock()
        return self.is_owned

    def take_lock(self) -> bool:
        """Take the lock if it is free; return whether this protector has it."""
        failed = ""
        try:
            self._lock = release_store.lock(self.path)
        except OSError as error:
            failed = f"cannot lock {self.path}: {what_failed(error)}"
        if failed and not self.lock_error:
            self._log.write("error", "current-not-locked", error=failed)
        self.lock_error = failed
        return self.is_owned

    def close(self) -> None:
        """Release the lock; closing its descriptor is not enough if systemd keeps a copy."""
        if self._lock is not None:
            release_store.unlock(self._lock)

    def descriptors(self) -> dict[str, int]:
        """Return the lock's descriptor, by name: the lock must survive an upgrade or a kill."""
        return {inherited.CURRENT: self._lock} if self._lock is not None else {}

    # -- the moves ---------------------------------------------------------------

    def prepare(self, name: str) -> str:
        """Make the link that move() renames to `current`; return why this failed, or ""."""
        try:
            release_store.prepare(self.path, os.path.join(self._settings().releases, name))
        except OSError as error:
            return f"cannot make {self.path}.next: {error.strerror}"
        return ""

    def move(self, name: str) -> None:
        """Move `current` to a release; try again later if the move fails."""
        try:
            release_store.move(self.path, self._settings().releases, name)
        except OSError as error:
            if name != self.due:
                self._forget_due()  # this also ends the retries for an earlier release
                self._log.write("error", "current-not-moved", release=name, error=error.strerror)
            named = self.named
            self.not_moved = NotMoved(
                name, named, f"{self.path} still names {named or 'no release'}: {error.strerror}"
            )
            if self._loop.due(_RETRY_TIMER) is None:
                self._loop.call_after(_RETRY_TIMER, self._back_off.wait_s(), self._retry)
        else:
            if self.due:
                self._log.write("info", "current-moved", release=name)
            self._forget_due()

    def move_if_due(self) -> None:
        """Before our exit, try a due move a last time."""
        self.forget_due_if_moved()
        if self.due and self.keep_lock():
            self.move(self.due)

    def _retry(self) -> None:
        self.forget_due_if_moved()
        if self.due and not self.keep_lock():
            self._forget_due()  # another protector owns the link now
        if self.due:
            self.move(self.due)
            if not self.due:
                self._moved_late()
        self._persist()

    def forget_due_if_moved(self) -> None:
        """If an operator has moved `current` meanwhile, forget the move that is due."""
        if self.not_moved is not None and self.named != self.not_moved.still_named:
            self._forget_due()

    def _forget_due(self) -> None:
        self.not_moved = None
        self._loop.cancel(_RETRY_TIMER)
        self._back_off.reset()

    def discard(self) -> None:
        """Remove the link that prepare() made, unless a move is due or we are not the owner."""
        if self._lock is not None and not self.due:
            release_store.discard(self.path)
