"""Finds a control socket by path, by name, by pid file, or as the only one in use."""

from __future__ import annotations

import os
import re
import stat
import string
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from ..model.errors import UsageError
from ..model.text import escape
from ..system import control_path
from .client import connect, lives
from .errors import NoProtector, RequestRefused
from .fields import label, listed, text_in
from .query_all import SocketAnswer, query_all

_NAMES_SHOWN = 8

#: Characters that no shell treats specially, wherever they are in a word.
_SHELL_SAFE = frozenset(string.ascii_letters + string.digits + "@%+:,./_-")


def sockets() -> list[str]:
    """Return the paths of all control sockets, living or dead."""
    return control_path.sockets(os.environ, os.geteuid())


def by_path(path: str) -> str:
    """Return the absolute path of a control socket.  Raises UsageError for another kind of file."""
    with suppress(OSError):  # connect() will report it
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise UsageError(
                f"--control {path}: it is no socket; name a control socket, as "
                "`socketprotectorctl list` shows them"
            )
    return os.path.abspath(path)


def by_name(name: str) -> str:
    """Return the socket of the protector with this name.

    If several protectors share a name, NAME:LISTENER chooses one of them.  A listener's port alone
    is a name, too, unless a protector is named like that port.
    """
    # The protector derives its key from its name, which may be a path, in the same way.
    key, found = control_path.key_of(name), sockets()
    there = [path for path in found if control_path.key(path) == key]
    others = [path for path in found if control_path.key(path).startswith(f"{key}:")]
    living = [path for path in there if _listening(path)]
    if len(living) == 1 and not others:
        return living[0]
    alive = [each for each in query_all(found) if each.alive]
    called = dict(zip((each.path for each in alive), names(alive), strict=True))
    meant = [each.path for each in alive if name in _names_of(each)] or [
        each.path for each in alive if f"{_names_of(each)[0]}:{name}" in _names_of(each)
    ]
    if len(meant) > 1:
        apart = [called[path] for path in meant]
        if len(set(apart)) < len(apart):  # some share the listener, too
            apart = [f"--control {path}" for path in meant]
        raise UsageError(f"--name {name}: which one? {_names(apart)}")
    if meant or living or there:
        return (meant or living or there)[0]
    known = _names(list(called.values()))
    raise NoProtector(
        f"--name {name}: no protector of that name in {where()}; there is {known}{_unset()}"
    )


def running(begun: str) -> list[str]:
    """Return the names of running instances that begin with a text, for completion in a shell.

    It leaves out names with characters that are special to a shell, because any process can choose
    any name.
    """
    found = names(everything())
    return [each for each in found if each.startswith(begun) and not set(each) - _SHELL_SAFE]


def names(found: Sequence[SocketAnswer]) -> list[str]:
    """Return a name for each protector, with its listener if several protectors share the name.

    A protector that does not answer gets its socket's name.  Any process can choose any name, so
    only a protector whose socket is in the folder of the name keeps the name without a listener.
    """
    longer = [_names_of(each) for each in found]
    called = [plain for plain, *_ in longer]
    for more in (1, 2):
        several = Counter(called)
        called = [
            name
            if several[name] == 1 or each.path.endswith(_own_folder(name))
            else its[min(more, len(its) - 1)]
            for each, name, its in zip(found, called, longer, strict=True)
        ]
    return called


def _own_folder(name: str) -> str:
    return f"/{control_path.key_of(name)}/{control_path.IN_OWN_FOLDER}"


def _names_of(found: SocketAnswer) -> tuple[str, ...]:
    """Return the names that an instance may have, the shortest first."""
    status = found.result or {}
    name = label(status, "name") or control_path.key(found.path)
    listeners = listed(status, "listeners")
    return (
        (name, *control_path.apart(name, text_in(listeners[0], "address")))
        if listeners
        else (name,)
    )


def by_pid_file(file: str) -> str:
    """Return the socket of the protector whose pid is in this file."""
    pid = _pid(file)
    if not lives(pid):
        raise NoProtector(f"--pid-file {file}: process {pid} is gone; the protector has ended")
    found = query_all(sockets())
    there = []
    for each in found:
        status = each.result or {}
        # Under --guard the pid file holds the pid of the guard: main_pid.
        if each.alive and pid in (each.pid, status.get("pid"), status.get("main_pid")):
            there.append(each)
    if there:
        # Any process can report any pid: prefer a socket beside the pid file, then SO_PEERCRED.
        folder = os.path.dirname(os.path.abspath(file))
        there.sort(key=lambda each: (os.path.dirname(each.path) != folder, each.pid != pid))
        return there[0].path
    unseen = [each.path for each in found if each.why in ("denied", "silent")]
    hint = f" (no answer from {_names(unseen)})" if unseen else ""
    raise NoProtector(
        f"--pid-file {file}: no control socket of process {pid} in {where()}{hint}; "
        "name it with --control PATH"
    )


def the_only_one() -> str:
    """Return the socket of the only protector that is running."""
    living = [path for path in sockets() if _listening(path)]
    if not living:
        raise NoProtector(
            f"no protector has a control socket in {where()}"
            f"{_unset() or '; start one, or pass --control PATH'}"
        )
    if len(living) > 1:
        known = _names(sorted(names(query_all(living))))
        raise UsageError(f"several protectors run; choose one by --name NAME: {known}")
    return living[0]


def everything() -> list[SocketAnswer]:
    """Request the status from all control sockets in the usual folders; return the answers."""
    return query_all(sockets())


def _listening(path: str) -> bool:
    try:
        connect(path, 0).close()
    except NoProtector as error:
        return error.code == "silent"
    except RequestRefused:
        pass  # a process listens, but we have no permission: the request will report it
    return True


def _pid(file: str) -> int:
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
            content = os.read(fd, 64) if regular else b""
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise NoProtector(
            f"--pid-file {file}: no such file; start the protector, or check the path"
        ) from None
    except OSError as error:
        raise UsageError(f"--pid-file {file}: {error.strerror}") from None
    if not regular:
        raise UsageError(f"--pid-file {file}: it is no regular file; name the protector's pid file")
    number = re.match(rb"\s*(\d{1,9})\s*$", content)
    if number is None:
        raise UsageError(f"--pid-file {file}: it contains no pid")
    return int(number[1])


def where() -> str:
    """Return the folders that are searched for control sockets, in words."""
    return " or ".join(control_path.folders(os.environ, os.geteuid()))


def none_found() -> str:
    """Return the message that no control socket was found, with advice."""
    return f"no protector has a control socket in {where()}{_unset()}"


def _unset() -> str:
    """Return advice if XDG_RUNTIME_DIR is not set, but may have been for the protector."""
    if os.geteuid() == 0 or os.environ.get("XDG_RUNTIME_DIR"):
        return ""
    return (
        "; XDG_RUNTIME_DIR is not set: set it as it was when the protector started, or pass the "
        "protector's --control PATH"
    )


def _names(names: list[str]) -> str:
    shown = ", ".join(escape(name) for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return (shown + (f" and {more} more" if more > 0 else "")) or "none"
