"""The errors that users see, each with its exit status."""

from __future__ import annotations

import errno


class Refusal(Exception):
    """One clear line for the operator: what, with which, and what to do."""

    status = 100


class UsageError(Refusal):
    """The command line (or a file it names) asks for something that cannot be."""

    status = 2


class SystemRefused(Refusal):
    """A system call failed; the message holds the system's own words."""

    status = 111


class AlreadyRunning(Refusal):
    """A living protector holds the pid file (or the socket) already."""

    def __init__(self, message: str, holder: int = 0) -> None:
        """holder: the process that the pid file names."""
        super().__init__(message)
        self.holder = holder


def what_failed(error: Exception) -> str:
    """Say an error's cause and the file it is about."""
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return f"{error.strerror}: raise the hard limit (ulimit -Hn, LimitNOFILE= of a unit)"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
