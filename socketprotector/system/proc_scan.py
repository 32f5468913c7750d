"""One scan of /proc for processes by the notify addresses in their environment.

A child process scans /proc for all addresses at once: there may be thousands of processes, and a
process with locked memory (a page on a dead disk) blocks the reader of its environment.  The child
sends a pidfd of each process that it finds.

Source: proc(5).
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from ..model.settings import Identity
from ..model.text import in_units
from . import privileges
from .cleanup import on_error
from .loop import Loop
from .polling import events_of
from .spawn import fork

#: The limit of passes over /proc for processes that were started during a pass.
_MOST_PASSES = 10
_ANCILLARY = socket.CMSG_LEN(4)  # CMSG_SPACE of one int has room for two
_FLAGS = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
#: The longest message: an address and a pid, or why the scan failed.
_MESSAGE_BYTES = 256
_CANNOT = b"!"
_LIMIT = "orphans-look"

#: Notify address -> (pid, pidfd) of each process that has it.
Found = Mapping[str, Sequence[tuple[int, int]]]


def close(found: Found) -> None:
    """Close the pidfds of the processes that a scan has found."""
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
        limit_s: float,
        done: Callable[[Collection[str], Found, str], None],
    ) -> None:
        """Begin the scan, and call `done` once.  Raises OSError.

        identity: the user to scan as, if not ours: other users' environments cannot be read.
        limit_s: a scan that takes longer is stuck, and is killed.
        done: called with the addresses, the processes found, and the reason if the scan is
        incomplete; it then owns the pidfds.
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
        hangs = f"the scan of /proc took longer than {in_units(limit_s)}"
        loop.call_after(_LIMIT, limit_s, lambda: self._end(hangs))

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
        close(self._found)


def _send_found(line: socket.socket, wanted: tuple[str, ...], identity: Identity | None) -> None:
    """Scan, in the child, and send each process found with its pidfd, then an end marker."""
    os.setpgid(0, 0)  # so that a signal to our group does not end it
    # `privileges` is a late module: load it while its memfd is still open.
    become_worker_user = privileges.become_worker_user
    why, above = "", line.fileno() + 1
    try:
        # A long scan must not keep a connection or a channel open.
        os.closerange(0, line.fileno())
        # Without close_range(2), as with musl, closerange() would try all numbers up to the limit,
        # which may be a billion.
        for fd in map(int, os.listdir("/proc/self/fd")):
            os.closerange(max(fd, above), fd + 1)
        # Change the name, so that pkill by the protector's name does not find this process.  After
        # a drop of privileges the file belongs to root, and the name stays.
        with suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write("sp-orphans")
        if identity is not None:
            become_worker_user(identity)
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
    for _ in range(_MOST_PASSES):
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
            # Open the pidfd first: it shows below whether the pid was reused in between.
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
