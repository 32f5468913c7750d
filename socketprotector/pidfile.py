"""The pid file: lockfile's PID lock file, whole or not there.

Its holder also keeps a flock on it for life, through every exec.  So whether a pid file is
stale needs no guess about a pid that may be another program's by now: nobody holds it.

Source: link(2), flock(2); lockfile.pidlockfile, whose own acquire() lets an empty file be seen.
"""

from __future__ import annotations

import fcntl
import os

from lockfile import AlreadyLocked, NotMyLock
from lockfile.pidlockfile import PIDLockFile


class PidFile(PIDLockFile):  # type: ignore[misc]
    """A PID lock file for DaemonContext(pidfile=...)."""

    def __init__(self, path: str) -> None:
        """`path` is absolute; nothing is opened yet."""
        super().__init__(path)
        #: Holds the lock once acquired; the resident process inherits it.
        self.fd = -1

    def acquire(self, timeout: float | None = None) -> None:
        """Write our pid, or raise AlreadyLocked when a living protector holds the file.

        timeout is lockfile's and ignored: a living daemon's lock does not go away by waiting.
        Raises OSError when the file cannot be made.
        """
        temporary = f"{self.path}.{os.getpid()}"
        self.fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(self.fd, 0o644)
            os.write(self.fd, b"%d\n" % os.getpid())
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            while not self._put(temporary):
                pass  # somebody removed or replaced the file while we looked at it
        except BaseException:
            os.close(self.fd)
            self.fd = -1
            raise
        finally:
            if os.path.lexists(temporary):
                os.unlink(temporary)

    def _put(self, temporary: str) -> bool:
        """Give our file the name; False when that has to be tried again."""
        try:
            os.link(temporary, self.path)
            return True
        except FileExistsError:
            pass
        try:
            stale = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            try:
                fcntl.flock(stale, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlreadyLocked(f"held by process {self.read_pid()}") from None
            found, ours = os.lstat(self.path), os.fstat(stale)
            if (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino):
                return False
            os.rename(temporary, self.path)
            return True
        except FileNotFoundError:
            return False
        finally:
            os.close(stale)

    def holder(self) -> int | None:
        """Return the pid of the living protector that holds the file, or None."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(self.read_pid() or 0)
        finally:
            os.close(fd)
        return None

    def release(self) -> None:
        """Remove the file.  Raises NotMyLock when we do not hold it."""
        if self.fd < 0:
            raise NotMyLock(f"{self.path} is not locked by us")
        os.unlink(self.path)
        os.close(self.fd)
        self.fd = -1
