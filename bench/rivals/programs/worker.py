"""A web server of one process and one loop, for supervisors of any program.

    worker.py [--fork N] SOURCE     SOURCE: fd:N, starter (Server::Starter), library (ours),
                                    retiring:N (ours, see below) or listen:HOST:PORT

It answers `PID RELEASE pong`, keeps a connection if the client asks for that, and drains at
TERM: it accepts no more, and ends each kept connection with the answer to its next request.
--fork N: a parent with N such processes, which it restarts, as Perl's prefork servers do.
retiring:N: fd:N that also drains at the end of its RETURN line
(docs/protocol.md, "READY and other messages").
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time

from bench.rivals.programs.release import release
from bench.worker import SOURCES, say_ready

#: Longest time of a drain: an idle client does not hold an old worker for longer.
DRAIN_S = 5.0
BURST = 16
_RETIRES = b"\nX_SOCKETPROTECTOR_RETIRE=1"


class Server:
    """Owns what it accepts from and every connection."""

    def __init__(self, mode: str, code: int, said: str, *, retires: bool = False) -> None:
        self._source, self._take = SOURCES[mode]()
        self._poll = select.epoll()
        self._poll.register(self._source, select.EPOLLIN)
        self._kept: dict[int, socket.socket] = {}
        self._until_s = 0.0  # when a drain ends; 0: it serves
        self._body = f"{os.getpid()} {said}".encode()
        reason = "OK" if code == 200 else "Internal Server Error"
        self._head = f"{code} {reason}\r\nContent-Length: {len(self._body)}\r\n".encode()
        # A signal ends the wait of the loop.
        self._wake, write = socket.socketpair()
        self._wake.setblocking(False)
        write.setblocking(False)
        self._poll.register(self._wake.fileno(), select.EPOLLIN)
        self._return = int(os.environ["SOCKETPROTECTOR_RETURN"]) if retires else -1
        if retires:
            self._poll.register(self._return, select.EPOLLIN)
        signal.set_wakeup_fd(write.detach())
        signal.signal(signal.SIGTERM, lambda *_: self._drain())

    def _drain(self) -> None:
        if not self._until_s:
            self._until_s = time.monotonic() + DRAIN_S
            self._poll.unregister(self._source)

    def run(self) -> None:
        """Serve until the drain is over."""
        say_ready(_RETIRES if self._return >= 0 else b"")
        while not self._until_s or self._kept:
            left_s = self._until_s - time.monotonic() if self._until_s else -1
            if self._until_s and left_s <= 0:
                return
            for fd, _ in self._poll.poll(left_s):
                if fd == self._wake.fileno():
                    self._wake.recv(64)
                elif fd == self._return:
                    self._poll.unregister(fd)
                    self._drain()
                elif fd != self._source:
                    self._answer(fd, self._kept[fd])
                elif not self._until_s:
                    self._accept()

    def _accept(self) -> None:
        for _ in range(BURST):
            try:
                taken = self._take()
            except EOFError:
                self._drain()
                return
            if taken is None:
                return
            connection = taken[0]
            connection.setblocking(False)
            self._kept[connection.fileno()] = connection
            self._poll.register(connection.fileno(), select.EPOLLIN)
            self._answer(connection.fileno(), connection)

    def _answer(self, fd: int, connection: socket.socket) -> None:
        try:
            request = connection.recv(4096)
            stays = request.startswith(b"GET / HTTP/1.1") and b"onnection: close" not in request
            stays = stays and not self._until_s
            if request:
                said = b"keep-alive" if stays else b"close"
                connection.send(
                    b"HTTP/1.1 %bConnection: %b\r\n\r\n%b" % (self._head, said, self._body)
                )
        except BlockingIOError:
            return
        except OSError:
            stays = False
        if not stays:
            del self._kept[fd]
            # Under ours the supervisor's copy may live a moment longer than this one.
            self._poll.unregister(fd)
            connection.close()


def prefork(count: int) -> None:
    """Fork so many processes, and return in each; the caller's process never returns."""
    children: set[int] = set()
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for pid in children:
            os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    while not stopping:
        while len(children) < count and not stopping:
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                return
            children.add(pid)
        children.discard(os.wait()[0])
    while children:
        children.discard(os.wait()[0])
    os._exit(0)


def main() -> None:
    *fork, source = sys.argv[1:]
    processes = int(fork[1]) if fork else 0
    if source.startswith(("fd:", "retiring:")):
        os.environ["BENCH_LISTENER"] = source.partition(":")[2]
    elif source == "starter":
        os.environ["BENCH_LISTENER"] = os.environ["SERVER_STARTER_PORT"].rpartition("=")[2]
    elif source.startswith("listen:"):
        host, _, port = source.removeprefix("listen:").rpartition(":")
        listener = socket.create_server((host, int(port)), backlog=4096)
        os.environ["BENCH_LISTENER"] = str(listener.detach())
    code, said = release()
    if processes:
        prefork(processes)
    mode = "library" if source == "library" else "direct"
    Server(mode, code, said, retires=source.startswith("retiring:")).run()


if __name__ == "__main__":
    main()
