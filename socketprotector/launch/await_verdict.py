"""Waits in the launching process for the verdict of the first start.

The first line of JSON comes from the process that becomes the resident process, while it still has
our user.  Only this line is trusted: it has the process's pid, and the files that this start has
made (begin()).  The resident process sends the other lines (daemon/start_report.py).  Any process
of its user can take its end of the connection, and send lines in its name: they can only mislead
the operator about this start.

The connection stays open until a generation is serving or the process exits.  INT, TERM and QUIT
cancel the start.  So does a kill of the launching process, because the resident process then reads
end of file.

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
from collections.abc import Sequence
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
#: The longest line that is kept.
_LONGEST_BYTES = 1 << 20
#: The exit statuses of a failed start.
_STATUSES = range(1, 126)
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
    first: dict[str, Any] | None = None  # the first message
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
            if resident in ready:
                break  # a process that took the other end keeps it open
            continue
        data = b""
        with suppress(ConnectionResetError):  # the resident process was killed with unread data
            data = line.recv(65536)
        if not data:
            break
        *messages, rest = (rest + data).split(b"\n")
        rest = rest if len(rest) <= _LONGEST_BYTES else b""
        for message in map(_parsed, messages):
            if first is None:
                first = message
                resident = _watch(message.get("pid"), poll)
                for notice in message.get("notices", ()):
                    tell(escape(notice))
            if waits := _waits(message.get("waits_for")):
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
    for path, identity in (first or {}).get("made", {}).items():
        _remove(path, identity)
    if cancelled:
        tell("interrupted; nothing was started")
        return _INTERRUPTED
    if "failed" in verdict:
        tell("\n".join(map(escape, str(verdict["failed"]).split("\n"))))
        status = verdict.get("status")
        if isinstance(status, int) and status in _STATUSES:
            return status
        return SystemRefused.status
    tell(f"the protector was killed before a generation was serving; see {escape(log)}")
    return SystemRefused.status


def begin(line: int, made: Sequence[str], notices: Sequence[str]) -> None:
    """Send the first message: from the process that executes the resident process.

    made: the files that this start has made.  If the start fails, the launching process removes
    them, because the resident process may be killed, or have no permission.
    """
    identities = {path: file_identity(path) for path in made}
    say(line, pid=os.getpid(), made=identities, notices=notices)


def say(line: int, **words: object) -> None:
    """Send a message to the launching process.  Raises OSError."""
    os.write(line, json.dumps(words).encode() + b"\n")


def _parsed(line: bytes) -> dict[str, Any]:
    """Return a message; an empty one if the line is not ours."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _waits(found: object) -> list[Wait]:
    """Return what the start waits for; nothing if the value is not ours."""
    try:
        return [
            Wait(each["kind"], int(each["generation"] or 0), str(each["reason"]), each["left_s"])
            for each in found  # type: ignore[attr-defined]
            if isinstance(each["left_s"], int | float | None)
        ]
    except (TypeError, ValueError, LookupError):
        return []


def _watch(pid: object, poll: select.poll) -> int:
    """Watch a process; return its pidfd, -1 if there is no such process."""
    with suppress(ProcessLookupError):  # the process has ended meanwhile
        if isinstance(pid, int):
            found = os.pidfd_open(pid)
            poll.register(found, select.POLLIN)
            return found
    return -1


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
