"""Finds a protector's control socket by path, name or pid file.

Without these, finds the socket of the only running protector.
A socket is "silent" if a process listens there but does not answer in time (errors.py).
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from ..model.errors import UsageError
from ..model.text import escape
from ..system import control_path
from .client import ANSWER_S, connect, process_exists, why_misled
from .errors import NoProtector, RequestRefused
from .fields import completions, label, listed, text_in
from .query_all import SocketAnswer, query_all

_NAMES_SHOWN = 8
#: How long to wait until a restarted protector has written its pid file.
_RESTART_S = 2.0
_TRY_EVERY_S = 0.05


def sockets() -> list[str]:
    """Return the paths of all control sockets in the usual folders (system/control_path.py).

    Includes sockets whose protector was killed.
    """
    return control_path.sockets(os.environ, os.geteuid())


def by_path(path: str) -> str:
    """Return the absolute path of a control socket.

    Raises UsageError if the path is empty, or names a file that is not a socket.
    """
    if not path:
        raise UsageError("--control: the path is empty")
    with suppress(OSError):  # connect() reports a missing file or permission
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise UsageError(
                f"--control {path}: not a socket; `socketprotectorctl list` shows the control "
                "sockets"
            )
    try:
        return os.path.abspath(path)
    except FileNotFoundError:  # the current folder was removed, so connect() finds no socket
        return path


def by_name(name: str) -> str:
    """Return the path of the socket of the protector with this name.

    name: NAME, NAME:PORT or NAME:ADDRESS.  If no protector has this name, `name` may be PORT alone,
    or ADDRESS alone.  PORT and ADDRESS are those of the protector's first listener.  If this
    listener is a UNIX socket, PORT is the name of the socket's file.
    If no process listens at any matching socket, returns the path of one such socket; connecting to
    the socket then fails.
    Raises NoProtector if no socket matches, UsageError if several protectors match.
    """
    found = sockets()
    with_key, listening, certain = _with_key(name, found)
    if certain:
        return certain
    alive = [each for each in query_all(found) if each.alive]
    matching = _with_name(name, alive)
    silent: list[str] = []
    if not (matching or with_key):
        alive, silent = _query_silent_again(alive)
        matching = _with_name(name, alive)
    shown = dict(zip((each.path for each in alive), names(alive), strict=True))
    if len(matching) > 1:
        choices = [shown[path] for path in matching]
        # Two equal choices would both match several protectors.  So would a choice that is `name`
        # itself (see names()).  In both cases offer --control PATH for each matching protector.
        if len(set(choices)) < len(choices) or name in choices:
            choices = [f"--control {path}" for path in matching]
        raise UsageError(f"--name {name}: several match; choose one of {_shortened(choices)}")
    if matching or with_key:
        # Prefer a protector with this name.  Otherwise take a socket with this name in its path; of
        # several, prefer a socket where a process listens.
        return (matching or listening or with_key)[0]
    if silent:
        raise NoProtector(
            f"--name {name}: none of the protectors that answered has this name; no answer from "
            f"{_shortened(silent)}; try again, or pass --control PATH",
            "silent",
        )
    known = _shortened(list(shown.values()))
    raise NoProtector(
        f"--name {name}: no protector of that name in {where()}; found: {known}{_env_advice()}"
    )


def paths_by_name(names: Sequence[str]) -> list[str]:
    """Return the path of the socket for each name; "" if no socket or several protectors match.

    names: as in by_name().  Unlike by_name(), this function does not query silent protectors a
    second time: in the exporter, a silent protector must not delay the metrics of the others.
    """
    found = sockets()
    keyed = {name: _with_key(name, found) for name in names}
    paths = {name: certain for name, (*_, certain) in keyed.items()}
    if not all(paths.values()):
        alive = [each for each in query_all(found) if each.alive]
        for name in (name for name in keyed if not paths[name]):
            with_key, listening, _ = keyed[name]
            matching = _with_name(name, alive)
            if len(matching) < 2:
                paths[name] = next(iter(matching or listening or with_key), "")
    return [paths[name] for name in names]


def _with_key(name: str, found: Sequence[str]) -> tuple[list[str], list[str], str]:
    """Find the sockets with a name's key; return with_key, listening and the certain match.

    A socket's key is the protector's name as it is written in the socket's path.
    with_key: the paths of the sockets with the name's key.
    listening: the paths in with_key where a process listens.
    The certain match: the only path in `listening`; "" if `listening` has no or several paths.
    The certain match is also "" if another socket's key begins with the same NAME as `name` and
    then ends, or continues with ":".  Such a protector may be called `name` (docs/control.md): its
    key may be NAME, NAME:PORT or NAME:ADDRESS, and a reload may have changed its first listener.
    If the certain match is "", the caller must request the statuses.
    """
    key = control_path.key_of(name)
    with_key = [path for path in found if control_path.key(path) == key]
    first = f"{key.partition(':')[0]}:"
    related = [path for path in found if f"{control_path.key(path)}:".startswith(first)]
    listening = [path for path in with_key if _is_listening(path)]
    is_certain = len(listening) == 1 and len(related) == len(with_key)
    return with_key, listening, listening[0] if is_certain else ""


def _with_name(name: str, alive: Sequence[SocketAnswer]) -> list[str]:
    """Return the socket paths of the protectors that have this name (see _names_of()).

    If no protector has this name, take `name` as PORT or ADDRESS (see by_name()).  Then return the
    socket paths of the protectors whose first listener has this port, file name or address.
    """
    return [each.path for each in alive if name in _names_of(each)] or [
        each.path for each in alive if f"{_names_of(each)[0]}:{name}" in _names_of(each)
    ]


def _query_silent_again(found: Sequence[SocketAnswer]) -> tuple[list[SocketAnswer], list[str]]:
    """Request the status from the silent sockets again, and wait for up to ANSWER_S.

    Returns `found` with the new answers, and the paths of the sockets that are still silent.
    """
    again = query_all((each.path for each in found if each.why == "silent"), ANSWER_S)
    later = {each.path: each for each in again}
    return (
        [later.get(each.path, each) for each in found],
        [each.path for each in again if each.why == "silent"],
    )


def names_with_prefix(prefix: str) -> list[str]:
    """Return the protectors' names that begin with a prefix, for completion in a shell.

    Includes a name while its socket exists, even if the protector was killed.
    """
    return completions(names(query_all_sockets()), prefix)


def names(found: Sequence[SocketAnswer]) -> list[str]:
    """Return a name for each protector.

    Normally this is NAME, the name in the protector's status.  If several protectors share NAME,
    each is called NAME:PORT, or NAME:ADDRESS if they share NAME:PORT, too.
    If a protector does not answer, NAME is the name in its socket's path.
    Exceptions: a protector without a listener, and the protector whose socket is in NAME's folder
    (docs/control.md), are always called NAME.  Any process can claim NAME in its status, but only
    the folder's owner can put a socket there.
    """
    candidates = [_names_of(each) for each in found]
    chosen = [shortest for shortest, *_ in candidates]
    for index in (1, 2):
        uses = Counter(chosen)
        chosen = [
            name
            if uses[name] == 1 or each.path.endswith(_end_in_own_folder(name))
            else longer[min(index, len(longer) - 1)]
            for each, name, longer in zip(found, chosen, candidates, strict=True)
        ]
    return chosen


def _end_in_own_folder(name: str) -> str:
    """Return the end of the path of a socket in a protector's own folder: /KEY/control."""
    return f"/{control_path.key_of(name)}/{control_path.IN_OWN_FOLDER}"


