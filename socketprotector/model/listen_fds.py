"""The descriptors and variables by which a server gets its sockets under --handoff listener.

Pure.  A server finds its sockets by a variable, or by a descriptor's number in its command.  For
such a number, the operator writes a placeholder.

Source: sd_listen_fds(3); Server::Starter's SERVER_STARTER_PORT; einhorn's EINHORN_FD_n; circus'
$(circus.sockets.NAME); nginx' NGINX.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .settings import ListenerSettings, Settings

#: The first passed descriptor, by sd_listen_fds(3).
FIRST_FD = 3

_PLACEHOLDER = re.compile(
    r"\{fd:(?P<fd>[^{}]*)\}|\$\(circus\.sockets\.(?P<circus>[^()]*)\)"
    r"|\(\(circus\.sockets\.(?P<old>[^()]*)\)\)",
    re.IGNORECASE,
)
#: The name in a placeholder for the ready descriptor; see system/readiness.py.
READY_NAME = "ready"


class PlaceholderError(ValueError):
    """A placeholder matches no listener, or several; the message says which."""


def descriptors(listeners: Sequence[ListenerSettings]) -> dict[int, int]:
    """Return the descriptor of each listener in a worker, by index; removed listeners have none."""
    living = [index for index, each in enumerate(listeners) if not each.removed]
    return {index: fd for fd, index in enumerate(living, FIRST_FD)}


def placeholders(words: Sequence[str]) -> list[str]:
    """Return the placeholders for descriptors in a command, as they are written."""
    return [found[0] for word in words for found in _PLACEHOLDER.finditer(word)]


def ready_fd(settings: Settings) -> int:
    """Return the number of the ready descriptor in a worker; -1 if it has none.

    Either --ready names the number, or {fd:ready} requests the next number after the listeners,
    unless a listener is called `ready`.
    """
    called = {each.name.lower() for each in settings.listeners if not each.removed}
    if settings.ready_fd >= 0 or not settings.mode.workers_accept or READY_NAME in called:
        return settings.ready_fd
    words = (*settings.command, *(value for _, value in settings.environment))
    if READY_NAME not in {_name(found) for word in words for found in _PLACEHOLDER.finditer(word)}:
        return settings.ready_fd
    return FIRST_FD + len(descriptors(settings.listeners))


def ready_after_s(settings: Settings) -> float | None:
    """Return after how many seconds a worker without a message counts as ready; None means never.

    A server with {fd:ready} reports by that descriptor, so it needs no timer.  A worker that must
    declare in its message that it can finish alone gets no timer either: if the worker were slow,
    the timer would end before the declaration.
    """
    reports_by_fd = settings.ready == "any" and ready_fd(settings) >= 0
    return None if reports_by_fd or settings.policy.finish_alone else settings.ready_after_s


def fill(
    words: Sequence[str], listeners: Sequence[ListenerSettings], ready: int = -1
) -> tuple[str, ...]:
    """Return the words with descriptor numbers for placeholders.  Raises PlaceholderError."""
    numbers = descriptors(listeners)

    def number(found: re.Match[str]) -> str:
        name = _name(found)
        matches = [index for index in numbers if listeners[index].name.lower() == name]
        if len(matches) > 1:
            addresses = ", ".join(listeners[index].address for index in matches)
            raise PlaceholderError(
                f"{found[0]}: {name} stands for {len(matches)} listeners ({addresses}); "
                "give each its own name, as in a=127.0.0.1:80 b=[::1]:80"
            )
        if matches:
            return str(numbers[matches[0]])
        if name == READY_NAME and ready >= 0:
            return str(ready)
        names = dict.fromkeys(listeners[index].name for index in numbers)
        raise PlaceholderError(
            f"{found[0]}: no listener has this name; there is: {', '.join(names) or 'none'}; "
            f"write NAME=LISTEN, as in {name or 'http'}=4321"
        )

    return tuple(_PLACEHOLDER.sub(number, word) for word in words)


def listener_variables(listeners: Sequence[ListenerSettings]) -> dict[str, str]:
    """Return the variables by which servers of different kinds find their listeners."""
    numbers = descriptors(listeners)
    found = {
        "LISTEN_FDS": str(len(numbers)),
        "LISTEN_FDNAMES": ":".join(
            listeners[index].name.replace(":", "_") or "unknown" for index in numbers
        ),
        "SERVER_STARTER_PORT": ";".join(
            f"{name}={fd}"
            for index, fd in numbers.items()
            # It knows no quotes, so a ; in a path would also spoil the other pairs.  A path with =
            # stays, because our client library reads the name of its listener here.
            if ";" not in (name := _starter_name(listeners[index]))
        ),
        "EINHORN_FD_COUNT": str(len(numbers)),
        "EINHORN_FDS": " ".join(map(str, numbers.values())),
    }
    return found | {f"EINHORN_FD_{at}": str(fd) for at, fd in enumerate(numbers.values())}


def worker_variables(generation: int, *, slot: int, master_pid: int) -> dict[str, str]:
    """Return the variables that differ between workers, except LISTEN_PID, which the fork sets."""
    return {
        "SERVER_STARTER_GENERATION": str(generation),
        "EINHORN_MASTER_PID": str(master_pid),
        "EINHORN_CHILD_INDEX": str(slot),
    }


def _name(found: re.Match[str]) -> str:
    """Return the name in a placeholder, in lower case, because circus ignores case."""
    return (found["fd"] or found["circus"] or found["old"] or "").lower()


def _starter_name(listener: ListenerSettings) -> str:
    """Return Server::Starter's name of a listener: HOST:PORT, PORT without a host, or a path."""
    kind, _, rest = listener.address.partition(":")
    if kind == "unix":
        return rest
    bare = listener.text.partition("?")[0].rpartition("=")[2].isdecimal()
    return rest.rpartition(":")[2] if bare else rest
