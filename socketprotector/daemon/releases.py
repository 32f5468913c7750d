"""Moves `current` to each release that has been proved, and keeps the history of releases.

This process renames `current`, before a queued reload reads it.  A separate process writes the
history and waits for the disk (programs/release_writer.py).  After a failure we try again.

One protector owns a `current`: it keeps a lock for its whole life, upgrades included.  Other
protectors with the same `current` use it at their reloads, but never move it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ..core import stop
from ..core.actions import Report, ReportKind
from ..model import release
from ..model.errors import what_failed
from ..model.lazy_dataclass import replace
from ..model.records import Program
from ..model.release import Entry, History
from ..model.settings import Settings
from ..model.text import added, headline
from ..system import inherited, release_store
from ..system.cleanup import on_error
from ..system.helper import BackOff, HelperProcess, last_line
from .runtime import Runtime

_FOLDER, _CONTENT = 3, 4
_AGAIN = "releases"
_FIRST_DELAY_S, _LAST_DELAY_S = 1.0, 60.0
_PROVED = (ReportKind.READY, ReportKind.RELOADED)
_VERDICTS = (*_PROVED, ReportKind.RELOAD_FAILED)


class Releases:
    """The releases of one protector."""

    def __init__(
        self, settings: Callable[[], Settings], runtime: Runtime, lock: int | None
    ) -> None:
        """settings: returns the settings in force.  lock: an earlier program's lock."""
        self._settings = settings
        self._loop, self._log, self._persist = runtime.loop, runtime.log, runtime.persist
        self._lock = lock
        self.history = History()
        #: The release to which `current` must still be moved; "": there is none.
        self.due = ""
        #: The release whose settings the last reload has read.
        self.tried = ""
        #: Why the lock could not be taken; "": this protector or another protector has it.
        self.not_locked = ""
        self._not_moved = self._not_written = ""  # the reasons of failures; "": none
        self._still_named = ""  # what `current` named when it could not be moved
        self._note = ""  # what the next verdict says about `current`
        self._is_written = True
        self._writer: HelperProcess | None = None
        self._written_history = History()
        self._output = -1
        self._back_off = BackOff(_FIRST_DELAY_S, _LAST_DELAY_S)
        self._take_lock()
        self._read()

    def _read(self) -> None:
        try:
            found = release_store.history(self.current)
            self.history = release.load(found) if found is not None else History()
        except (release_store.ReleaseError, release.HistoryError) as error:
            self._log.write(
                "warning",
                "history-unreadable",
                file=f"{self.current}.history",
                error=str(error),
                hint="the history of releases begins again",
            )

    # -- the owner ---------------------------------------------------------------

    def own(self) -> bool:
        """Return whether this protector owns `current`; become its owner if it has none."""
        if self._lock is None and self._take_lock():
            # The previous owner may have added entries, and our next write replaces the whole file.
            self._read()
        return self._lock is not None

    def _take_lock(self) -> bool:
        """Take the lock if it is free; return whether this protector has it."""
        if self._lock is None:
            failed = ""
            try:
                self._lock = release_store.lock(self.current)
            except OSError as error:
                failed = f"cannot lock {self.current}: {what_failed(error)}"
            if failed and not self.not_locked:
                self._log.write("error", "current-not-locked", error=failed)
            self.not_locked = failed
        return self._lock is not None

    def close(self) -> None:
        """Release the lock, even if systemd keeps a copy of its descriptor."""
        if self._lock is not None:
            release_store.unlock(self._lock)

    def descriptors(self) -> dict[str, int]:
        """Return the descriptor that the next program needs, by name."""
        return {inherited.CURRENT: self._lock} if self._lock is not None else {}

    # -- the present state ---------------------------------------------------------

    @property
    def current(self) -> str:
        """The path of the link."""
        return self._settings().current

    @property
    def serving(self) -> str:
        """The release of the settings in force."""
        return self._settings().release

    @property
    def named(self) -> str:
        """The release that `current` names; "": `current` leads to no release."""
        return release_store.leads_to(self.current, self._settings().releases)

    @property
    def error(self) -> str:
        """Why `current` or the history is wrong on disk; "": both are right, or will be soon."""
        return self.not_locked or self._not_moved or self._not_written

    @property
    def is_saved(self) -> bool:
        """Whether `current` and the history are on disk."""
        return not self.due and self._is_written

    @property
    def warning(self) -> str:
        """A warning that a restart would not start the serving release; "": it would."""
        named = self.named
        if named == self.serving:
            return ""
        if not named:
            return f"{self.current} leads to no release, so a restart would fail"
        if release.failed_last(self.history, named):
            return release.named_failed(named)
        return f"current names {named}, and {self.serving} is serving; a restart starts {named}"

    def previous(self) -> str:
        """Return the release to roll back to; "": there is none."""
        return release.previous(self.history, self.serving, self._exists)

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

    def begin(self, deployed: str) -> str:
        """Note the release that a reload starts; return it, or "" if `current` names it.

        deployed: the release of a deploy; "": no deploy.
        """
        # While `current` must still be moved, a reload must not start the release that it names.
        self._forget_due_if_moved()
        wanted = deployed or self.due
        self.tried = wanted or self.named
        return wanted

    def prepare(self, candidate: Settings, *, dry_run: bool) -> str:
        """Prepare to move `current` to the release of a deploy; return why that is impossible.

        So a full disk or a missing permission fails the deploy before anything changes for clients.
        """
        name = self.tried = candidate.release
        if dry_run or not candidate.release_wanted or not self.own() or self.named == name:
            return ""
        try:
            release_store.prepare(self.current, self._path(name))
        except OSError as error:
            return f"cannot make {self.current}.next: {error.strerror}"
        return ""

    def move(self, name: str, replaced: str) -> None:
        """Let `current` name a release that has been proved; try again later if that fails.

        replaced: the release that was serving until now; "": unknown.
        """
        if not self.own():
            return
        named, self.due = self.named, name
        self._move()
        if replaced and not self.due and named not in (replaced, name):
            self._note = f"current named {named or 'no release'} meanwhile; it names {name} now"
            self._log.write("warning", "current-moved-again", release=name, reason=self._note)

    def _move(self) -> None:
        try:
            release_store.move(self.current, self._settings().releases, self.due)
        except OSError as error:
            if not self._not_moved:
                self._log.write(
                    "error", "current-not-moved", release=self.due, error=error.strerror
                )
            self._still_named = self.named
            self._not_moved = f"{self.current} still names {self.named}: {error.strerror}"
            self._try_later()
        else:
            if self._not_moved:
                self._log.write("info", "current-moved", release=self.due)
            self.due = self._not_moved = ""

    def _forget_due_if_moved(self) -> None:
        """Forget that `current` must be moved, if an operator has moved it meanwhile."""
        if self.due and self._not_moved and self.named != self._still_named:
            self.due = self._not_moved = ""

    def reported(self, report: Report, program: Program | None) -> Report:
        """Note the verdict about a release; add to the report what it means for `current`.

        program: the program of the report's generation; None: that could not be opened.
        """
        name = program.release if program is not None else self.tried
        if report.news in _VERDICTS and self._lock is not None and not self.due:
            release_store.discard(self.current)  # prepare() made a link for a failed deploy
        if report.news in _PROVED and program is not None:
            self._prove(name, program)
            return replace(report, reason=self._with_note(report.reason))
        # A reload of the serving release may fail for other reasons than the release.
        if report.news is ReportKind.RELOAD_FAILED and name not in ("", self.serving):
            self.tried = ""
            if (
                self._lock is not None
                and self._exists(name)
                and self._is_own_failure(name, report, program)
            ):
                self._add(Entry(name, time.time(), headline(report.reason) or "it failed"))
            if name == self.named:
                return replace(report, reason=added(report.reason, release.named_failed(name)))
        return report

    def _is_own_failure(self, name: str, report: Report, program: Program | None) -> bool:
        """Return whether a release has caused a failure, so that a rollback skips this release.

        A failure by a stop does not count.  A mistake in the configuration counts only if its
        message names a path of the release.
        """
        if report.reason == stop.CALLED_OFF:
            return False
        return program is not None or self._path(name) in report.reason

    def _with_note(self, reason: str) -> str:
        state = (
            f"{self._not_moved}; SocketProtector tries again" if self._not_moved else self.warning
        )
        noted = "; ".join(filter(None, (reason, self._note, state)))
        self._note = ""
        return noted

    def _prove(self, name: str, program: Program) -> None:
        if self.own() and name:
            fingerprint = release_store.fingerprint(self._path(name), program.path)
            self._add(Entry(name, time.time(), was=fingerprint))

    def resume(self, due: str, program: Program | None) -> None:
        """Complete what an earlier program may have left undone.

        due: the release to which `current` must still be moved; "": there is none.
        program: the last program that was proved.
        """
        if due:
            self.move(due, "")
        if program is not None and self.history.way[-1:] != (program.release,):
            self._prove(program.release, program)

    # -- the history -------------------------------------------------------------------

    def _add(self, entry: Entry) -> None:
        self.history = release.added(self.history, entry)
        self._write()

    def _write(self) -> None:
        """Write the history, after a write that is under way or after the pause of a failure."""
        self._is_written = False
        if self._writer is not None or self._loop.due(_AGAIN) is not None:
            return
        folder, name = os.path.split(self.current)
        try:
            self._output = os.memfd_create("sp.writer", os.MFD_CLOEXEC)
            with on_error(self._close_output):
                self._start_writer(folder, f"{name}.history")
        except OSError as error:
            self._write_failed(what_failed(error))

    def _start_writer(self, folder: str, name: str) -> None:
        content = inherited.memory_file("sp.history", release.dump(self.history))
        try:
            folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._writer = HelperProcess.start_own(
                    "release_writer.py",
                    (str(_FOLDER), str(_CONTENT), name),
                    {1: self._output, 2: self._output, _FOLDER: folder_fd, _CONTENT: content},
                    self._loop,
                    self._on_written,
                )
            finally:
                os.close(folder_fd)
        finally:
            os.close(content)
        self._written_history = self.history

    def _on_written(self, how: str) -> None:
        self._writer = None
        answer = last_line(self._output)
        self._close_output()
        if answer != "ok":
            self._write_failed(f"{answer} ({how})")
        elif self._written_history is not self.history:
            self._write()
        else:
            if self._not_written:
                self._log.write("info", "history-written")
            self._not_written, self._is_written = "", True
            self._back_off.reset()

    def _write_failed(self, why: str) -> None:
        if not self._not_written:
            self._log.write("error", "history-not-written", error=why)
        self._not_written = f"current and its history may not be on disk: {why}"
        self._try_later()

    def _close_output(self) -> None:
        os.close(self._output)
        self._output = -1

    def _try_later(self) -> None:
        if self._loop.due(_AGAIN) is None:
            self._loop.call_after(_AGAIN, self._back_off.wait_s(), self._retry)

    def _retry(self) -> None:
        self._forget_due_if_moved()
        if self.due:
            self._move()
        if not self._is_written:
            self._write()
        self._persist()
