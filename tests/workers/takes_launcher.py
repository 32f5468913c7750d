"""A worker that takes the protector's connection to the launching process, and lies on it.

Arguments: what it does then, and the lie.  Before READY=1 it sends the lie, and:

kill: kills the protector, and keeps the connection open.
flood: kills the protector, and repeats the lie until the launching process has ended.
hang-up: ends the protector's side of the connection, and is then ready.
ready: is ready, and keeps the connection open.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from contextlib import suppress

SYS_PIDFD_GETFD = 438
libc = ctypes.CDLL(None, use_errno=True)


def taken(pid: int) -> socket.socket:
    """Return the connected socket of a process whose peer is root's."""
    pidfd = os.pidfd_open(pid)
    for number in map(int, os.listdir(f"/proc/{pid}/fd")):
        fd = libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            continue
        try:
            found = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            continue
        if found.family == socket.AF_UNIX and found.type != socket.SOCK_DGRAM:
            peer = found.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if int.from_bytes(peer[4:8], sys.byteorder) == 0 and not listens:
                return found
        found.detach()
    raise SystemExit("there is no such socket")


then, lie = sys.argv[1], sys.argv[2].encode()
protector = os.getppid()
line = taken(protector)
line.send(lie)
if then in ("hang-up", "ready"):
    if then == "hang-up":
        line.shutdown(socket.SHUT_WR)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    signal.pause()  # until TERM
os.kill(protector, signal.SIGKILL)
with suppress(OSError):  # the launching process has ended
    while then == "flood":
        line.send(lie)
    while line.recv(64):  # the connection stays open until the launching process has ended
        pass
