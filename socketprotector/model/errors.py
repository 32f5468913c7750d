"""The errors that users see, each with its exit status."""

from __future__ import annotations

import errno


class Refusal(Exception):
    """One clear line for the operator: what, with which, and what to do."""

    status = 100


class UsageError(Refusal):
    """The command line (or a file it names) asks for something that cannot be."""

    status = 2


class Mistaken(UsageError):
    """The mistakes in a file: one line each."""


class SystemRefused(Refusal):
    """A system call failed; the message holds the system's own words."""

    status = 111


class AlreadyRunning(Refusal):
    """A living protector holds the pid file (or the socket) already."""

    def __init__(self, message: str, holder: int = 0) -> None:
        """holder: the process that the pid file names."""
        super().__init__(message)
        self.holder = holder


#: What an operator can raise.
LIMITS = {
    errno.EMFILE: "the hard limit (ulimit -Hn, LimitNOFILE= of a unit)",
    errno.EFBIG: "the limit of file sizes (ulimit -f, LimitFSIZE= of a unit)",
}


def what_failed(error: BaseException) -> str:
    """Say an error's cause and the file it is about."""
    if isinstance(error, MemoryError):
        return "out of memory: raise the limit (ulimit -v, LimitAS= of a unit), or free some"
    if isinstance(error, OSError) and error.errno in LIMITS:
        return f"{error.strerror}: raise {LIMITS[error.errno]}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
