"""Waits in the launching process for the verdict of the first start.

It reads JSON lines from the resident process (daemon/start_report.py), which keeps the line open
until it is serving or has exited.  Ctrl-C and TERM cancel the start.  So does killing the launching
process: the resident process then reads end of file.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
from contextlib import suppress
from typing import Any

from ..model.errors import SystemRefused
from ..model.text import escape
from ..system import signals
from ..system.dir_lock import locked
from ..system.polling import events_of
from ..system.terminal import tell

_INTERRUPTED = 130
_CALLS_OFF = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


def wait(line: socket.socket, log: str = "syslog") -> int:
    """Wait for the verdict, print what went wrong, and return the exit status.

    log: where the resident process writes its log.  Takes ownership of the line.
    Call this with signals blocked; it unblocks them.
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
            with suppress(OSError):  # it has closed its end, after sending the reason
                line.shutdown(socket.SHUT_WR)  # the resident process reads end of file, and stops
        if line.fileno() not in ready:
            continue
        data = b""
        with suppress(ConnectionResetError):  # it was killed with unread data
            data = line.recv(65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for words in map(json.loads, lines):
            if "notice" in words:
                tell(escape(words["notice"]))
            if "pid" in words:
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    resident = os.pidfd_open(words["pid"])
            verdict.update(words)
        if verdict.get("ready"):
            called_off = _is_too_late(receive) or called_off
            if not called_off:
                return 0
            with suppress(OSError):  # it has ended, or did not send its pid
                # The resident process serves already, but the operator has cancelled the start.
                signal.pidfd_send_signal(resident, signal.SIGINT)
            break
    if resident >= 0:  # not our child, so wait for its end by its pidfd
        end = select.poll()
        end.register(resident, select.POLLIN)
        end.poll()
    for path, known in verdict.get("made", {}).items():
        _remove(path, known)
    if called_off:
        tell("interrupted; nothing was started")
        return _INTERRUPTED
    if "failed" in verdict:
        tell(verdict["failed"])
        return int(verdict["status"])
    tell(f"the protector was killed before a generation was serving; see {escape(log)}")
    return SystemRefused.status


def known_by(path: str) -> list[int]:
    """Return numbers that identify a file as long as it exists.  Raises OSError."""
    found = os.lstat(path)
    # An inode number may be used again, but with another ctime.  A folder's ctime changes.
    changed = 0 if stat.S_ISDIR(found.st_mode) else found.st_ctime_ns
    return [found.st_dev, found.st_ino, changed]


def _remove(path: str, known: list[int]) -> None:
    """Remove a file or folder of a failed start, unless another program has replaced it."""
    with suppress(OSError), locked(path):  # it is gone, or the folder is not ours
        if known_by(path) == known:
            (os.unlink if known[-1] else os.rmdir)(path)


def _is_too_late(wake_up: int) -> bool:
    """Ignore signals, so that the exit status is true; return whether one came earlier."""
    for number in _CALLS_OFF:
        # Not left caught: at its exit Python restores the default action, which kills.
        signal.signal(number, signal.SIG_IGN)
    return bool(events_of(wake_up, select.POLLIN))