def _names_of(found: SocketAnswer) -> tuple[str, ...]:
    """Return the names by which a protector can be chosen: NAME, NAME:PORT, NAME:ADDRESS."""
    status = found.result or {}
    name = label(status, "name") or control_path.key(found.path)
    listeners = listed(status, "listeners")
    return (
        (name, *control_path.apart(name, text_in(listeners[0], "address")))
        if listeners
        else (name,)
    )


def by_pid_file(file: str) -> str:
    """Return the path of the socket of the protector whose pid is in this file.

    Raises NoProtector, UsageError; RequestRefused if this user may not connect to the socket.
    """
    pid, owner = _living_pid(file)
    found = query_all(sockets())
    matching = _of_process(pid, found)
    if not matching:
        found, _ = _query_silent_again(found)
        matching = _of_process(pid, found)
    if matching and not (matching := [each for each in matching if each.uid == owner]):
        # The file's owner can write any pid into it.
        raise UsageError(
            f"--pid-file {file}: it belongs to user {owner}, but process {pid} to another; pass "
            "--control PATH"
        )
    if matching:
        # A process can claim any pid in its status, so several sockets may match.  Prefer a socket
        # in the pid file's folder, then a socket whose pid the kernel confirms (SO_PEERCRED).
        folder = os.path.dirname(os.path.abspath(file))
        matching.sort(key=lambda each: (os.path.dirname(each.path) != folder, each.pid != pid))
        return matching[0].path
    hint = ""
    for why, words in (("denied", "no permission for"), ("silent", "no answer from")):
        if paths := [each.path for each in found if each.why == why]:
            hint += f" ({words} {_shortened(paths)})"
    error = (
        f"--pid-file {file}: no control socket of process {pid} in {where()}{hint}; "
        "pass --control PATH"
    )
    if any(each.why == "denied" for each in found) and _is_another_users(pid):
        raise RequestRefused("denied", escape(error))
    raise NoProtector(error)


