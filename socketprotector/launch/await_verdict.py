"""Waits in the launching process for the verdict of the first start.

The process that becomes the resident process, while it still has our user, writes its pid and the
files that this start has made into a pipe (begin()).  Its exec closes the pipe, so no code of
another user has the pipe.  Only what comes from the pipe is trusted.

The resident process sends its messages over a connection (daemon/start_report.py), each a packet
with a JSON object.  Any process of its user can take its end of the connection, and send packets in
its name.  They can only mislead the operator about this start: this process keeps no more than one
of them, and does not wait longer than the resident process lives.

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
from collections.abc import Mapping, Sequence
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
#: The longest packet.  A longer one is cut, so it is no message.
_LONGEST_BYTES = 1 << 16
#: The longest time that a wait can still last, in seconds.
_LONGEST_S = 1e9
#: The exit statuses of a failed start.
_STATUSES = range(1, 126)
_CANCELLING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


def wait(line: socket.socket, told: int, log: str = "syslog") -> int:
    """Wait for the verdict, print why a start failed, and return the exit status.

    line: the connection to the resident process.
    told: the pipe from the process that becomes the resident process; this function closes it.
    log: where the resident process writes its log.
    Call this with signals blocked; it unblocks them.
    """
    begun: dict[str, Any] = {}
    with open(told, "rb") as pipe:
        for words in pipe:
            begun.update(_parsed(words))
    for notice in begun.get("notices", ()):
        tell(escape(notice))
    wake_up = signals.catch(_CANCELLING)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

    poll = select.poll()
    poll.register(line, select.POLLIN)
    poll.register(wake_up, select.POLLIN)
    resident = -1  # the pidfd of the resident process
    with suppress(KeyError, ProcessLookupError):  # it could not begin, or has ended
        resident = os.pidfd_open(begun["pid"])
        poll.register(resident, select.POLLIN)
    lines = WaitLines(tell)
    cancelled = False
    verdict = begun
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
        if resident in ready:
            with suppress(OSError):  # a process that took the other end can send no more
                line.shutdown(socket.SHUT_RDWR)
        elif line.fileno() not in ready:
            continue
        try:
            data = line.recv(_LONGEST_BYTES)
        except ConnectionResetError:  # killed with unread data; its messages come before the end
            continue
        if not data:
            break
        message = _parsed(data)
        lines.show(_waits(message.get("waits_for")), time.monotonic())
        if "failed" in message:
            verdict = message
        if message.get("ready") is True:
            cancelled = _ignore_signals(wake_up) or cancelled
            if not cancelled:
                return 0
            with suppress(OSError):  # the process has ended
                # The resident process serves already, but the operator has cancelled the start.
                signal.pidfd_send_signal(resident, signal.SIGINT)
            break
    line.close()  # if another process has ended the connection, the resident process stops now
    if resident >= 0:  # the resident process is not our child, so wait for its end by a pidfd
        end = select.poll()
        end.register(resident, select.POLLIN)
        end.poll()
    for path, identity in begun.get("made", {}).items():
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


def begin(told: int, made: Mapping[str, list[int]], notices: Sequence[str]) -> None:
    """Tell the launching process what it needs to know of the process that calls this.

    made: the files that this start has made.  If the start fails, the launching process removes
    them, because the resident process may be killed, or have no permission.
    """
    say(told, pid=os.getpid(), made=made, notices=notices)


def say(told: int, **words: object) -> None:
    """Write words into the pipe to the launching process.  Raises OSError."""
    os.write(told, json.dumps(words).encode() + b"\n")


def _parsed(message: bytes) -> dict[str, Any]:
    """Return the words of a message; none if it is not ours."""
    try:
        found = json.loads(message)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _waits(found: object) -> list[Wait]:
    """Return what the start waits for, without entries that are not ours."""
    waits = []
    for each in found if isinstance(found, list) else ():
        match each:
            case {"kind": str(kind), "reason": str(reason), "left_s": left_s, **others} if (
                left_s is None or (isinstance(left_s, int | float) and abs(left_s) < _LONGEST_S)
            ):
                generation = others.get("generation")
                number = generation if isinstance(generation, int) else 0
                waits.append(Wait(kind, number, reason, left_s))
    return waits


def file_identity(found: os.stat_result) -> list[int]:
    """Return numbers that identify a file as long as it exists.

    found: of the file's descriptor.
    """
    # A later file may have the same inode number, but not the same ctime.  A folder's ctime changes
    # with its contents.
    changed = found.st_ctime_ns if stat.S_ISREG(found.st_mode) else 0
    return [found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode), changed]


def socket_identity(device: int, inode: int) -> list[int]:
    """Return what file_identity() returns for the file of a socket."""
    return [device, inode, stat.S_IFSOCK, 0]


def _remove(path: str, identity: list[int]) -> None:
    """Remove a file or folder of a failed start, unless another program has replaced it."""
    with suppress(OSError), locked(path) as there:  # the file is gone, or the folder is not ours
        found = os.lstat(there)
        if file_identity(found) == identity:
            (os.rmdir if stat.S_ISDIR(found.st_mode) else os.unlink)(there)


def _ignore_signals(wake_up: int) -> bool:
    """Ignore cancelling signals from now on; return True if one has already come.

    If we did not ignore them, a late signal would contradict the exit status.
    """
    for number in _CANCELLING:
        # A handler is not enough: at its exit Python restores the default action, which kills.
        signal.signal(number, signal.SIG_IGN)
    return bool(events_of(wake_up, select.POLLIN))
