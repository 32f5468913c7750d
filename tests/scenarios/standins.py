"""Tiny servers under the names of known ones: each takes its socket in that one's way only.

    standins.py NAME [ARG...]

Answers `[pid] line` to the first line of each connection.  tests/scenarios/test_moving.py
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType


def by_number(arguments: list[str]) -> int:
    """The number behind --fd."""
    return int(arguments[arguments.index("--fd") + 1])


def by_listen_fds(_: list[str]) -> int:
    """sd_listen_fds(3), which wants the process itself to be meant."""
    assert os.environ["LISTEN_PID"] == str(os.getpid())
    assert int(os.environ["LISTEN_FDS"]) >= 1
    return 3


def by_einhorn(_: list[str]) -> int:
    """einhorn's, which says whose child the worker has to be."""
    assert os.environ["EINHORN_MASTER_PID"] == str(os.getppid())
    assert os.environ["EINHORN_FD_COUNT"] == "1"
    return int(os.environ["EINHORN_FD_0"])


def by_nginx(_: list[str]) -> int:
    """nginx' list, each number of which ends in a semicolon."""
    numbers, end = os.environ["NGINX"].split(";")
    assert not end
    return int(numbers)


def by_place(_: list[str]) -> int:
    """`bind fd@3` in a configuration."""
    return 3


def ready() -> None:
    """Say READY=1, as those do that know systemd."""
    address = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)


def acknowledge() -> None:
    """Say einhorn's ACK."""
    line = json.dumps({"command": "worker:ack", "pid": os.getpid()}) + "\n"
    with socket.socket(fileno=int(os.environ["EINHORN_SOCK_FD"])) as master:
        master.sendall(line.encode())


def nothing() -> None:
    """Those that say nothing are taken for ready after a second."""


#: Name: how it finds its socket, how it says that it is ready, what ends it gently.
Server = tuple[Callable[[list[str]], int], Callable[[], None], signal.Signals]
SERVERS: dict[str, Server] = {
    "chaussette": (by_number, nothing, signal.SIGTERM),
    "haproxy": (by_place, nothing, signal.SIGUSR1),
    "nginx": (by_nginx, nothing, signal.SIGQUIT),
    "uwsgi": (by_listen_fds, ready, signal.SIGHUP),
    "worker": (by_einhorn, acknowledge, signal.SIGUSR2),
}


def answer(connection: socket.socket) -> None:
    with connection, connection.makefile("rb") as lines:
        connection.sendall(b"[%d] %s" % (os.getpid(), lines.readline()))


def listen(name: str, arguments: list[str]) -> None:
    """Accept until it is told to end, and finish what was accepted."""
    find, say, end = SERVERS[name]
    listener = socket.socket(fileno=find(arguments))
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(end, noted)
    say()
    while True:
        select.select([listener.fileno(), read], [], [])
        # Another process may be quicker, and the socket's flags are not ours to change: the
        # signal has to get us out of accept().
        signal.signal(end, leave)
        if select.select([read], [], [], 0)[0]:
            return
        connection, _ = listener.accept()
        signal.signal(end, noted)
        answer(connection)


def noted(number: int, frame: FrameType | None) -> None:
    """The pipe tells."""


def leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def take() -> None:
    """A daemon that gets accepted connections: docs/protocol.md."""
    channel = socket.socket(fileno=int(os.environ["SOCKETPROTECTOR_CHANNEL"]))
    ready()
    while True:
        header, control, _, _ = channel.recvmsg(16, socket.CMSG_LEN(4))
        if not header:
            return
        answer(socket.socket(fileno=int.from_bytes(control[0][2], sys.byteorder)))


def main() -> None:
    name, *arguments = sys.argv[1:]
    if name in SERVERS:
        listen(name, arguments)
    elif name == "ported-daemon":
        take()
    else:  # handler, wrapper: a program for each connection
        print(f"[{os.getpid()}] {sys.stdin.readline()}", end="", flush=True)


main()
