"""The door through which the resident process gets its descriptors.

The launching process leaves them at 3, 4, ... and names them, as systemd does for a
service (sd_listen_fds(3)); ours begin with `sp.`.  One door for every giver.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping

FIRST = 3
SETTINGS = "sp.settings"
LAUNCHER = "sp.launcher"  # where the launcher waits for a verdict
TERMINAL = "sp.terminal"  # in the foreground: where the reason of a failed start is said
PID_FILE = "sp.pidfile"  # holds the lock
LISTENER = "sp.listener."  # and its index
STATE = "sp.state"
GUARD = "sp.guard"  # the line to the guard
PROBE = "sp.probe"  # this process is only asked whether it could take over
CHANNEL = "sp.channel."  # and its generation, .read or .write
WORKER = "sp.worker."  # and its number, .process, .notify or .line
HAND = "sp.hand."  # and a number: the connection whose send failed
RELAY = "sp.relay."  # read, write, tail, process
#: Stands for a number in between that is nobody's.
_NOBODY = "sp.none"
_OURS = "sp."
_VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def leave(descriptors: Mapping[str, int]) -> dict[str, str]:
    """Put descriptors in their places for an exec, and return the variables that name them.

    Takes ownership; only an exec may follow.
    """
    # Out of the way first: a place may be held by a descriptor of another name.
    high = [
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST + len(descriptors))
        for fd in descriptors.values()
    ]
    for place, fd in enumerate(high, FIRST):
        os.dup2(fd, place, inheritable=True)
    return {"LISTEN_PID": str(os.getpid()), **names(descriptors)}


def names(descriptors: Iterable[str]) -> dict[str, str]:
    """Return the variables that name descriptors at 3, 4, ..., without the pid they are for."""
    found = tuple(descriptors)
    return {"LISTEN_FDS": str(len(found)), "LISTEN_FDNAMES": ":".join(found)}


def leave_in_place(descriptors: Mapping[str, int]) -> dict[str, str]:
    """Let descriptors survive an exec where they are, and return the variables that name them.

    Nothing is moved, so that close_again() undoes it all if the exec fails.
    """
    by_number = {fd: name for name, fd in descriptors.items()}
    for fd in by_number:
        os.set_inheritable(fd, True)
    last = max(by_number, default=FIRST - 1)
    places = (by_number.get(fd, _NOBODY) for fd in range(FIRST, last + 1))
    return {"LISTEN_PID": str(os.getpid()), **names(places)}


def close_again(descriptors: Mapping[str, int]) -> None:
    """Undo leave_in_place()."""
    for fd in descriptors.values():
        os.set_inheritable(fd, False)


def under(descriptors: Mapping[str, int], prefix: str) -> dict[str, dict[str, int]]:
    """Group the descriptors whose names begin with a prefix: `P7.read` is {"7": {"read": fd}}."""
    found: dict[str, dict[str, int]] = {}
    for name, fd in descriptors.items():
        if name.startswith(prefix):
            key, _, rest = name[len(prefix) :].partition(".")
            found.setdefault(key, {})[rest] = fd
    return found


def enter() -> dict[str, int]:
    """Return name -> descriptor of what was left for this process; the caller owns them.

    Sets close-on-exec on each and removes the variables from the environment.
    """
    count, pid, told, _ = (os.environ.pop(variable, "") for variable in _VARIABLES)
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found = {}
    for name, fd in zip(told.split(":"), range(FIRST, FIRST + int(count)), strict=False):
        if name == _NOBODY:
            continue
        if name.startswith(_OURS) and name not in found:
            found[name] = fd
            os.set_inheritable(fd, False)
        else:
            # What else the service manager passes (socket activation) was taken at the first
            # start and is among ours; several may have one name.
            os.close(fd)
    return found


def is_ours() -> bool:
    """Whether descriptors were left for this very process, our settings among them."""
    told = os.environ.get("LISTEN_FDNAMES", "").split(":")
    return SETTINGS in told and os.environ.get("LISTEN_PID") == str(os.getpid())
