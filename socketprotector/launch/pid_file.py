"""Writes and locks the pid file, which never exists partly written.

The protector holds a flock on the pid file until it ends, also across each exec.  So a pid file is
stale if its lock is free.  The pid in the file proves nothing, because another program may have
this pid by now.  Only a file that looks like a pid file is replaced.

The file is made before a generation is serving, and is removed if the start fails.  So its
existence does not show that the protector is ready.

Source: rename(2), flock(2).  Our acquire() replaces that of lockfile.pidlockfile, which makes an
empty file first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress

from lockfile import NotMyLock
from lockfile.pidlockfile import PIDLockFile

from ..model.errors import LIMITS, AlreadyRunning, SystemRefused, UsageError
from ..system import pid_file_removal
from ..system.cleanup import on_error
from ..system.dir_lock import locked

#: A file with more content is not replaced, because it cannot be a pid file.
_MAX_BYTES = 32
_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space there, or choose another disk"),
    **{number: f"raise {limit}" for number, limit in LIMITS.items()},
    errno.ENXIO: "choose a regular file, or for a FIFO start its reader first",
}


def hint(error: OSError, place: str) -> str:
    """Return what an operator can do about a file that cannot be written."""
    return _HINTS.get(error.errno or 0, f"check {place} and its permissions")


def _has_open(pid: int, path: str) -> bool:
    """Return True if a process has a file of this name open, or if /proc hides its descriptors.

    A protector keeps its pid file open.  The lock alone proves nothing: any user who can read the
    pid file of a killed protector can lock it.
    """
    try:
        os.kill(pid, 0)
        descriptors = f"/proc/{pid}/fd"
        names = os.listdir(descriptors)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    for name in names:
        with suppress(OSError):  # the descriptor was closed meanwhile
            # stat() would follow the link, and might get stuck on its target.
            if os.path.basename(os.readlink(f"{descriptors}/{name}")) == os.path.basename(path):
                return True
    return False


class PidFile(PIDLockFile):  # type: ignore[misc]
    """A PID lock file for DaemonContext(pidfile=...)."""

    def __init__(self, path: str) -> None:
        """path: absolute.  The file is not opened yet."""
        super().__init__(path)
        #: Holds the lock once acquired; the resident process inherits it.
        self.fd = -1

    def acquire(self, timeout: float | None = None) -> None:
        """Lock the file and write our pid to it.

        Raises AlreadyRunning if a living protector holds the file, UsageError if the file is no pid
        file, and SystemRefused if the file cannot be made.
        timeout: ignored, because a living daemon keeps its lock.  lockfile requires the parameter.
        """
        stale = None
        try:
            with locked(self.path) as path:
                stale = self._open_stale(path, "stop or reload that one")
                self.fd = self._put(path, stale)
        except OSError as error:
            raise SystemRefused(
                f"cannot write the pid file {self.path}: {error.strerror}; "
                f"{hint(error, 'the folder')}"
            ) from error
        finally:
            if stale is not None:
                os.close(stale)

    def _put(self, path: str, stale: int | None) -> int:
        """Make a locked file with our pid, and rename it to the path; return its descriptor.

        path: in the locked folder.  stale: the descriptor of the file to be replaced.
        """
        # With the pid, because a name without a pid could be the name of another program's file.
        temporary = f"{path}.{os.getpid()}"
        if os.path.lexists(temporary):
            os.unlink(temporary)  # left by a killed process that had our pid
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with on_error(os.close, fd), on_error(os.unlink, temporary):
            os.fchmod(fd, 0o644)
            os.write(fd, b"%d\n" % os.getpid())
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._refuse_if_changed(path, stale)
            os.rename(temporary, path)
        return fd

    def _refuse_if_changed(self, path: str, stale: int | None) -> None:
        """Raise UsageError if the file was replaced meanwhile, or is no pid file any more."""
        if stale is not None:
            self._refuse_content(stale)
        if stale is not None or os.path.lexists(path):
            now = os.lstat(path)
            if stale is None or not os.path.samestat(now, os.fstat(stale)):
                raise UsageError(
                    f"the pid file {self.path} was replaced by another program just now; "
                    "choose a path that no other program uses"
                )

    def refuse_if_held(self, advice: str) -> None:
        """Raise AlreadyRunning, with this advice, if a living protector holds the file.

        Raises UsageError if the file is no pid file, and OSError.
        """
        with locked(self.path) as path:
            fd = self._open_stale(path, advice)
        if fd is not None:
            os.close(fd)

    def _open_stale(self, path: str, advice: str) -> int | None:
        """Open the existing file, and check that it may be replaced; None if there is no file."""
        try:
            # Check before opening: opening a device may have effects, and opening a FIFO waits.
            self._refuse_kind(os.lstat(path))
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with on_error(os.close, fd):
            self._refuse_kind(os.fstat(fd))
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                first = os.pread(fd, _MAX_BYTES, 0).split(b"\n")[0].strip()
                holder = int(first) if first.isdigit() else 0
                if holder and not _has_open(holder, self.path):
                    raise SystemRefused(
                        f"the pid file {self.path} is locked, but not by process {holder}, which "
                        f"it names; if `fuser {self.path}` shows no protector, remove the file"
                    ) from None
                who = f"process {holder}" if holder else "a process that it does not name"
                raise AlreadyRunning(
                    f"the pid file {self.path} is held by {who}; {advice}", holder
                ) from None
            self._refuse_content(fd)
        return fd

    def _refuse_kind(self, found: os.stat_result) -> None:
        if stat.S_ISREG(found.st_mode):
            return
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "no regular file"
        raise UsageError(f"the pid file {self.path} is {kind}; name a regular file or a new one")

    def _refuse_content(self, fd: int) -> None:
        content = os.pread(fd, _MAX_BYTES + 1, 0)
        digits = content.removesuffix(b"\n")
        if len(content) > _MAX_BYTES or (digits and not digits.isdigit()):
            raise UsageError(
                f"the pid file {self.path} has other content than a process ID, and would be "
                "replaced; choose another path, or remove the file"
            )

    def release(self) -> None:
        """Remove the file and unlock it.  Raises NotMyLock if we do not hold it."""
        if self.fd < 0:
            raise NotMyLock(f"{self.path} is not locked by us")
        pid_file_removal.remove(self.path, self.fd)
        os.close(self.fd)
        self.fd = -1