def _of_process(pid: int, found: Sequence[SocketAnswer]) -> list[SocketAnswer]:
    """Return the answers with this pid: SocketAnswer.pid, or `pid` or `main_pid` of the status.

    Under --guard, `main_pid` is the guard's pid, which is also the pid in the pid file.
    """
    matching = []
    for each in found:
        status = each.result or {}
        if each.alive and pid in (each.pid, status.get("pid"), status.get("main_pid")):
            matching.append(each)
    return matching


def _is_another_users(pid: int) -> bool:
    """Return whether a process belongs to another user; False if that is unknown."""
    try:
        return os.stat(f"/proc/{pid}").st_uid != os.geteuid()
    except OSError:
        return False


def _living_pid(file: str) -> tuple[int, int]:
    """Return the pid in a pid file, if a process has this pid, and the file's owner.

    Tries for up to _RESTART_S, because a restarted protector may not have written the file yet.
    Raises NoProtector if the file is missing or no process has the pid, UsageError if the file
    cannot be read or contains no pid.
    """
    until = time.monotonic() + _RESTART_S
    while True:
        try:
            pid, owner = _read_pid(file)
            if process_exists(pid):
                return pid, owner
            gone = f"--pid-file {file}: process {pid} is gone; the protector has ended"
            raise NoProtector(gone)
        except NoProtector:
            if time.monotonic() >= until:
                raise
        time.sleep(_TRY_EVERY_S)


def the_only_one() -> str:
    """Return the path of the socket of the only running protector.

    Raises NoProtector if no protector is running, UsageError if several are running.
    """
    listening = [path for path in sockets() if _is_listening(path)]
    if not listening:
        raise NoProtector(
            f"no protector has a control socket in {where()}"
            f"{_env_advice() or '; start one, or pass --control PATH'}"
        )
    if len(listening) > 1:
        known = _shortened(sorted(names(query_all(listening))))
        raise UsageError(f"several protectors run; choose one by --name NAME: {known}")
    return listening[0]


def query_all_sockets() -> list[SocketAnswer]:
    """Request the status from all sockets that sockets() returns, and return the answers."""
    return query_all(sockets())


def _is_listening(path: str) -> bool:
    """Return True if a process listens at this path, even if the process does not accept."""
    try:
        connect(path, 0).close()
    except NoProtector as error:
        return error.code == "silent"
    except RequestRefused:
        pass  # a process listens; a later request reports the missing permission
    return True


def _read_pid(file: str) -> tuple[int, int]:
    """Return the pid in a pid file, and the file's owner.

    Raises NoProtector, UsageError as _living_pid() does.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            opened = os.fstat(fd)
            regular = stat.S_ISREG(opened.st_mode)
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
        raise UsageError(f"--pid-file {file}: not a regular file; name the protector's pid file")
    number = re.match(rb"\s*(\d{1,9})\s*$", content)
    if number is None:
        raise UsageError(f"--pid-file {file}: it contains no pid")
    if why := why_misled(file, opened.st_uid):
        raise UsageError(f"--pid-file {file}: {why}")
    return int(number[1]), opened.st_uid


def where() -> str:
    """Return the folders that are searched for control sockets, as text for a message."""
    return " or ".join(control_path.folders(os.environ, os.geteuid()))


def none_found() -> str:
    """Return a message saying that no control socket was found, and where."""
    return f"no protector has a control socket in {where()}{_env_advice()}"


def _env_advice() -> str:
    """Return advice to set XDG_RUNTIME_DIR; "" if this variable is set, or if we are root.

    If only the protector has this variable, its socket may be in a folder that we do not search.
    """
    if os.geteuid() == 0 or os.environ.get("XDG_RUNTIME_DIR"):
        return ""
    return (
        "; XDG_RUNTIME_DIR is not set: set it to the protector's value, or pass the protector's "
        "--control PATH"
    )


def _shortened(names: list[str]) -> str:
    """Return the first names as text, and how many more there are; "none" if there is no name."""
    shown = ", ".join(escape(name) for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return (shown + (f" and {more} more" if more > 0 else "")) or "none"
