"""Waits in the launching process for the verdict of the first start.

The resident process sends lines of JSON (daemon/start_report.py), and keeps the connection open
until a generation is serving or the process exits.  INT, TERM and QUIT cancel the start.  So does a
kill of the launching process, because the resident process then reads end of file.

During a long start, this prints the same lines as `socketprotectorctl reload`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import time
from contextlib import suppress
from typing import Any

from ..model.errors import SystemRefused
from ..model.text import escape
from ..model.wait_lines import Wait, WaitLines
from ..system import signals
from ..system.dir_lock import locked
from ..system.polling import events_of
from ..system.terminal import tell

_INTERRUPTED = 130
#: How often to request what the start waits for.
_REQUEST_EVERY_MS = 2_000
_CANCELLING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


def wait(line: socket.socket, log: str = "syslog") -> int:
    """Wait for the verdict, print why a start failed, and return the exit status.

    line: the connection to the resident process.
    log: where the resident process writes its log.
    Call this with signals blocked; it unblocks them.
    """
    wake_up = signals.catch(_CANCELLING)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

    poll = select.poll()
    poll.register(line, select.POLLIN)
    poll.register(wake_up, select.POLLIN)
    lines = WaitLines(tell)
    cancelled = False
    resident = -1  # the pidfd of the resident process
    verdict: dict[str, Any] = {}
    rest = b""
    while True:
        ready = [fd for fd, _ in poll.poll(None if cancelled else _REQUEST_EVERY_MS)]
        if not ready:
            with suppress(OSError):  # the resident process has ended, or reads nothing
                line.send(b"?", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            continue
        if wake_up in ready and not cancelled:
            cancelled = True
            poll.unregister(wake_up)
            with suppress(OSError):  # the resident process has sent a reason, and closed its end
                line.shutdown(socket.SHUT_WR)  # the resident process reads end of file, and stops
        if line.fileno() not in ready:
            continue
        data = b""
        with suppress(ConnectionResetError):  # the resident process was killed with unread data
            data = line.recv(65536)
        if not data:
            break
        *messages, rest = (rest + data).split(b"\n")
        for message in map(json.loads, messages):
            if "notice" in message:
                tell(escape(message["notice"]))
            if "pid" in message:
                with suppress(ProcessLookupError):  # the process has ended meanwhile
                    resident = os.pidfd_open(message["pid"])
            if "waits_for" in message:
                waits = [
                    Wait(each["kind"], each["generation"] or 0, each["reason"], each["left_s"])
                    for each in message["waits_for"]
                ]
                lines.show(waits, time.monotonic())
            verdict.update(message)
        if verdict.get("ready"):
            cancelled = _ignore_signals(wake_up) or cancelled
            if not cancelled:
                return 0
            with suppress(OSError):  # the process has ended, or did not send its pid
                # The resident process serves already, but the operator has cancelled the start.
                signal.pidfd_send_signal(resident, signal.SIGINT)
            break
    if resident >= 0:  # the resident process is not our child, so wait for its end by a pidfd
        end = select.poll()
        end.register(resident, select.POLLIN)
        end.poll()
    for path, identity in verdict.get("made", {}).items():
        _remove(path, identity)
    if cancelled:
        tell("interrupted; nothing was started")
        return _INTERRUPTED
    if "failed" in verdict:
        tell(verdict["failed"])
        return int(verdict["status"])
    tell(f"the protector was killed before a generation was serving; see {escape(log)}")
    return SystemRefused.status


def file_identity(path: str) -> list[int]:
    """Return numbers that identify a file as long as it exists.  Raises OSError."""
    found = os.lstat(path)
    # A later file may have the same inode number, but not the same ctime.  For a folder use 0,
    # because a folder's ctime changes with its contents; for a socket use the mtime, because
    # close_control() changes permissions.
    if stat.S_ISSOCK(found.st_mode):
        changed = found.st_mtime_ns
    else:
        changed = 0 if stat.S_ISDIR(found.st_mode) else found.st_ctime_ns
    return [found.st_dev, found.st_ino, changed]


def _remove(path: str, identity: list[int]) -> None:
    """Remove a file or folder of a failed start, unless another program has replaced it."""
    with suppress(OSError), locked(path) as there:  # the file is gone, or the folder is not ours
        if file_identity(there) == identity:
            (os.unlink if identity[-1] else os.rmdir)(there)


def _ignore_signals(wake_up: int) -> bool:
    """Ignore cancelling signals from now on; return True if one has already come.

    If we did not ignore them, a late signal would contradict the exit status.
    """
    for number in _CANCELLING:
        # A handler is not enough: at its exit Python restores the default action, which kills.
        signal.signal(number, signal.SIG_IGN)
    return bool(events_of(wake_up, select.POLLIN))
