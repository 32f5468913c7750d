"""Where this run's temporary files are: in a folder that no other run of pytest touches.

pytest's own is one for all runs of a user, and each that begins makes it 0700 again: that took it
from the other users as which tests start programs, in the middle of another run.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

#: Short: a socket's path has 107 bytes.
_PREFIX = "spr"
#: In each of them, so that no other folder is removed.
_SIGN = ".of-socketprotectors-tests"
#: So many of runs that have failed are kept, to be looked at.
_KEPT = 3


class OwnFolder:
    """Held by a lock on it, so that another run that tidies up sees that it is in use."""

    def __init__(self) -> None:
        _tidy_up()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = _locked(self.path)
        (self.path / _SIGN).touch()
        self.path.chmod(0o1777)  # as /tmp: tests start programs as other users

    def end(self, *, keep: bool) -> None:
        """keep: what is in it, until later runs have failed."""
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)


def let_through(folder: Path) -> None:
    """Let any user enter a folder, and go there; but below /tmp nothing is opened for reading."""
    for each in (folder, *folder.parents[:-2]):
        each.chmod(each.stat().st_mode | 0o011)


def _tidy_up() -> None:
    found = []
    for each in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if each.stat().st_uid == os.getuid() and (each / _SIGN).exists():
                found.append((each.stat().st_mtime, each))
        except FileNotFoundError:
            continue  # another run has just removed it
    for _, each in sorted(found)[:-_KEPT]:
        lock = _locked(each)
        if lock is not None:
            shutil.rmtree(each, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """Return a descriptor that holds it; None if another run does, or it is gone."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd
