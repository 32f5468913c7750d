"""HTTP clients that count each failure: one request a connection, or many on one (keep-alive).

Nothing is retried.  A request fails if its answer is not a whole `200 OK` with a pid in it.
"""

from __future__ import annotations

import os
import random
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.running import Protector

#: How long an application takes for an answer, so that requests are under way when the signal
#: comes.
WAIT_S = "0.005"
#: Of each client between its requests: enough of them for one to come at the wrong moment.
PAUSE_S = 0.02

#: A fact of the machine, not of a server: an answer takes milliseconds.
PATIENCE_S = 20.0
_REPLY = re.compile(
    rb"HTTP/1\.1 200 [A-Z]*\r\n(?P<head>.*?)\r\n\r\n"
    rb"(?:[0-9a-f]+\r\n)?(?P<pid>\d+)\n(?:\r\n0\r\n\r\n)?",  # in chunks, or not
    re.DOTALL,
)


@dataclass
class Seen:
    """What one kind of client has seen."""

    answers: Counter[int] = field(default_factory=Counter)  # by pid
    workers: set[int] = field(default_factory=set)  # the workers that these belong to
    failures: Counter[str] = field(default_factory=Counter)  # by kind
    ends: int = 0  # connections that a server ended after an answer, nothing being under way

    @property
    def answered(self) -> int:
        return self.answers.total()


class Connection:
    """One client's connection."""

    def __init__(self, port: int, patience_s: float = PATIENCE_S) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), patience_s)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.closing = False  # the answer said that it is the last one

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def ask(self, *, last: bool = False) -> None:
        """Send a request; last: and ask for the connection's end behind the answer."""
        self.send(request(last=last))

    def answer(self) -> int:
        """Return the pid of who answers.  Raises OSError, EOFError or ValueError."""
        got = b""
        while (found := _REPLY.fullmatch(got)) is None:
            data = self._sock.recv(65536)
            if not data:
                raise EOFError("cut" if got else "no answer")
            got += data
            if not b"HTTP/1.1 200".startswith(got[:12]):
                raise ValueError(repr(got[:60]))
        self.closing = b"connection: close" in found["head"].lower()
        return int(found["pid"])

    def ended(self, within_s: float) -> bool:
        """Whether the server ends it within a time, without a word."""
        self._sock.settimeout(within_s)
        try:
            return not self._sock.recv(1)
        except TimeoutError:
            return False
        except OSError:
            return True
        finally:
            self._sock.settimeout(PATIENCE_S)

    @property
    def port(self) -> int:
        """The client's."""
        return int(self._sock.getsockname()[1])

    def close(self) -> None:
        self._sock.close()


def is_accepted(server_port: int, client_port: int) -> bool:
    """Whether a process has taken a connection from the backlog: until then it has no inode."""
    wanted = f":{server_port:04X}", f":{client_port:04X}"
    with open("/proc/net/tcp", encoding="ascii") as table:
        for line in table:
            _, local, remote, *rest = line.split()
            if local.endswith(wanted[0]) and remote.endswith(wanted[1]):
                return rest[6] != "0"
    return False


def worker_of(pid: int) -> int:
    """The worker that a process belongs to: it leads a session of its own."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return pid  # gone since


def request(*, last: bool = False) -> bytes:
    end = "Connection: close\r\n" if last else ""
    return f"GET / HTTP/1.1\r\nHost: localhost\r\n{end}\r\n".encode()


def kind_of(error: Exception) -> str:
    """Name a failure by what a client sees."""
    if isinstance(error, EOFError):
        return f"end of file, {error}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return f"{type(error).__name__}: {error}"


class Traffic:
    """Threads that ask, from start() to stop()."""

    def __init__(
        self,
        port: int,
        *,
        kept: bool = False,
        clients: int = 4,
        pause_s: float = 0.0,
        late_s: float = 0.0,
    ) -> None:
        """kept: each client keeps its connection for as long as the server does.

        pause_s: of each client between its requests.  late_s: and up to so long, at random, from
        each connection to its first request.
        """
        self.seen = Seen()
        self._port, self._kept, self._pause_s = port, kept, pause_s
        self._late_s = late_s
        self._stopping = threading.Event()
        self._lock = threading.Condition()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Traffic:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Seen:
        self._stopping.set()
        for each in self._threads:
            each.join()
        return self.seen

    def wait_for(self, worker: int) -> None:
        """Wait until a worker has answered: itself, or a process that it has started."""
        until = time.monotonic() + PATIENCE_S
        with self._lock:
            while worker not in self.seen.workers:
                left_s = until - time.monotonic()
                assert left_s > 0, f"{worker} never answered: {self.seen}"
                self._lock.wait(left_s)

    def _run(self) -> None:
        connection: Connection | None = None
        while not self._stopping.is_set():
            try:
                if connection is None:
                    connection = Connection(self._port)
                    self._stopping.wait(random.uniform(0, self._late_s))
                connection.ask(last=not self._kept)
                pid = connection.answer()
            except (OSError, EOFError, ValueError) as error:
                self._note(failure=kind_of(error))
            else:
                ended = self._kept and (connection.closing or connection.ended(self._pause_s))
                self._note(pid, ended=ended)
                if self._kept and not ended:
                    continue
                if not self._kept:
                    self._stopping.wait(self._pause_s)
            if connection is not None:
                connection.close()
            connection = None
        if connection is not None:
            connection.close()

    def _note(self, pid: int = 0, *, failure: str = "", ended: bool = False) -> None:
        with self._lock:
            if failure:
                self.seen.failures[failure] += 1
            else:
                if pid not in self.seen.answers:
                    self.seen.workers.add(worker_of(pid))
                self.seen.answers[pid] += 1
                self.seen.ends += ended
            self._lock.notify_all()


def newest(protector: Protector) -> int:
    """The worker that was started last."""
    found = re.findall(r"event=spawned .*\bpid=(\d+)", protector.log.text())
    return int(found[-1])
