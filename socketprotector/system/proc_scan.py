"""One scan of /proc for strangers: processes that are left to us, and that we did not start.

We, or the guard, are the parent of each process whose own parent has ended (PR_SET_CHILD_SUBREAPER
of prctl(2)).  No process can escape that, whatever it does with its session, its process group or
its environment.  A stranger's descendants are strangers, too.

A child process scans, as the workers' user.  There may be thousands of processes, and a process
with locked memory (a page on a dead disk) blocks the reader of its environment.

Source: proc(5).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from ..model.lazy_dataclass import frozen
from ..model.settings import Identity
from ..model.text import in_units
from . import privileges, procfs
from .cleanup import on_error
from .loop import Loop
from .procfs import Stat
from .spawn import fork

#: The limit of passes over /proc for processes that were started during a pass.
_MOST_PASSES = 10
_READ_BYTES = 65_536
_LIMIT = "leftovers-scan"
_INIT = 1


@frozen
class Family:
    """Where the strangers are: below which processes, and which processes are none."""

    reaper: int  # this process gets the children of ended processes: we, or the guard
    #: Whether a service manager got such children while no protector ran.
    with_manager: bool
    known: frozenset[int]  # these processes are ours, and so are their descendants
    groups: frozenset[int]  # nor are the members of these process groups strangers
    addresses: tuple[str, ...] = ()  # report which process has which of these notify addresses


@frozen
class Stranger:
    """A process that we did not start."""

    pid: int
    start: int  # see process.boot_ticks()
    leads: bool  # it leads a session, as each worker does
    address: str  # its notify address, if that is in Family.addresses
    sockets: frozenset[int] | None  # the inodes of its sockets; None: they cannot be read

    def open(self) -> int:
        """Return a pidfd.  Raises OSError; ProcessLookupError if the process is gone."""
        pidfd = os.pidfd_open(self.pid)
        with on_error(os.close, pidfd):
            stat = procfs.stat_of(self.pid)
            if stat is None or stat.start != self.start:
                raise ProcessLookupError
        return pidfd


#: Called with the strangers, and the reason if the scan is incomplete.
Done = Callable[[list[Stranger], str], None]


class Scan:
    """One scan of /proc, in a child process."""

    def __init__(
        self, loop: Loop, family: Family, identity: Identity | None, limit_s: float, done: Done
    ) -> None:
        """Begin the scan, and call `done` once.  Raises OSError.

        identity: the user to scan as, if not ours: other users' descriptors cannot be read.
        limit_s: a scan that takes longer is stuck, and is killed.
        """
        self._loop, self._done = loop, done
        self._text = b""
        self._pipe, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        protector = os.getpid()
        try:
            with on_error(os.close, self._pipe), on_error(loop.unwatch, self._pipe):
                loop.watch(self._pipe, self._receive)
                self._process = fork(lambda: _report(theirs, protector, family, identity))
        finally:
            os.close(theirs)
        hangs = f"the scan of /proc took longer than {in_units(limit_s)}"
        loop.call_after(_LIMIT, limit_s, lambda: self._end([], hangs))

    def _receive(self) -> None:
        """Read the child's report, which ends with an empty line or with the reason."""
        with suppress(BlockingIOError):
            while data := os.read(self._pipe, _READ_BYTES):
                self._text += data
            *lines, why = self._text.decode("utf-8", "replace").split("\n")
            complete = bool(lines) and not lines[-1]
            self._end(
                [_read(each) for each in lines if each],
                "" if complete else why or "the scan of /proc ended early",
            )

    def _end(self, found: list[Stranger], why: str) -> None:
        self.call_off()
        self._done(found, why)

    def call_off(self) -> None:
        """End the scan without a result."""
        self._loop.cancel(_LIMIT)
        self._loop.unwatch(self._pipe)
        os.close(self._pipe)
        self._process.discard()


def _read(line: str) -> Stranger:
    pid, start, leads, sockets, address = line.split(" ", 4)
    inodes = None if sockets == "?" else frozenset(map(int, filter(None, sockets.split(","))))
    return Stranger(int(pid), int(start), leads == "1", address, inodes)


