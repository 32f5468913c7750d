"""Processes that a worker which never served has left behind: found and ended.

A program that detaches itself, or that fails with children of its own, would go on living
with its port and its files while the start is reported as failed.  What it has started
carries its notify address, which is random and its own, in the environment.

Source: proc(5), pidfd_send_signal(2).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable

from . import privileges, proc
from .log import Log
from .loop import Loop
from .settings import Identity

#: How often to look for what was started while one looked.
_LOOKS = 10
#: A killed process is gone at once, unless the system is busy with it.
_DEATH_S = 1.0
#: How soon to look again where there was no descriptor to look with.
_LOOK_AGAIN_S = 1.0
_ANCILLARY = socket.CMSG_LEN(4)


class Strays:
    """Ends what failed workers leave: by TERM, and by KILL what takes too long."""

    def __init__(
        self, loop: Loop, log: Log, kill_timeout_s: float, identity: Identity | None
    ) -> None:
        """identity: the user whom the workers run as, if not ours."""
        self._identity = identity
        self._loop = loop
        self._log = log
        self._kill_timeout_s = kill_timeout_s
        self._left: dict[str, float] = {}  # notify address -> when KILL is due
        self._blind = False  # and has said so

    @property
    def left(self) -> tuple[str, ...]:
        """The addresses of those that have been told to end, and still have time."""
        return tuple(self._left)

    def end(self, address: str) -> None:
        """End whatever has this notify address in its environment."""
        try:
            found = self._signal(address, signal.SIGTERM)
        except OSError as error:
            self._look_later(address, error, lambda: self.end(address))
            return
        if not found:
            return
        self._left[address] = time.monotonic() + self._kill_timeout_s
        self._loop.call_after(address, self._kill_timeout_s, lambda: self._kill(address))

    def close(self) -> None:
        """Wait for their end, at most the time they have; nothing of them is left then."""
        for address, due in list(self._left.items()):
            try:
                for _, pidfd in self._find(address):
                    _wait(pidfd, max(0.0, due - time.monotonic()))
                    os.close(pidfd)
            except OSError:
                pass  # and what the next look says goes to the log
            self._loop.cancel(address)
            self._kill(address)

    def _kill(self, address: str) -> None:
        self._left.pop(address, None)
        try:
            for _ in range(_LOOKS):
                if not self._signal(address, signal.SIGKILL, wait_s=_DEATH_S):
                    return
        except OSError as error:
            self._look_later(address, error, lambda: self._kill(address))

    def _look_later(self, address: str, error: OSError, again: Callable[[], None]) -> None:
        """Out of descriptors or memory: whoever is left behind will still be there."""
        self._log.write("error", "cannot-look", error=error.strerror)
        self._left.setdefault(address, time.monotonic() + self._kill_timeout_s)
        self._loop.call_after(address, _LOOK_AGAIN_S, again)

    def _signal(self, address: str, number: signal.Signals, wait_s: float = 0.0) -> bool:
        """Signal them, and wait for each; say whether there were any."""
        found = self._find(address)
        for pid, pidfd in found:
            try:
                signal.pidfd_send_signal(pidfd, number)
                self._log.write("warning", "left-behind", pid=pid, signal=number.name)
                _wait(pidfd, wait_s)
            except (ProcessLookupError, PermissionError):
                pass  # ended, or become another user's, who must end it
            os.close(pidfd)
        return bool(found)

    def _find(self, address: str) -> list[tuple[int, int]]:
        if not proc.is_ours():
            if not self._blind:
                hint = "what a failed worker has detached from itself is not found"
                self._log.write("warning", "cannot-look", error=proc.MISSING, hint=hint)
            self._blind = True
            return []
        if self._identity is None:
            return _carrying(address)
        return _carrying_as(self._identity, address)


def _carrying_as(identity: Identity, address: str) -> list[tuple[int, int]]:
    """Do the same as _carrying(), as another user: its environments are closed to us.

    So nothing is found that is not that user's, though we may signal everybody.
    """
    receive, send = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        child = os.fork()
        if child == 0:
            try:
                privileges.hand_over(identity)
                for pid, pidfd in _carrying(address):
                    socket.send_fds(send, [b"%d" % pid], [pidfd])
            finally:
                os._exit(0)
    except BaseException:
        receive.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        send.close()
    found = []
    with receive:
        while True:
            data, control, _, _ = receive.recvmsg(32, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            if not data:
                break
            for _, _, content in control:  # none, where we are out of descriptors
                found.append((int(data), int.from_bytes(content[:4], sys.byteorder)))
    os.waitpid(child, 0)
    return found


def _carrying(address: str) -> list[tuple[int, int]]:
    """Return (pid, pidfd) of each process with this address; the caller closes the pidfds."""
    known: set[int] = set()
    for _ in range(_LOOKS):
        found, ended = _look(f"NOTIFY_SOCKET={address}".encode())
        if found or ended <= known:
            return found
        # One that has just ended may have left a child which this look came too early for.
        known |= ended
    return []


def _look(wanted: bytes) -> tuple[list[tuple[int, int]], set[int]]:
    """Return those that have `wanted` in their environment, and the pids of those just ended.

    One that is about to end has no environment any more, as a thread of the kernel has none.
    """
    found: list[tuple[int, int]] = []
    ended = set()
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        try:
            # First the pidfd: what is read then is of this process or of none.
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            ended.add(pid)
            continue
        except OSError:
            for _, each in found:
                os.close(each)
            raise
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read()
        except (ProcessLookupError, FileNotFoundError):
            environment = b""
        except PermissionError:
            environment = b"another user's"
        except OSError:
            for _, each in (*found, (pid, pidfd)):
                os.close(each)
            raise
        if _wait(pidfd, 0.0) or not environment:
            ended.add(pid)
        elif wanted in environment.split(b"\0"):
            found.append((pid, pidfd))
            continue
        os.close(pidfd)
    return found, ended


def _wait(pidfd: int, seconds: float) -> bool:
    """Wait for a process's end; say whether it has come."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
