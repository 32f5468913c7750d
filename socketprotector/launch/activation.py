"""Sockets that the service manager has opened for us (socket activation).

They are taken by name (`fd:NAME`) or because they are bound to the address that a LISTEN
argument means.  The service manager still listens on them after we stop.

Those of our own names come from the descriptor store, and are no part of that: see
stored_listeners.py.

Source: sd_listen_fds(3), systemd.socket(5).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from itertools import chain, repeat

from ..model.errors import UsageError
from ..model.lazy_dataclass import frozen
from ..model.settings import ListenerSettings
from ..system import inherited
from ..system.socket_file import path_of
from .bind import Bound, canonical
from .listen_spec import Listen

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


@frozen
class Passed:
    """What was passed in."""

    given: list[Bound]
    left: list[Bound]  # by the protector that was here before us
    stored: list[str]  # all names that are ours in the descriptor store


def passed() -> Passed:
    """Take over the listening stream sockets that were passed to this process.

    The variables are removed: they are for this process alone.  What is no such socket is left
    alone, or closed where it is ours.
    """
    pid, count, names, _ = (os.environ.pop(variable, "") for variable in _VARIABLES)
    if pid != str(os.getpid()):
        return Passed([], [], [])
    numbers = range(inherited.FIRST, inherited.FIRST + inherited.number_in(count))
    called = chain(names.split(":") if names else (), repeat("unknown"))
    found = Passed([], [], [])
    for fd, name in zip(numbers, called, strict=False):
        ours = name.startswith(inherited.OURS)
        if ours:
            found.stored.append(name)
        one = _listening(fd)
        if one is not None:
            settings = ListenerSettings(_address(one), name=name, foreign=not ours)
            (found.left if ours else found.given).append(Bound(one, settings, left=ours))
        elif ours:
            os.close(fd)
    return found


def _listening(fd: int) -> socket.socket | None:
    try:
        found = socket.socket(fileno=fd)
    except OSError:
        return None  # a file, or nothing
    if found.type != socket.SOCK_STREAM or not found.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        found.detach()
        return None
    os.set_inheritable(fd, False)
    return found


def take(listens: Sequence[Listen], passed: Sequence[Bound]) -> dict[int, list[Bound]]:
    """Return, for each LISTEN argument that passed sockets stand for, what they are.

    Raises UsageError for a name that nothing was passed under.
    """
    taken: dict[int, list[Bound]] = {}
    for index, listen in enumerate(listens):
        mine = [
            each
            for each in passed
            if each.settings.name == listen.passed or listen.means(each.settings.address)
        ]
        if mine:
            taken[index] = mine
        elif listen.passed is not None:
            names = ", ".join(sorted({each.settings.name for each in passed})) or "none at all"
            raise UsageError(
                f"{listen.text}: no listening socket was passed under this name; there is: {names}"
            )
    return taken


def _address(passed: socket.socket) -> str:
    name = passed.getsockname()
    if passed.family == socket.AF_UNIX:
        return canonical(passed.family, path_of(os.fsdecode(name)).replace("\0", "@", 1))
    return canonical(passed.family, *name[:2])
