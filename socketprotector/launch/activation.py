"""Takes over sockets that the service manager has opened (socket activation).

A LISTEN argument uses the socket with the given name (`fd:NAME`), or the socket that is bound to
the argument's address.  The service manager still listens on these sockets after SocketProtector
stops.

A socket with one of SocketProtector's own names comes from the descriptor store: see
stored_listeners.py.

Source: sd_listen_fds(3), systemd.socket(5).
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat

from ..model.errors import UsageError
from ..model.lazy_dataclass import frozen
from ..model.settings import ListenerSettings
from ..system import inherited
from ..system.scoped import host_of
from ..system.socket_file import path_of
from .bind import Bound, canonical, place
from .listen_spec import Listen

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID", inherited.RIGHTS)


@frozen
class Passed:
    """The sockets that the service manager passed to this process."""

    given: list[Bound]
    inherited: list[Bound]  # from the previous protector, through the descriptor store
    stored: list[str]  # every name of ours in the descriptor store
    other_pid: str = ""  # the process that the variables name, if it is not this one


def passed() -> Passed:
    """Take over the listening stream sockets that were passed to this process.

    The environment variables are removed, because they are meant only for this process.  A
    descriptor that is no listening socket is closed if it has one of our names; otherwise it stays
    open.
    """
    pid, count, names, *_ = (os.environ.pop(variable, "") for variable in _VARIABLES)
    if pid != str(os.getpid()):
        return Passed([], [], [], pid if inherited.number_in(count) else "")
    numbers = range(inherited.FIRST, inherited.FIRST + inherited.number_in(count))
    fd_names = chain(names.split(":") if names else (), repeat("unknown"))
    found = Passed([], [], [])
    for fd, name in zip(numbers, fd_names, strict=False):
        ours = name.startswith(inherited.OURS)
        if ours:
            found.stored.append(name)
        sock = _listening_socket(fd)
        if sock is not None:
            settings = ListenerSettings(_address(sock), name=name, foreign=not ours)
            bound = Bound(sock, settings, inherited=ours)
            (found.inherited if ours else found.given).append(bound)
        elif ours:
            os.close(fd)
    return found


def _listening_socket(fd: int) -> socket.socket | None:
    """Return the socket of a descriptor; None if this is no listening stream socket."""
    try:
        found = socket.socket(fileno=fd)
    except OSError:
        return None  # not a socket, or not open
    if found.type != socket.SOCK_STREAM or not found.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        found.detach()
        return None
    os.set_inheritable(fd, False)
    return found


def take(listens: Sequence[Listen], passed: Passed) -> dict[int, list[Bound]]:
    """Return the passed sockets that each LISTEN argument uses, by the argument's index.

    Raises UsageError if an argument names a socket that was not passed, or if two arguments use the
    same socket.
    """
    taken: dict[int, list[Bound]] = {}
    used_by: dict[int, str] = {}
    for index, listen in enumerate(listens):
        matching = [each for each in passed.given if _is_for(listen, each.settings)]
        for each in matching:
            fd = each.socket.fileno()
            if fd in used_by:
                raise UsageError(
                    f"cannot listen on {listen.text} beside {used_by[fd]}: both are the passed "
                    f"socket of {each.settings.address}; leave one of them out"
                )
            used_by[fd] = listen.text
        if matching:
            taken[index] = matching
        elif listen.passed is not None:
            raise UsageError(f"{listen.text}: {_why_missing(passed)}")
    return taken


def _why_missing(passed: Passed) -> str:
    """Return why a named socket is not among the passed sockets."""
    if passed.other_pid:
        return (
            f"the passed sockets are for process {passed.other_pid} (LISTEN_PID), but this is "
            f"{os.getpid()}; a shell that starts SocketProtector must exec it"
        )
    names = ", ".join(sorted({each.settings.name for each in passed.given})) or "none at all"
    return f"no listening socket was passed under this name; there is: {names}"


def _is_for(listen: Listen, settings: ListenerSettings) -> bool:
    """Return whether a LISTEN argument means a passed socket."""
    if listen.path is not None:  # systemd listens on /run/x for ListenStream=/var/run/x
        return place(settings.address) == place(f"unix:{listen.path}")
    return settings.name == listen.passed or listen.means(settings.address)


def close_unused(passed: Sequence[Bound], taken: Mapping[int, Sequence[Bound]]) -> Iterator[str]:
    """Close each passed socket that no LISTEN argument uses, and yield a line about it.

    If such a socket prevents the bind of a LISTEN argument, only systemd still has the socket open,
    so the error names systemd, not us.
    """
    used = {each.socket.fileno() for found in taken.values() for each in found}
    names = [each.settings.name for each in passed]
    for each in passed:
        if each.socket.fileno() not in used:
            each.socket.close()
            name, address = each.settings.name, each.settings.address
            # The sockets of one .socket unit have the same name: fd:NAME would take all of them.
            listen = shlex.quote(f"fd:{name}") if names.count(name) == 1 else "its address"
            yield f"no worker gets clients of {address}, a passed socket: add {listen} to LISTEN"


def _address(passed: socket.socket) -> str:
    name = passed.getsockname()
    if passed.family == socket.AF_UNIX:
        return canonical(passed.family, path_of(os.fsdecode(name)).replace("\0", "@", 1))
    return canonical(passed.family, host_of(name), name[1])
