"""Finds and ends processes that failed workers have left behind, and workers without a record.

A program may detach itself, or fail while its children run.  It would keep its port and files
although the start is reported as failed.  Its processes have the worker's notify address, which is
random and unique, in their environment.  process_groups.py ends the processes in the worker's
group; this module ends the processes that have left the group.

If SocketProtector is killed between the start of a worker and the record of it, the worker may
already serve clients.  The next program can find it only here, and lets it finish.

A child process scans /proc for all addresses at once: there may be thousands of processes, and a
process with locked memory (a page on a dead disk) blocks the reader of its environment.  The child
sends a pidfd of each process that it finds.

Source: proc(5), pidfd_send_signal(2), close_range(2).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from ..model.settings import Identity
from ..model.text import in_units
from . import privileges, procfs
from .cleanup import on_error
from .log import Log
from .loop import Loop
from .polling import events_of
from .spawn import fork

#: The limit of scans for processes that were started during a scan, and of rounds of KILL.
_MOST_SCANS = 10
#: The time until the next scan, which checks that signalled processes are gone.
_DEATH_S = 0.2
#: The time until the next scan for a worker that finishes its clients: a share of the time since
#: the order, at most the second figure.
_FINISH_SHARE, _LAST_SCAN_S = 0.1, 10.0
#: The time until the next scan if a scan has failed.
_SCAN_AGAIN_S = 1.0
#: The limit of a scan.  A scan that takes longer is stuck, and is killed.
_SCAN_S = 30.0
_ANCILLARY = socket.CMSG_LEN(4)  # CMSG_SPACE of one int has room for two
_FLAGS = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
#: The longest message: an address and a pid, or why the scan failed.
_MESSAGE_BYTES = 256
_CANNOT = b"!"
_TIMER, _TIMER_END, _LIMIT = "orphans", "orphans-end", "orphans-look"

#: Notify address -> (pid, pidfd) of each process that has it.
Found = Mapping[str, Sequence[tuple[int, int]]]


class Orphans:
    """Ends the processes that failed workers leave, by TERM and KILL; lets lost workers finish."""

    def __init__(
        self,
        loop: Loop,
        log: Log,
        kill_timeout_s: float,
        identity: Identity | None,
        is_group_watched: Callable[[int], bool],
    ) -> None:
        """Make it without addresses; end() adds them.

        identity: the user that the workers run as, if not ours.
        is_group_watched: returns whether process_groups.py watches a process group.
        """
        self._is_group_watched = is_group_watched
        self._identity = identity
        self._loop = loop
        self._log = log
        self._kill_timeout_s = kill_timeout_s
        #: Notify address -> when KILL is due; None before the first scan.
        self._left: dict[str, float | None] = {}
        #: Notify address -> since when its processes finish; kill() limits their time.
        self._finishing: dict[str, float] = {}
        self._kills: dict[str, int] = {}  # rounds of KILL, by address
        #: Notify address -> called when its processes are gone.
        self._gone: dict[str, Callable[[], None]] = {}
        self._scan: Scan | None = None
        self._ended: Callable[[], None] | None = None  # called when all processes have ended
        self._blind = False  # /proc is unusable, and that was logged
        self._trouble = ""  # why the last scan failed

    @property
    def left(self) -> tuple[str, ...]:
        """The addresses to scan for, now or when KILL is due."""
        return tuple(self._left)

    @property
    def found(self) -> bool:
        """Whether a scan has found processes, which were sent TERM."""
        return any(due is not None for due in self._left.values())

    def end(self, address: str, gone: Callable[[], None] | None = None) -> None:
        """End the processes that have this notify address in their environment.

        gone: called when no such process is left.
        """
        self._left.setdefault(address, None)
        if gone is not None:
            self._gone[address] = gone
        self._scan_after(0.0)

    def finish(self, address: str, gone: Callable[[], None]) -> None:
        """Order the processes that have this address to finish: as end(), but without a KILL.

        These processes may serve clients; kill() limits their time.
        """
        self._finishing[address] = time.monotonic()
        self.end(address, gone)

    def kill(self, addresses: Collection[str]) -> None:
        """Kill the processes that finish() was given by these addresses."""
        for address in self._finishing.keys() & addresses:
            del self._finishing[address]
            self._left[address] = time.monotonic()
            self._scan_after(0.0)

    def when_ended(self, done: Callable[[], None]) -> None:
        """Call back, perhaps at once, when all processes have ended or the limit has passed."""
        self._ended = done
        self._loop.call_after(_TIMER_END, self._kill_timeout_s + _SCAN_S, self._stop_waiting)
        self.schedule()

    def _stop_waiting(self) -> None:
        self.stop_looking()
        self._loop.cancel(_TIMER)
        self._left.clear()
        self.schedule()

    def stop_looking(self) -> None:
        """Stop the current scan.  The program that replaces this program begins a new scan."""
        if self._scan is not None:
            self._scan.call_off()
            self._scan = None

    def _scan_after(self, seconds: float) -> None:
        if self._scan is None:
            self._loop.call_after(_TIMER, seconds, self._begin)

    def _begin(self) -> None:
        """Scan for all addresses, also for addresses added since the timer was set."""
        if not procfs.is_ours():
            if not self._blind:
                hint = "processes that failed workers have detached are not found"
                self._log.write("warning", "cannot-examine", error=procfs.MISSING, hint=hint)
            self._blind = True
            self._scanned(tuple(self._left), {}, "")
            return
        try:
            self._scan = Scan(self._loop, tuple(self._left), self._identity, self._scanned)
        except OSError as error:
            self._cannot_scan(error.strerror or str(error))

    def _cannot_scan(self, why: str) -> None:
        """Scan again later, because descriptors or memory are lacking."""
        if why != self._trouble:  # write it once, not each second
            self._log.write("error", "cannot-examine", error=why)
        self._trouble = why
        self._scan_after(_SCAN_AGAIN_S)

    def _scanned(self, wanted: Collection[str], found: Found, why: str) -> None:
        """Signal the processes found and close their pidfds.  why: the scan was incomplete."""
        self._scan = None
        now = time.monotonic()
        for address, each in found.items():
            due = self._left.get(address)
            if due is None:
                self._left[address] = now + self._kill_timeout_s
                self._signal(each, signal.SIGTERM)
            elif due <= now and address not in self._finishing:
                self._kills[address] = self._kills.get(address, 0) + 1
                self._signal(each, signal.SIGKILL)
        _close(found)
        if why:
            self._cannot_scan(why)
            return
        self._trouble = ""
        done = [a for a in wanted if a not in found or self._kills.get(a, 0) >= _MOST_SCANS]
        for address in done:
            self._left.pop(address, None)
            self._finishing.pop(address, None)
            self._kills.pop(address, None)
        self.schedule()
        for address in done:
            if gone := self._gone.pop(address, None):
                gone()

    def schedule(self) -> None:
        """Schedule the next scan, or report the end when no address is left."""
        if self._left:
            self._scan_after(min(self._delay_s(*each) for each in self._left.items()))
        elif self._ended is not None:
            self._loop.cancel(_TIMER_END)
            done, self._ended = self._ended, None
            done()

    def _delay_s(self, address: str, due: float | None) -> float:
        """Return the seconds until the next scan for an address."""
        now = time.monotonic()
        if due is None:
            return 0.0
        if address in self._finishing and self._ended is None:  # perhaps for hours
            return min(
                max((now - self._finishing[address]) * _FINISH_SHARE, _DEATH_S), _LAST_SCAN_S
            )
        if address in self._gone or self._ended is not None:
            return _DEATH_S
        return max(due - now, _DEATH_S)

    def _signal(self, found: Sequence[tuple[int, int]], number: signal.Signals) -> None:
        for pid, pidfd in found:
            # On failure the process has ended or changed its user.
            with suppress(ProcessLookupError, PermissionError):
                if self._is_group_watched(os.getpgid(pid)):
                    continue  # a program may treat a second TERM differently
                signal.pidfd_send_signal(pidfd, number)
                self._log.write("warning", "left-behind", pid=pid, signal=number.name)


def _close(found: Found) -> None:
    for each in found.values():
        for _, pidfd in each:
            os.close(pidfd)


class Scan:
    """One scan of /proc, in a child process, for all processes with one of these addresses."""

    def __init__(
        self,
        loop: Loop,
        wanted: tuple[str, ...],
        identity: Identity | None,
        done: Callable[[Collection[str], Found, str], None],
    ) -> None:
        """Begin the scan, and call `done` once.  Raises OSError.

        identity: the user to scan as, if not ours: other users' environments cannot be read.
        done: called with the addresses, the processes found, whose pidfds it owns, and the reason
        if the scan is incomplete.
        """
        self._loop = loop
        self._wanted = wanted
        self._done = done
        self._found: dict[str, list[tuple[int, int]]] = {}
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = self._line.fileno()
        with theirs, on_error(self._line.close), on_error(loop.unwatch, fd):
            loop.watch(fd, self._receive)
            self._process = fork(lambda: _send_found(theirs, wanted, identity))
        hangs = f"the scan of /proc took longer than {in_units(_SCAN_S)}"
        loop.call_after(_LIMIT, _SCAN_S, lambda: self._end(hangs))

    def _receive(self) -> None:
        """Receive the processes found so far; the last message ends the scan."""
        while True:
            try:
                data, control, flags, _ = self._line.recvmsg(_MESSAGE_BYTES, _ANCILLARY, _FLAGS)
            except BlockingIOError:
                return
            except OSError as error:
                self._end(error.strerror or str(error))
                return
            fds = [int.from_bytes(each[2][:4], sys.byteorder) for each in control]
            if not data or data[:1] == _CANNOT:
                self._end(data[1:].decode() if data else "the scan of /proc ended early")
                return
            address, _, pid = data.decode().rpartition(" ")
            for fd in fds:
                self._found.setdefault(address, []).append((int(pid), fd))
            if flags & socket.MSG_CTRUNC:
                self._end("out of file descriptors")
                return

    def _end(self, why: str) -> None:
        self._release()
        self._done(self._wanted, self._found, why)

    def _release(self) -> None:
        self._loop.cancel(_LIMIT)
        self._loop.unwatch(self._line.fileno())
        self._line.close()
        self._process.discard()

    def call_off(self) -> None:
        """End the scan without a result."""
        self._release()
        _close(self._found)


def _send_found(line: socket.socket, wanted: tuple[str, ...], identity: Identity | None) -> None:
    """Scan, in the child, and send each process found with its pidfd, then an end marker."""
    os.setpgid(0, 0)  # so that a signal to our group does not end it
    hand_over = privileges.hand_over  # a late module: loaded while its memfd is still open
    # A long scan must not keep a connection or a channel open.
    os.closerange(0, line.fileno())
    os.closerange(line.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    why = ""
    try:
        # Change the name, so that pkill by the protector's name does not find this process.  After
        # a drop of privileges the file belongs to root, and the name stays.
        with suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write("sp-orphans")
        if identity is not None:
            hand_over(identity)
        # This child may wait for room.
        for address, pid, pidfd in _with_address(wanted):
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", pidfd))
            line.sendmsg([f"{address} {pid}".encode()], [rights])
    except OSError as error:
        why = error.strerror or str(error)
    line.send(_CANNOT + why.encode()[: _MESSAGE_BYTES - 1])


def _with_address(wanted: Collection[str]) -> list[tuple[str, int, int]]:
    """Return (address, pid, pidfd) of each process with such an address; the caller owns them."""
    variables = {f"NOTIFY_SOCKET={each}".encode(): each for each in wanted}
    known: set[int] = set()
    found: list[tuple[str, int, int]] = []
    for _ in range(_MOST_SCANS):
        more, ended = _scan_once(variables)
        fresh = {pid for _, pid, _ in more} - {pid for _, pid, _ in found}
        for _, _, pidfd in found:
            os.close(pidfd)
        found = more
        if not fresh and ended <= known:
            break
        # A process that has just ended may have left a child that this scan missed.
        known |= ended
    return found


def _scan_once(wanted: Mapping[bytes, str]) -> tuple[list[tuple[str, int, int]], set[int]]:
    """Return the processes with such a variable, and the pids of processes that just ended.

    An ending process has no environment any more; a kernel thread never has one.
    """
    found: list[tuple[str, int, int]] = []
    ended = set()
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        try:
            # Open the pidfd first: so the environment cannot be another process's with this pid.
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            ended.add(pid)
            continue
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read()
        except (ProcessLookupError, FileNotFoundError):
            environment = b""
        except PermissionError:
            environment = b"another user's"
        address = next((wanted[each] for each in environment.split(b"\0") if each in wanted), None)
        if events_of(pidfd, select.POLLIN) or not environment:
            ended.add(pid)
        elif address is not None:
            found.append((address, pid, pidfd))
            continue
        os.close(pidfd)
    return found, ended
