"""The releases of a protector: which one a reload starts, and what the reload's result changes.

`current` is the symbolic link that the option --current names.  A release is proved when its start
or reload has succeeded.  A deploy that succeeds also moves `current` to its release
(current_link.py); a rollback to an earlier release is a deploy, too.  A failed move is *due*, and
is tried again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ..core import stop
from ..core.actions import Report, ReportKind
from ..core.failure import NOT_STORED, STARTING_WHEN_KILLED
from ..model import release
from ..model.lazy_dataclass import replace
from ..model.records import Program
from ..model.release import Entry
from ..model.settings import Settings
from ..model.text import added, headline
from ..system import release_store
from .current_link import CurrentLink
from .release_history import SavedHistory
from .runtime import Runtime

_PROVED = (ReportKind.READY, ReportKind.RELOADED)
_VERDICTS = (*_PROVED, ReportKind.RELOAD_FAILED)


class Releases:
    def __init__(
        self, settings: Callable[[], Settings], runtime: Runtime, lock: int | None
    ) -> None:
        """settings: returns the settings in force.

        lock: the inherited descriptor that holds the lock of `current`; None: no lock is inherited.
        """
        self._settings, self._log = settings, runtime.log
        self.history = SavedHistory(lambda: settings().current, runtime)
        self.link = CurrentLink(settings, runtime, lock, self.history.sync)
        #: The release that the last reload or dry run had to start; "": the release is unknown, or
        #: the release's failure has been reported.
        self._tried = ""
        #: What `current` named when the last reload or dry run began; "": it led to no release.
        self.named_at_begin = ""
        self._note = ""  # about a move of `current`, for the next report of a success
        # An inherited lock may be that of a removed file: the stores do not replace a descriptor.
        self.history.read(is_owned=self.link.keep_lock() or self.link.take_lock())

    def become_owner(self) -> bool:
        """Become the owner of `current` if it has no owner; return whether we are the owner."""
        if not self.link.keep_lock() and self.link.take_lock():
            # Our next write replaces the history file, so first read the previous owner's entries.
            self.history.read(is_owned=True)
        return self.link.is_owned

    # -- the present state ---------------------------------------------------------

    @property
    def serving(self) -> str:
        """The release of the settings in force."""
        return self._settings().release

    @property
    def error(self) -> str:
        """Why a lock or move of `current`, or a write of the history, failed; "": no failure."""
        return self.link.error or self.history.error

    @property
    def is_saved(self) -> bool:
        """Whether `current` and the history are on disk."""
        return not self.link.due and self.history.is_saved

    @property
    def warning(self) -> str:
        """A warning if a restart would not start the serving release; otherwise ""."""
        named = self.link.named
        if not named:
            return f"{self.link.path} leads to no release, so a restart would fail"
        if not self._exists(named):
            return f"current names {named}, which has no folder, so a restart would fail"
        if named == self.serving:
            return ""
        if release.failed_last(self.history.value, named):
            return release.failed_warning(named)
        return f"current names {named}, and {self.serving} is serving; a restart starts {named}"

    def previous(self) -> str:
        """Return the release to roll back to; "": there is none."""
        return release.previous(self.history.value, self.serving, self._exists)

    def _exists(self, name: str) -> bool:
        return os.path.isdir(self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self._settings().releases, name)

    def is_changed(self, entry: Entry) -> bool:
        """Return whether a release has changed since it was proved."""
        proved = entry.was
        return proved is not None and proved != release_store.fingerprint(
            self._path(entry.release), proved.program
        )

    # -- a reload --------------------------------------------------------------------

    def to_start(self) -> str:
        """Return the release that a reload without a deploy must start; "": follow `current`."""
        self.link.forget_due_if_moved()
        # While a move is due, `current` names an old release: start the release to which `current`
        # is to be moved.
        return self.link.due

    def begin(self, deployed: str) -> str:
        """Return the release that a reload or dry run must start; "": follow `current`.

        deployed: the release of a deploy; "": no deploy.
        """
        follow = self.to_start()  # for a deploy, too: it forgets a move that is no longer due
        wanted = deployed or follow
        self.named_at_begin = self.link.named
        self._tried = wanted or self.named_at_begin
        return wanted

    def prepare(self, candidate: Settings, *, dry_run: bool) -> str:
        """Prepare to move `current` to the release of a deploy; return why that is impossible.

        Returns "" if the move is possible, if this reload does not move `current`, or if the move
        is due already.  If a disk is full or a permission is missing, the deploy fails here, before
        anything changes for clients.
        """
        name = self._tried = candidate.release
        if dry_run or not candidate.release_wanted:
            return ""
        if not self.become_owner() or name in (self.link.named, self.link.due):
            return ""
        return self.link.prepare(name)

    def move(self, name: str) -> None:
        """Move `current` to a proved release; try again later if the move fails.

        Do nothing unless we own `current`.
        """
        if not self.become_owner():
            return
        named = self.link.named
        self.link.move(name)
        if not self.link.due and named not in (self.named_at_begin, name):
            moved = f"was moved to {named} during" if named else "led to no release at the end of"
            self._note = f"current {moved} the reload; it names {name} now"
            self._log.write("warning", "current-moved-again", release=name, reason=self._note)

    def reported(self, report: Report, program: Program | None) -> Report:
        """Record what a report says about a release; return the report.

        The returned report may have a note about `current`.
        program: the program of the report's generation; None: the report has no open generation.
        """
        name = program.release if program is not None else self._tried
        if report.news in _VERDICTS:
            self.link.discard()  # if a deploy failed, this removes prepare()'s current.next
        if report.news in _PROVED and program is not None:
            self._prove(program)
            return replace(report, reason=self._with_note(report.reason))
        # Do not record a failed reload of the serving release: that release has worked, so the
        # failure probably has another cause.
        if report.news is ReportKind.RELOAD_FAILED and name not in ("", self.serving):
            self._tried = ""
            if (
                self.link.is_owned
                and self._exists(name)
                and self._counts_against(name, report, program)
            ):
                outcome = release.FAILED if program is not None else release.REFUSED
                reason = headline(report.reason) or "it failed"
                self.history.add(Entry(name, time.time(), outcome, reason))
            if name == self.link.named:
                return replace(report, reason=added(report.reason, self.warning))
        return report

    def _counts_against(self, name: str, report: Report, program: Program | None) -> bool:
        """Return whether a failure counts against a release; if so, a rollback skips the release.

        A reload that a stop called off does not count, nor does one that failed because the
        protector was killed.  If a generation was opened, any other failure counts.  This includes
        a reload that an operator's `rollback` called off: the operator has rejected the release.

        A failure before a generation was opened counts only if its message names the release's
        folder.  Otherwise the configuration may be wrong, not the release.
        """
        # A worker's output never begins a reason.
        if report.reason.startswith((stop.CALLED_OFF, STARTING_WHEN_KILLED, NOT_STORED)):
            return False
        return program is not None or self._path(name) in report.reason

    def _with_note(self, reason: str) -> str:
        failed = self.link.not_moved
        state = f"{failed.why}; SocketProtector tries again" if failed is not None else self.warning
        noted = "; ".join(filter(None, (reason, self._note, state)))
        self._note = ""
        return noted

    def _prove(self, program: Program) -> None:
        name = program.release
        if name and self.become_owner():
            was = release_store.fingerprint(self._path(name), program.path)
            self.history.add(Entry(name, time.time(), was=was))

    def resume(self, due: str, program: Program | None, named_at_begin: str) -> None:
        """Complete what an upgrade or a kill may have interrupted.

        due: the release to which `current` must still be moved; "": no move is due.
        program: the workers' program that was proved last; None: no program was proved.
        """
        self.named_at_begin = named_at_begin
        if due and self.become_owner():
            self.link.move(due)
        if program is not None and self.history.value.way[-1:] != (program.release,):
            self._prove(program)
        elif self.link.is_owned:
            self.history.sync()
