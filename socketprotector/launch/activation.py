"""Sockets that the service manager has opened for us (socket activation).

They are taken by name (`fd:NAME`) or because they are bound to the address that a LISTEN
argument means.  The service manager goes on listening on them when we stop.

Those of our own names come from the descriptor store, and are no part of that: see
stored_listeners.py.

Source: sd_listen_fds(3), systemd.socket(5).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from ..model.errors import UsageError
from ..model.frozen import frozen
from ..model.settings import ListenerSettings
from ..system import inherited
from .bind import Bound
from .listen_spec import Listen

_FIRST = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


@frozen
class Given:
    """One socket that was passed in, and what it is bound to."""

    name: str
    socket: socket.socket
    address: str


@frozen
class Passed:
    """What was passed in."""

    given: Sequence[Given] = ()
    left: Sequence[Given] = ()  # by the protector that was here before us
    stored: Sequence[str] = ()  # all names that are ours in the descriptor store


def passed() -> Passed:
    """Take over the listening stream sockets that were passed to this process.

    The variables are removed: they are for this process alone.  What is no such socket is left
    alone, or closed where it is ours.
    """
    pid, count, names, _ = (os.environ.pop(variable, "") for variable in _VARIABLES)
    if pid != str(os.getpid()) or not count.isdigit():
        return Passed()
    called = names.split(":") if names else []
    given: list[Given] = []
    left: list[Given] = []
    stored: list[str] = []
    for place in range(int(count)):
        fd, name = _FIRST + place, called[place] if place < len(called) else "unknown"
        ours = name.startswith(inherited.OURS)
        if ours:
            stored.append(name)
        found = _listening(fd)
        if found is not None:
            (left if ours else given).append(Given(name, found, _address(found)))
        elif ours:
            os.close(fd)
    return Passed(given, left, stored)


def _listening(fd: int) -> socket.socket | None:
    try:
        found = socket.socket(fileno=fd)
    except OSError:
        return None  # a file, or nothing
    if not _listens(found):
        found.detach()
        return None
    os.set_inheritable(fd, False)
    return found


def take(listens: Sequence[Listen], passed: Sequence[Given]) -> dict[int, list[Bound]]:
    """Return, for each LISTEN argument that passed sockets stand for, what they are.

    Raises UsageError for a name that nothing was passed under.
    """
    taken: dict[int, list[Bound]] = {}
    for index, listen in enumerate(listens):
        if listen.passed is not None:
            mine = [each for each in passed if each.name == listen.passed]
            if not mine:
                names = ", ".join(sorted({each.name for each in passed})) or "none at all"
                raise UsageError(
                    f"{listen.text}: no listening socket was passed under this name; there is: "
                    f"{names}"
                )
        else:
            mine = [each for each in passed if listen.means(each.address)]
        if mine:
            taken[index] = [
                Bound(each.socket, ListenerSettings(each.address, foreign=True)) for each in mine
            ]
    return taken


def _listens(passed: socket.socket) -> bool:
    return passed.type == socket.SOCK_STREAM and bool(
        passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    )


def _address(passed: socket.socket) -> str:
    name = passed.getsockname()
    if passed.family == socket.AF_UNIX:
        text = os.fsdecode(name)
        return f"unix:@{text[1:]}" if text.startswith("\0") else f"unix:{text}"
    host = f"[{name[0]}]" if passed.family == socket.AF_INET6 else name[0]
    return f"tcp:{host}:{name[1]}"
