"""What /proc says of processes and sockets.  Every test asks here.

Of a process that is gone the files raise FileNotFoundError or ProcessLookupError (GONE), unless a
function says what it returns then.  Source: proc(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

GONE = (FileNotFoundError, ProcessLookupError)
_LISTENS = "0A"
_T = TypeVar("_T")

# -- processes -----------------------------------------------------------------


def _stat(pid: int) -> list[str]:
    """The fields of stat from the state on, which is the third: the name may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()


def state_of(pid: int) -> str:
    """R, S, T, Z, ...; empty when there is no such process."""
    try:
        return _stat(pid)[0]
    except GONE:
        return ""


def parent_of(pid: int) -> int:
    """The parent of a process, 0 when it is gone (or a zombie)."""
    try:
        state, parent = _stat(pid)[:2]
    except GONE:
        return 0
    return 0 if state == "Z" else int(parent)


def in_sessions(leaders: Collection[int]) -> list[int]:
    """The processes in the sessions of these workers."""

    def session(pid: int) -> int:
        try:
            return os.getsid(pid)
        except ProcessLookupError:
            return 0

    pids = [int(each) for each in os.listdir("/proc") if each.isdigit()]
    return [pid for pid in pids if session(pid) in leaders]


def terminal_of(pid: int) -> int:
    """The number of its controlling terminal, 0 without one."""
    return int(_stat(pid)[4])


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    user, system = _stat(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def children_of(pid: int, thread: int = 0) -> list[int]:
    """The living and unreaped children of a process's first thread, or of another one."""
    text = Path(f"/proc/{pid}/task/{thread or pid}/children").read_text(encoding="ascii")
    return [int(word) for word in text.split()]


def status_of(pid: int, thread: int = 0) -> dict[str, str]:
    """The lines of status by their names, of the process or of one of its threads."""
    file = Path(f"/proc/{pid}/task/{thread or pid}/status")
    lines = (line.partition(":") for line in file.read_text(encoding="ascii").splitlines())
    return {name: value.strip() for name, _, value in lines}


def threads_of(pid: int) -> list[int]:
    return [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]


def sleeps_in(pid: int) -> list[str]:
    """Where in the kernel each thread of a process sleeps."""
    return [*_of_threads(pid, lambda of, each: Path(f"/proc/{of}/task/{each}/wchan").read_text())]


def _of_threads(pid: int, read: Callable[[int, int], _T]) -> Iterator[_T]:
    """What is read of each thread of a process but those that end meanwhile."""
    for thread in threads_of(pid):
        try:
            yield read(pid, thread)
        except GONE:
            continue


def sleeps(pid: int, looks: int = 20) -> bool:
    """Whether all threads of a process sleep, at each of some looks: one that spins does not."""
    try:
        states = [
            status_of(pid, thread)["State"] for _ in range(looks) for thread in threads_of(pid)
        ]
    except GONE:
        return False  # a thread has ended just now
    return all(state.startswith("S") for state in states)


def wake_ups(pid: int) -> int:
    """How often the threads of a process went to sleep by themselves so far."""
    return sum(int(each["voluntary_ctxt_switches"]) for each in _of_threads(pid, status_of))


def memory_kib(pid: int) -> int:
    """What a process keeps in memory for itself."""
    return int(status_of(pid)["RssAnon"].split()[0])


def name_of(pid: int) -> str:
    """The name of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").rstrip("\n")
    except GONE:
        return ""


def command_line_of(pid: int) -> str:
    """The words of a process's command line, empty when it is gone or a zombie."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except GONE:
        return ""
    return words.replace(b"\0", b" ").decode()


def running(program: str, pids: Iterable[int]) -> list[int]:
    """Those of the processes in whose command lines this is found."""
    return [pid for pid in pids if program in command_line_of(pid)]


def environment_of(pid: int) -> dict[str, str]:
    """What a process began with.  Empty where it was forked and has not executed anything yet.

    Raises PermissionError, too, where it is another user's, and while it ends.
    """
    text = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "surrogateescape")
    return dict(each.split("=", 1) for each in text.split("\0") if "=" in each)


# -- descriptors ---------------------------------------------------------------


def descriptors(pid: int) -> dict[int, str]:
    """Number and target of each descriptor of a process."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue  # it has just closed it
    return found


def kinds_of(*pids: int) -> dict[str, int]:
    """How many descriptors of each kind these processes have: sockets, pipes, pidfds, ..."""
    counted: dict[str, int] = {}
    for pid in pids:
        for target in descriptors(pid).values():
            kind = re.sub(r":\[\d+\]$", "", target)
            counted[kind] = counted.get(kind, 0) + 1
    return counted


def watched_by(pid: int) -> dict[int, int]:
    """The descriptors in the epoll sets of a process, and which events are waited for."""
    infos = []
    for file in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # the process has closed it since it was listed
            infos.append(file.read_text())
    rows = re.findall(r"^tfd: +(\d+) events: +([0-9a-f]+)", "".join(infos), re.MULTILINE)
    return {int(fd): int(events, 16) for fd, events in rows}


# -- TCP sockets ---------------------------------------------------------------


def _tcp(*tables: str, pid: str | int = "self") -> Iterator[list[str]]:
    for table in tables:
        lines = Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()
        yield from (line.split() for line in lines[1:])


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _listening(pid: int) -> dict[str, int]:
    """The listening sockets of a process's network as its descriptors show them; their ports."""
    rows = _tcp("tcp", "tcp6", pid=pid)
    return {f"socket:[{row[9]}]": _port(row[1]) for row in rows if row[3] == _LISTENS}


def listening_descriptors(pid: int) -> list[int]:
    """The descriptors of a process that are listening sockets."""
    listening = _listening(pid)
    return sorted(fd for fd, target in descriptors(pid).items() if target in listening)


def ports_of(pid: int) -> list[int]:
    """The ports that a process listens on, in order, each as often as it has sockets there."""
    held = {*descriptors(pid).values()}
    return sorted(port for target, port in _listening(pid).items() if target in held)


def listening(port: int) -> int:
    """How many sockets listen on a port of IPv4."""
    return sum(_port(row[1]) == port and row[3] == _LISTENS for row in _tcp("tcp"))


def in_backlog(port: int) -> int:
    """How many connections wait in the kernel's backlogs of a listener on 127.0.0.1."""
    rows = (row for row in _tcp("tcp") if _port(row[1]) == port and row[3] == _LISTENS)
    return sum(int(row[4].partition(":")[2], 16) for row in rows)


def is_accepted(server_port: int, client_port: int) -> bool:
    """Whether a process has taken a connection from the backlog: until then it has no inode."""
    ports = (server_port, client_port)
    return any(row[9] != "0" for row in _tcp("tcp") if (_port(row[1]), _port(row[2])) == ports)
