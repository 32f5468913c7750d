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
    """Wait, tell the terminal what went wrong, and return the exit status.

    log: where the resident process writes.
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
            with suppress(OSError):  # it has closed its end, and said why before
                line.shutdown(socket.SHUT_WR)  # it reads end of file, and stops
        if line.fileno() not in ready:
            continue
        data = b""
        with suppress(ConnectionResetError):  # killed with something unread
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
            with suppress(OSError):  # it has ended, or has not sent its pid
                # Both crossed: it serves, but was called off.
                signal.pidfd_send_signal(resident, signal.SIGINT)
            break
    if resident >= 0:  # it is not our child
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
    """Return by what a file is known to be the same one still.  Raises OSError."""
    found = os.lstat(path)
    # A number is used again, but not with its time.  A folder's changes with what is in it.
    changed = 0 if stat.S_ISDIR(found.st_mode) else found.st_ctime_ns
    return [found.st_dev, found.st_ino, changed]


def _remove(path: str, known: list[int]) -> None:
    """Remove what a start has made, that has failed, unless it has, or it is another's by now."""
    with suppress(OSError), locked(path):  # it has; or the folder is not ours
        if known_by(path) == known:
            (os.unlink if known[-1] else os.rmdir)(path)


def _is_too_late(wake_up: int) -> bool:
    """Let no signal count from now on: the exit status must be true.  Say whether one had come."""
    for number in _CALLS_OFF:
        # Ignored, because Python would put its own handlers back to "die of it" at its end.
        signal.signal(number, signal.SIG_IGN)
    return bool(events_of(wake_up, select.POLLIN))
