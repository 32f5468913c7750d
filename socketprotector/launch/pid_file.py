"""Writes and locks the pid file: lockfile's PID lock file, whole or not there.

Its holder also keeps a flock on it for life, through every exec.  So whether a pid file is
stale needs no guess about a pid that may be another program's by now: it is if the lock is
free.

It is there before anything serves, and is removed if the start fails: it is no sign of readiness.

Source: rename(2), flock(2); lockfile.pidlockfile, whose own acquire() lets an empty file be
seen.
"""

from __future__ import annotations

import fcntl
import os

from lockfile import NotMyLock
from lockfile.pidlockfile import PIDLockFile

from ..model.errors import AlreadyRunning, SystemRefused
from ..system import pid_file_removal
from ..system.cleanup import on_error
from ..system.dir_lock import locked


class PidFile(PIDLockFile):  # type: ignore[misc]
    """A PID lock file for DaemonContext(pidfile=...)."""

    def __init__(self, path: str) -> None:
        """`path` is absolute; nothing is opened yet."""
        super().__init__(path)
        #: Holds the lock once acquired; the resident process inherits it.
        self.fd = -1

    def acquire(self, timeout: float | None = None) -> None:
        """Write our pid.

        timeout is lockfile's and ignored: a living daemon's lock does not go away by waiting.
        Raises AlreadyRunning when a living protector holds the file, SystemRefused when it
        cannot be made.
        """
        try:
            with locked(self.path):
                self._refuse_if_held("stop or reload that one")
                self.fd = self._put()
        except OSError as error:
            raise SystemRefused(
                f"cannot write the pid file {self.path}: {error.strerror}; check the folder and "
                "its permissions"
            ) from error

    def _put(self) -> int:
        """Give the name to a locked file with our pid; return its descriptor."""
        temporary = f"{self.path}.{os.getpid()}"
        if os.path.lexists(temporary):
            os.unlink(temporary)  # of a process with our pid that was killed right here
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with on_error(os.close, fd), on_error(os.unlink, temporary):
            os.fchmod(fd, 0o644)
            os.write(fd, b"%d\n" % os.getpid())
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.rename(temporary, self.path)
        return fd

    def refuse_if_held(self, do: str) -> None:
        """Raise AlreadyRunning, with what to do, if a living protector holds the file; OSError."""
        with locked(self.path):
            self._refuse_if_held(do)

    def _refuse_if_held(self, do: str) -> None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            first = os.pread(fd, 32, 0).split(b"\n")[0].strip()
            holder = int(first) if first.isdigit() else 0
            raise AlreadyRunning(
                f"the pid file {self.path} is held by process {holder}; {do}"
            ) from None
        finally:
            os.close(fd)

    def release(self) -> None:
        """Remove the file.  Raises NotMyLock when we do not hold it."""
        if self.fd < 0:
            raise NotMyLock(f"{self.path} is not locked by us")
        pid_file_removal.remove(self.path, self.fd)
        os.close(self.fd)
        self.fd = -1
