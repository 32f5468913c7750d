"""Removes the pid file.  Only the holder of its lock may do so: the protector, or the guard.

launch/pid_file.py writes and locks it.
"""

from __future__ import annotations

import os


def remove(path: str, lock: int) -> None:
    """Remove the file, if this descriptor still holds its lock."""
    try:
        if os.path.samestat(os.lstat(path), os.fstat(lock)):
            os.unlink(path)
    except OSError:
        pass  # removed already, or no write access, which was reported at the start
