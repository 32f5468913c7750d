"""The history of releases, and its file `current.history`, beside the link `current`.

The option --current names the link.  A separate process, the writer (programs/release_writer.py),
writes the file and waits for the disk.  A failed write is repeated.  A file that could not be read
is renamed before the next write.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ..model import release
from ..model.errors import what_failed
from ..model.lazy_dataclass import replace
from ..model.release import Entry, ReleaseHistory
from ..system import inherited, release_store
from ..system.cleanup import on_error
from ..system.helper import BackOff, HelperProcess, last_line
from ..system.loop import Loop
from .runtime import Runtime

_FIRST_FD = 3  # the writer's first descriptor after stdin, stdout and stderr
_AGAIN = "release-history"
_FIRST_DELAY_S, _LAST_DELAY_S = 1.0, 60.0


class SavedHistory:
    """The history in memory, and the writes that bring its file up to date."""

    def __init__(self, current: Callable[[], str], runtime: Runtime) -> None:
        """current: returns the path of the link `current`."""
        self.value = ReleaseHistory()
        #: Why a write failed; kept until a write of the newest history succeeds.  "": none failed.
        self.error = ""
        self._current, self._loop, self._log = current, runtime.loop, runtime.log
        # The next two attributes are compared with `value` by identity.
        self._on_disk: ReleaseHistory | None = self.value  # what the file has, as far as we know
        self._writing: ReleaseHistory | None = None  # what the writer is writing; None: no writer
        self._is_unreadable = False  # the file could not be read: rename it before the next write
        self._back_off = BackOff(_FIRST_DELAY_S, _LAST_DELAY_S)

    def read(self, *, is_owned: bool) -> None:
        """Read the file; if that fails, keep the present history, and write it unless it is empty.

        is_owned: whether this protector holds the lock of `current` (current_link.py).  If so,
        withdraw_writers() first prevents the writers of earlier owners from changing the file.
        """
        current, self._is_unreadable = self._current(), False
        if is_owned:
            with suppress(OSError):  # each write withdraws earlier writers again
                release_store.withdraw_writers(current)
        try:
            found = release_store.history(current)
            self.value = release.load(found) if found is not None else ReleaseHistory()
        except (release_store.ReleaseError, release.HistoryError) as error:
            self._is_unreadable = True
            known = "is kept in memory" if self.value != ReleaseHistory() else "begins again"
            name = release_store.unreadable_name(current)
            kept = f"; the next write renames the old file to {name}" if is_owned else ""
            self._log.write(
                "warning",
                "history-unreadable",
                file=f"{current}.history",
                error=str(error),
                hint=f"the history of releases {known}{kept}",
            )
        self._on_disk = self.value
        if self._is_unreadable and self.value != ReleaseHistory():
            self.sync()  # the disk lacks the history that we keep

    @property
    def is_saved(self) -> bool:
        """Whether the disk has the history, with all entries.

        If so, all moves of `current` before the last add() or sync() are on disk, too.
        """
        return self._on_disk is self.value

    def add(self, entry: Entry) -> None:
        """Add an entry, and make sure that the file is written."""
        self._save(release.added(self.value, entry))

    def sync(self) -> None:
        """Write the file again; the writer also syncs the folder, so `current` is on disk, too."""
        # A write in progress must not count, because it may have synced the folder before the link
        # changed.  So save a copy: is_saved compares identities, and is False until the copy is
        # written.
        self._save(replace(self.value))

    def _save(self, value: ReleaseHistory) -> None:
        self.value = value
        if self._writing is None and self._loop.due(_AGAIN) is None:
            self._start_write()

    def _start_write(self) -> None:
        self._writing = self.value
        try:
            if self._is_unreadable:
                release_store.keep_unreadable(self._current())
                self._is_unreadable = False
            write(self._current(), self.value, self._loop, self._on_write_ended)
        except OSError as error:
            self._on_write_ended(what_failed(error))

    def _on_write_ended(self, failure: str) -> None:
        written, self._writing = self._writing, None
        if failure:
            if not self.error:
                self._log.write("error", "history-not-written", error=failure)
            self.error = f"{self._current()} and its history may not be on disk: {failure}"
            self._loop.call_after(_AGAIN, self._back_off.wait_s(), self._start_write)
        elif written is not self.value:
            self._start_write()
        else:
            if self.error:
                self._log.write("info", "history-written")
            self.error, self._on_disk = "", written
            self._back_off.reset()


def write(current: str, history: ReleaseHistory, loop: Loop, done: Callable[[str], None]) -> None:
    """Start a writer; when it ends, call `done` with why it failed, or with "".  Raises OSError."""
    folder, name = os.path.split(current)
    output = os.memfd_create("sp.writer", os.MFD_CLOEXEC)
    opened = list[int]()
    with on_error(partial(os.close, output)):
        try:
            opened.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            opened.append(inherited.memory_file("sp.history", release.dump(history)))
            file, temporary = release_store.new_history(current)
            opened.append(file)
            given = dict(enumerate(opened, _FIRST_FD))
            with on_error(os.unlink, os.path.join(folder, temporary)):
                HelperProcess.start_own(
                    "release_writer.py",
                    (*map(str, given), temporary, f"{name}.history"),
                    {1: output, 2: output, **given},
                    loop,
                    partial(_ended, output, done),
                )
        finally:
            for fd in opened:
                os.close(fd)


def _ended(output: int, done: Callable[[str], None], how: str) -> None:
    said, has_said = last_line(output), os.fstat(output).st_size > 0
    os.close(output)
    done("" if said == "ok" else said if has_said else f"{said} ({how})")