def _line_of(each: Stranger) -> str:
    sockets = "?" if each.sockets is None else ",".join(map(str, each.sockets))
    return f"{each.pid} {each.start} {each.leads:d} {sockets} {each.address}\n"


def _report(pipe: int, protector: int, family: Family, identity: Identity | None) -> None:
    """Scan, in the child, and write each stranger to the pipe; then an empty line, or an error."""
    os.setpgid(0, 0)  # so that a signal to our group does not end it
    # These are late modules: load them while their memfd is still open.
    become_worker_user, _ = privileges.become_worker_user, procfs.stat_of
    try:
        # A long scan must not keep a connection or a channel open.
        os.closerange(0, pipe)
        # Without close_range(2), as with musl, closerange() would try all numbers up to the limit,
        # which may be a billion.
        for fd in map(int, os.listdir("/proc/self/fd")):
            os.closerange(max(fd, pipe + 1), fd + 1)
        # Change the name, so that pkill by the protector's name does not find this process.  After
        # a drop of privileges the file belongs to root, and the name stays.
        with suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write("sp-leftovers")
        if identity is not None:
            become_worker_user(identity)
        data = "".join(map(_line_of, strangers(protector, family))).encode() + b"\n"
    except OSError as error:
        data = (error.strerror or str(error)).encode()
    os.set_blocking(pipe, True)  # this child may wait for room
    while data:
        data = data[os.write(pipe, data) :]


def strangers(protector: int, family: Family) -> list[Stranger]:
    """Return all strangers.  Raises OSError.

    A process may start another and end while we look, so look until nothing has changed.
    """
    found: dict[tuple[int, int], Stranger] = {}
    for _ in range(_MOST_PASSES):
        before, found = found.keys(), {}
        for each in _scan_once(protector, family):
            found[each.pid, each.start] = each
        if found.keys() == before:
            break
    return [*found.values()]


def _scan_once(protector: int, family: Family) -> Iterator[Stranger]:
    stats: dict[int, Stat] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := procfs.stat_of(name)) is not None:
            stats[int(name)] = stat
    known = {os.getpid(), protector, *family.known, *_above(protector, stats)}
    adopters = {family.reaper}
    own_unit = ""
    if family.with_manager:
        own_unit = _unit_of(protector)
        adopters |= {_INIT, stats[protector].parent if protector in stats else _INIT}

    def is_left(pid: int) -> bool:
        """Return whether a process, or one from which it descends, has lost its parent."""
        while pid in stats and pid not in known:
            parent = stats[pid].parent
            if parent in adopters and (parent == family.reaper or _unit_of(pid) == own_unit):
                return True
            pid = parent
        return False

    for pid, stat in stats.items():
        if stat.group not in family.groups and is_left(pid):
            sockets = _sockets_of(pid)
            if sockets or stat.state not in procfs.ENDED:
                address = _address_of(pid, family.addresses)
                yield Stranger(pid, stat.start, stat.session == pid, address, sockets)


def _above(pid: int, stats: Mapping[int, Stat]) -> set[int]:
    """Return a process's parent, the parent's parent, and so on."""
    found = set[int]()
    while pid in stats and pid not in found:
        pid = stats[pid].parent
        found.add(pid)
    return found


def _unit_of(pid: int) -> str:
    """Return a process's control groups; each unit of systemd has its own."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _sockets_of(pid: int) -> frozenset[int] | None:
    """Return the inodes of a process's sockets; None if they cannot be read.

    A thread may have descriptors of its own (unshare(2), CLONE_FILES).
    """
    found = set[int]()
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                found.update(inode for _, inode in procfs.sockets(f"{pid}/task/{thread}"))
    except PermissionError:
        return None
    except OSError:
        pass  # the process has just ended
    return frozenset(found)


def _address_of(pid: int, addresses: tuple[str, ...]) -> str:
    """Return which of these notify addresses is in a process's environment; "": none."""
    if not addresses:
        return ""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read().split(b"\0")
    except OSError:
        return ""
    found = (each for each in addresses if f"NOTIFY_SOCKET={each}".encode() in environment)
    return next(found, "")
