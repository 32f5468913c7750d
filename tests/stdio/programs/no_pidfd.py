"""The pool on a system that has no pidfd left: no_pidfd.py OPTIONS... -- COMMAND..."""

import errno
import os

from socketprotector.programs.stdio.__main__ import main


def none(pid: int, flags: int = 0) -> int:
    raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))


os.pidfd_open = none
main()
