"""Sockets that the service manager has opened for us (socket activation).

They are taken by name (`fd:NAME`) or because they are bound to the address that a LISTEN
argument means.  Whoever opened them goes on listening when we stop.

Source: sd_listen_fds(3), systemd.socket(5).
"""

from __future__ import annotations

import os
import socket

from .address import Listen
from .bind import Bound
from .errors import UsageError
from .frozen import frozen
from .settings import ListenerSettings

_FIRST = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


@frozen
class Given:
    """One socket that was passed in, and what it is bound to."""

    name: str
    socket: socket.socket
    address: str


def given() -> list[Given]:
    """Take over the listening stream sockets that were passed to this process.

    The variables are removed: they are for this process alone.  What is no such socket is left
    alone.
    """
    pid, count, names, _ = (os.environ.pop(variable, "") for variable in _VARIABLES)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    told = names.split(":") if names else []
    found = []
    for place in range(int(count)):
        name = told[place] if place < len(told) else "unknown"
        try:
            passed = socket.socket(fileno=_FIRST + place)
        except OSError:
            continue  # a file, or nothing
        if not _listens(passed):
            passed.detach()
            continue
        os.set_inheritable(passed.fileno(), False)
        found.append(Given(name, passed, _address(passed)))
    return found


def take(listens: list[Listen], passed: list[Given]) -> dict[int, list[Bound]]:
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
