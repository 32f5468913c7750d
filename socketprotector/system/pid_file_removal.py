"""Removes the pid file; only the process that holds its lock may: the protector, or the guard.

launch/pid_file.py writes and locks it.
"""

from __future__ import annotations

import os


def remove(path: str, lock: int) -> None:
    """Remove the file, if it is still the one whose lock this descriptor holds."""
    try:
        if os.path.samestat(os.lstat(path), os.fstat(lock)):
            os.unlink(path)
    except OSError:
        pass  # removed already, or in a folder that is not this user's: said at start
