"""The errors that users see, each with its exit status."""

from __future__ import annotations

import errno

from .text import escape


class Refusal(Exception):
    """One clear line for the operator: what, with which, and what to do."""

    status = 100


class UsageError(Refusal):
    """The command line (or a file it names) asks for something that cannot be."""

    status = 2


class Mistaken(UsageError):
    """Several mistakes, as in a file: one line each, safe to show."""


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


#: What EAGAIN means where a process cannot be started.
NO_PROCESSES = (
    "no more processes: raise RLIMIT_NPROC of the user (ulimit -u, LimitNPROC= of a unit), or "
    "TasksMax= of the service"
)
_FREE_MEMORY = "raise the limit (ulimit -v, LimitAS= of a unit), or free some"


def lack_of_memory(error: MemoryError | ImportError) -> str:
    """Return what a program without memory to be loaded says; empty: the error is another one."""
    if isinstance(error, ImportError) and ".so" not in str(error):
        return ""
    return f"out of memory ({error}): {_FREE_MEMORY}".replace(" ()", "")


def what_failed(error: BaseException) -> str:
    """Say an error's cause and the file it is about."""
    if isinstance(error, MemoryError):
        return f"out of memory: {_FREE_MEMORY}"
    if isinstance(error, OSError) and error.errno in LIMITS:
        return f"{error.strerror}: raise {LIMITS[error.errno]}"
    if isinstance(error, OSError) and error.filename:
        return f"{escape(str(error.filename))}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
