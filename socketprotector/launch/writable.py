"""Tests whether a file could be written, and gives the error: access(2) does not."""

from __future__ import annotations

import errno
import os


def refuse_unwritable(path: str, mode: int = os.W_OK) -> None:
    """Raise OSError if this file or directory cannot be written, with the reason."""
    if not os.access(path, mode):
        protected = os.statvfs(path).f_flag & os.ST_RDONLY
        number = errno.EROFS if protected else errno.EACCES
        raise OSError(number, os.strerror(number), path)
