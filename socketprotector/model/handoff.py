"""How connections come to a worker: the modes, and what a server that is handed listeners is told.

Pure.  Under `connection` the channel brings them (docs/protocol.md); `stdio` and `legacy` are the
same to the protector, with a program of ours as the worker.  Under `listener` workers accept
themselves, from sockets that they have in common with us.

Source: sd_listen_fds(3); Server::Starter's SERVER_STARTER_PORT; einhorn's EINHORN_FD_n; circus'
$(circus.sockets.NAME); nginx' NGINX.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from .settings import ListenerSettings, Settings

CONNECTION, LISTENER, STDIO, LEGACY = MODES = ("connection", "listener", "stdio", "legacy")

#: The first descriptor that a server is handed, as sd_listen_fds(3) has it.
FIRST_FD = 3
#: How many programs run at once where nobody says.
PLACES = 4

#: What a mode cannot do, and why, in words.
CANNOT: Mapping[tuple[str, str], str] = {
    (LISTENER, "hold"): "under --handoff listener the workers accept, and nobody can hold them",
    (STDIO, "scale"): "under --handoff stdio --workers is how many programs run at once: "
    "change it and reload",
}
_COUNTS = "only workers of --handoff connection count their connections"
_ONLY_LISTENER = "it needs --handoff listener"
#: Options that need another mode, with what they need it for.
REFUSED: Mapping[tuple[str, str], str] = {
    **{(mode, "retire-after"): _COUNTS for mode in (LISTENER, STDIO, LEGACY)},
    **{(mode, "drain-signal"): _ONLY_LISTENER for mode in (CONNECTION, STDIO, LEGACY)},
    **{(mode, "shell"): "it needs --handoff stdio" for mode in (CONNECTION, LISTENER, LEGACY)},
    **{
        (mode, "ready"): "the adapter says when it is ready; leave --ready out"
        for mode in (STDIO, LEGACY)
    },
}

_PLACEHOLDER = re.compile(
    r"\{fd:(?P<fd>[^{}]*)\}|\$\(circus\.sockets\.(?P<circus>[^()]*)\)"
    r"|\(\(circus\.sockets\.(?P<old>[^()]*)\)\)",
    re.IGNORECASE,
)
#: Stands for the descriptor on which a line says ready; see system/readiness.py.
READY_NAME = "ready"


class HandoffError(ValueError):
    """A placeholder stands for nothing, or for several; the message says which."""


def descriptors(listeners: Sequence[ListenerSettings]) -> dict[int, int]:
    """Return the number that each listener has in a worker, by index; removed ones have none."""
    living = [index for index, each in enumerate(listeners) if not each.removed]
    return {index: FIRST_FD + place for place, index in enumerate(living)}


def placeholders(words: Sequence[str]) -> list[str]:
    """Return what stands in a command for a descriptor, as it stands there."""
    return [found[0] for word in words for found in _PLACEHOLDER.finditer(word)]


def ready_fd(settings: Settings) -> int:
    """Return the number of the descriptor on which a line says ready, -1 if there is none.

    Either --ready names it, or {fd:ready} asks for one behind the listeners.
    """
    words = (*settings.command, *(value for _, value in settings.environment))
    names = {_name(found) for word in words for found in _PLACEHOLDER.finditer(word)}
    if settings.ready_fd >= 0 or settings.handoff != LISTENER or READY_NAME not in names:
        return settings.ready_fd
    return FIRST_FD + len(descriptors(settings.listeners))


def ready_after_s(settings: Settings) -> float | None:
    """Return after how long a worker that says nothing is ready; None: it is to say so.

    A server that was given {fd:ready} will: until then it is not ready, however long it takes.
    """
    told = settings.ready == "any" and ready_fd(settings) >= 0
    return None if told else settings.ready_after_s


def filled(
    words: Sequence[str], listeners: Sequence[ListenerSettings], ready: int = -1
) -> tuple[str, ...]:
    """Put descriptors' numbers in the place of their names.  Raises HandoffError."""
    numbers = descriptors(listeners)

    def number(found: re.Match[str]) -> str:
        name = _name(found)
        mine = [index for index in numbers if listeners[index].name.lower() == name]
        if len(mine) > 1:
            told = ", ".join(listeners[index].address for index in mine)
            raise HandoffError(
                f"{found[0]}: {name} stands for {len(mine)} listeners ({told}); "
                "give each a name of its own, as in a=127.0.0.1:80 b=[::1]:80"
            )
        if mine:
            return str(numbers[mine[0]])
        if name == READY_NAME and ready >= 0:
            return str(ready)
        known = dict.fromkeys(listeners[index].name for index in numbers)
        raise HandoffError(
            f"{found[0]}: no listener has this name; there is: {', '.join(known) or 'none'}; "
            f"write NAME=LISTEN, as in {name or 'http'}=4321"
        )

    return tuple(_PLACEHOLDER.sub(number, word) for word in words)


def told(listeners: Sequence[ListenerSettings]) -> dict[str, str]:
    """Return what each kind of server wants to know of the listeners."""
    numbers = descriptors(listeners)
    found = {
        "LISTEN_FDS": str(len(numbers)),
        "LISTEN_FDNAMES": ":".join(_fdname(listeners[index].name) for index in numbers),
        "SERVER_STARTER_PORT": ";".join(
            f"{_starter_name(listeners[index])}={fd}" for index, fd in numbers.items()
        ),
        "EINHORN_FD_COUNT": str(len(numbers)),
        "EINHORN_FDS": " ".join(map(str, numbers.values())),
    }
    for place, fd in enumerate(numbers.values()):
        found[f"EINHORN_FD_{place}"] = str(fd)
    return found


def told_to(*, generation: int, slot: int, master_pid: int) -> dict[str, str]:
    """Return what one worker is told beside that.  Who it is (LISTEN_PID) is not known yet."""
    return {
        "SERVER_STARTER_GENERATION": str(generation),
        "EINHORN_MASTER_PID": str(master_pid),
        "EINHORN_CHILD_INDEX": str(slot),
    }


def refused(settings: Settings, given: Collection[str]) -> str | None:
    """Say which of the options given the mode cannot do, and why; None: all of them can be done."""
    mode = settings.handoff
    for option in given:
        why = REFUSED.get((mode, option))
        if why is not None:
            return f"--{option} with --handoff {mode}: {why}"
    if mode == LISTENER:
        return None
    found = placeholders(settings.command)
    return f"{found[0]} in the command: {_ONLY_LISTENER}" if found else None


def _name(found: re.Match[str]) -> str:
    """circus takes names in lower case; nobody tells two apart by that."""
    return (found["fd"] or found["circus"] or found["old"] or "").lower()


def _fdname(name: str) -> str:
    return name.replace(":", "_") or "unknown"


def _starter_name(listener: ListenerSettings) -> str:
    """What Server::Starter calls it: the port alone where no host was named, else the address."""
    kind, _, rest = listener.address.partition(":")
    if kind == "unix":
        return rest
    bare = listener.text.partition("?")[0].rpartition("=")[2].isdecimal()
    return rest.rpartition(":")[2] if bare else rest
