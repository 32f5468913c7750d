"""Finds the process that uses an address, if /proc or the socket shows it.

Source: proc(5) through psutil; unix(7) for SO_PEERCRED.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, cast

from socketprotector_client import wire

from ..system.socket_file import path_of

_CREDENTIALS = struct.Struct("3i")
_OURS = "SocketProtector"  # the name of a protector's process, and of its guard's
#: At a reload, the pid of the running protector, so that no advice says to stop it; at a start, 0.
protector = 0
_UNKNOWN = "another program has it: stop that program, or choose another address"


def of_port(host: str, port: int) -> str:
    """Return, for an error, which process has a TCP port, and what to do."""
    try:
        return _of_port(host, port)
    except (MemoryError, OSError):  # `ulimit -v`; no free descriptor
        return _UNKNOWN


def _of_port(host: str, port: int) -> str:
    import psutil  # late: this takes a tenth of the time of a start

    host = host.partition("%")[0]  # /proc names no interface

    def has_port(each: Any) -> bool:
        if not each.laddr or each.laddr.port != port:
            return False
        return each.laddr.ip == host or bool({each.laddr.ip, host} & {"0.0.0.0", "::"})

    def listens(each: Any) -> bool:
        return each.status == psutil.CONN_LISTEN and has_port(each)

    for _ in range(2):  # sockets come and go while /proc is read; a process found can end
        found: list[Any] = []
        with suppress(psutil.Error, OSError):  # there is no /proc, or we may not read it
            found = [each for each in psutil.net_connections("tcp") if has_port(each)]
        # If no socket listens on the port, an outgoing connection uses the port.
        pids = [each.pid for each in [*filter(listens, found)] or found if each.pid]
        if os.getpid() in pids:  # the configuration has the address twice
            return "another listener of this protector has it: leave one of them out"
        if advice := _advice(pids, listens):
            return advice
    return _UNKNOWN


def addresses_of(pid: int) -> frozenset[str]:
    """Return the addresses of a process's sockets, as far as /proc shows them."""
    import psutil

    found = set[str]()
    with suppress(psutil.Error, OSError):
        for each in _sockets_of(psutil.Process(pid)):
            if each.family == socket.AF_UNIX and each.laddr:
                found.add(f"unix:{path_of(str(each.laddr))}")
            elif each.status == psutil.CONN_LISTEN:
                host = f"[{each.laddr.ip}]" if each.family == socket.AF_INET6 else each.laddr.ip
                found.add(f"tcp:{host}:{each.laddr.port}")
    return frozenset(found)


def _sockets_of(process: Any) -> Iterable[Any]:
    """Return the sockets of a psutil.Process.  Raises psutil.Error and OSError."""
    listed = getattr(process, "net_connections", None) or process.connections  # psutil < 6
    return cast("Iterable[Any]", listed("all"))


def _advice(pids: Iterable[int], listens: Callable[[Any], bool]) -> str:
    """Return which process has an address, and what to do; "" if no process can be named.

    pids: processes that have the address; the first that runs, and may be read, is named.
    listens: returns True for a socket that listens on the address.
    """
    for pid in pids:
        if protector and _is_of_protector(pid):
            which = _OURS if pid == protector else f"its process {pid}"
            return f"{which} has it: leave it out, and add it when the old workers have exited"
        holder, program = _holder_to_name(pid, listens)
        called = f"process {holder} ({program})"
        if program == "systemd":
            # For a .socket unit, perhaps another service's, or in a stopped unit's store.
            return (
                f"{called} has it for a unit: if that is this service's .socket unit, listen on "
                "the unit's address; otherwise stop the unit, or choose another address"
            )
        if program == _OURS and not protector:
            hint = "if that is this instance, use `socketprotectorctl diff`; otherwise"
            return f"{called} has it: {hint} stop it, or choose another address"
        if program and _is_left_worker(holder):
            return (
                f"{called} has it: if a killed {_OURS} left this worker, end it by TERM; otherwise "
                "choose another address"
            )
        if program:
            return f"{called} has it: stop that program, or choose another address"
    return ""


def _is_of_protector(pid: int) -> bool:
    """Return True if a process is the protector, or a descendant of the protector."""
    return any(each.pid == protector for each, _ in _with_ancestors(pid))


def _with_ancestors(pid: int) -> Iterator[tuple[Any, str]]:
    """Yield a process and its ancestors with their names, as far as they may be read."""
    import psutil

    with suppress(psutil.Error, OSError):  # with `hidepid=1` other users' processes
        each: Any = psutil.Process(pid)
        while each:
            yield each, each.name()
            each = each.parent()


def _holder_to_name(pid: int, listens: Callable[[Any], bool]) -> tuple[int, str]:
    """Return the pid and program of a process, or of its outermost ancestor that has the socket.

    If an operator stopped a child, its parent would replace the child, and the address would still
    be in use.  So the master of a server is named, and the protector of a worker.  A guard would
    replace a protector, so the guard is named, but not systemd, which may store their sockets.
    The program is "" if the process has ended, or may not be read.
    """
    named = (pid, "")
    for each, name in _with_ancestors(pid):
        is_ours = name == _OURS
        may_be_named = is_ours or named[1] != _OURS
        if each.pid == pid or (may_be_named and _may_listen(each, listens, unread=is_ours)):
            named = (each.pid, name)
    return named if _runs(named[0]) else (pid, "")


def _is_left_worker(pid: int) -> bool:
    """Return True if a process may be the worker of a protector that is gone.

    It may also be a helper that such a worker has detached, or its protector may be hidden.
    """
    import psutil

    with suppress(psutil.Error, OSError):
        if wire.ENV_RETURN in psutil.Process(pid).environ():
            return all(name != _OURS for _, name in _with_ancestors(pid))
    return False


def _runs(pid: int) -> bool:
    """Return False if a process has ended, also if its parent has not noticed that yet."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return True


def _may_listen(process: Any, listens: Callable[[Any], bool], *, unread: bool) -> bool:
    """Return True if a process has such a socket; `unread` if we may not read its sockets.

    A worker may also have bound the address itself; then its protector does not have it.
    """
    import psutil

    try:
        return any(map(listens, _sockets_of(process)))
    except psutil.AccessDenied:
        return unread
    except (psutil.Error, OSError):
        return False


def of_path(path: str) -> str:
    """Return, for an error, which process listens on a UNIX socket or @name, and what to do."""

    def listens(each: Any) -> bool:
        return each.family == socket.AF_UNIX and path_of(str(each.laddr)) == path

    pid = _peer("\0" + path[1:] if path.startswith("@") else path)
    if pid and not _runs(pid):  # the program was killed; its children have it
        pid = _holder(listens)
    return _advice([pid] if pid else [], listens) or _UNKNOWN


def _holder(listens: Callable[[Any], bool]) -> int | None:
    """Return the pid of a process with such a UNIX socket; None if unknown."""
    import psutil

    with suppress(psutil.Error, OSError):  # there is no /proc, or we may not read it
        for each in psutil.net_connections("unix"):
            if each.pid and listens(each):
                return each.pid
    return None


def _peer(address: str) -> int | None:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            probe.connect(address)
            found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return None
    pid, _, _ = _CREDENTIALS.unpack(found)
    return int(pid)
