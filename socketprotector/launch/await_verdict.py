"""The launching process waits for the verdict of the first start.

It reads JSON lines from the resident process (daemon/start_report.py), which keeps its end open
until it has exited or serves.  Ctrl-C and TERM call the start off; so does killing this process,
by the end of file.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
from typing import Any

from ..model.errors import SystemRefused
from ..system import signals
from ..system.dir_lock import locked
from ..system.terminal import tell

_INTERRUPTED = 130
_CALLS_OFF = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


def wait(line: socket.socket) -> int:
    """Wait, tell the terminal what went wrong, and return the exit status.

    Takes ownership of the line; to be called with signals blocked, which it unblocks.
    """
    receive = signals.catch(_CALLS_OFF)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

    poll = select.poll()
    poll.register(line, select.POLLIN)
    poll.register(receive, select.POLLIN)
    called_off = False
    resident = -1  # its pidfd
    verdict: dict[str, Any] = {}
    rest = b""
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if receive in ready and not called_off:
            called_off = True
            poll.unregister(receive)
            _hang_up(line)
        if line.fileno() not in ready:
            continue
        data = _read(line)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for words in map(json.loads, lines):
            if "notice" in words:
                tell(words["notice"])
            if "pid" in words:
                resident = _pidfd(words["pid"])
            verdict.update(words)
        if verdict.get("ready"):
            called_off = _is_too_late(receive) or called_off
            if not called_off:
                return 0
            _stop(resident)  # both crossed: it serves, but was called off
            break
    _wait_for_end(resident)
    for path, known in verdict.get("made", {}).items():
        _remove(path, known)
    if called_off:
        tell("interrupted; nothing was started")
        return _INTERRUPTED
    if "failed" in verdict:
        tell(verdict["failed"])
        return int(verdict["status"])
    tell("the protector was killed before anything served; look at the log")
    return SystemRefused.status


def known_by(path: str) -> list[int]:
    """Return by what a file is known to be the same one still.  Raises OSError."""
    found = os.lstat(path)
    # A number is used again, but not with its time.  A folder's changes with what is in it.
    changed = 0 if stat.S_ISDIR(found.st_mode) else found.st_ctime_ns
    return [found.st_dev, found.st_ino, changed]


def _remove(path: str, known: list[int]) -> None:
    """Remove what a start has made, that has failed, unless it has, or it is another's by now."""
    try:
        with locked(path):
            if known_by(path) == known:
                (os.unlink if known[-1] else os.rmdir)(path)
    except OSError:
        pass  # it has; or the folder is not ours


def _is_too_late(wake_up: int) -> bool:
    """Let no signal count from now on: the exit status must be true.  Say whether one had come."""
    for number in _CALLS_OFF:
        # Ignored, because Python would put its own handlers back to "die of it" at its end.
        signal.signal(number, signal.SIG_IGN)
    poll = select.poll()
    poll.register(wake_up, select.POLLIN)
    return bool(poll.poll(0))


def _stop(pidfd: int) -> None:
    if pidfd >= 0:
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGINT)
        except ProcessLookupError:
            pass  # it has ended by itself


def _hang_up(line: socket.socket) -> None:
    """Let the other side see end of file: then it stops."""
    try:
        line.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it has closed its end, and said why before


def _read(line: socket.socket) -> bytes:
    try:
        return line.recv(65536)
    except ConnectionResetError:
        return b""  # killed with something unread


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1  # it has ended meanwhile


def _wait_for_end(pidfd: int) -> None:
    """Wait until a process that is not our child has ended."""
    if pidfd >= 0:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
