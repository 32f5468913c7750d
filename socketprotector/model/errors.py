"""The errors that users see, each with its exit status."""

from __future__ import annotations

import errno

from .text import escape


class Refusal(Exception):
    """One line for the operator: what failed, with which value, and what to do."""

    status = 100


class UsageError(Refusal):
    """The command line, or a file that it names, is wrong or contradicts itself."""

    status = 2


class Mistaken(UsageError):
    """Several mistakes, such as those in a file: one line for each, safe to show."""


class SystemRefused(Refusal):
    """A system call failed; the message has the system's error text."""

    status = 111


class AlreadyRunning(Refusal):
    """A running protector already holds the pid file or the socket."""

    def __init__(self, message: str, holder: int = 0) -> None:
        """holder: the pid in the pid file."""
        super().__init__(message)
        self.holder = holder


#: The limits that an operator can raise, by errno.
LIMITS = {
    errno.EMFILE: "the hard limit (ulimit -Hn, LimitNOFILE= of a unit)",
    errno.EFBIG: "the limit of file sizes (ulimit -f, LimitFSIZE= of a unit)",
}


#: The meaning of EAGAIN when a process cannot be started.
NO_PROCESSES = (
    "no more processes: raise RLIMIT_NPROC of the user (ulimit -u, LimitNPROC= of a unit), or "
    "TasksMax= of the service"
)
_FREE_MEMORY = "raise the limit (ulimit -v, LimitAS= of a unit), or free some"


#: What the dynamic loader says if it lacks memory, in an ImportError.
_LOADER_LACKS_MEMORY = ("failed to map segment", "cannot map", "allocate", "cannot create")


def lack_of_memory(error: BaseException) -> str:
    """Return the message if memory for loading a program is lacking; "" for any other error."""
    match error:
        case MemoryError() | SystemError() | OSError(errno=errno.ENOMEM):
            lacks = True
        case ImportError():
            loader = str(error) if str(error.path).endswith(".so") else ""
            lacks = any(each in loader for each in _LOADER_LACKS_MEMORY)
        case _:
            lacks = False
    return f"out of memory ({error}): {_FREE_MEMORY}".replace(" ()", "") if lacks else ""


def what_failed(error: BaseException) -> str:
    """Return the cause of an error, with the name of the file if there is one."""
    if isinstance(error, MemoryError):
        return f"out of memory: {_FREE_MEMORY}"
    if isinstance(error, OSError) and error.errno in LIMITS:
        return f"{error.strerror}: raise {LIMITS[error.errno]}"
    if isinstance(error, OSError) and error.filename:
        return f"{escape(str(error.filename))}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
