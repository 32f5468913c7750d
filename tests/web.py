"""HTTP clients that tell each failure apart: one connection, and threads that ask all the time.

Nothing is retried.  A request fails if its answer is not a whole `200 OK` with a pid in it.
"""

from __future__ import annotations

import os
import random
import select
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field

from tests.load import GAP_S
from tests.running import DEADLINE_S

#: Host and port, or the path of a UNIX socket.
Address = tuple[str, int] | str


class Connection:
    """One that stays open for as long as both sides want."""

    def __init__(self, address: Address) -> None:
        if isinstance(address, str):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(DEADLINE_S)
            self._socket.connect(address)
        else:
            self._socket = socket.create_connection(address, DEADLINE_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        self.closing = False  # the answer said that it is the last one

    def send(self, path: str = "/", *, last: bool = False) -> None:
        """Send a request; last: and ask for the connection's end behind the answer."""
        end = "Connection: close\r\n" if last else ""
        self.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{end}\r\n".encode())

    def write(self, part: bytes) -> None:
        """Send a part of a request."""
        self._socket.sendall(part)

    def answer(self) -> int:
        """Return the pid of the worker that answers.  Raises OSError, EOFError or ValueError."""
        status = self._file.readline()
        if not status:
            raise EOFError("no answer")
        if not status.startswith(b"HTTP/1.1 200"):
            raise ValueError(f"answered {status!r}")
        headers = {}
        while line := self._line().strip().lower():
            name, _, value = line.partition(b":")
            headers[name] = value.strip()
        if b"content-length" in headers:
            body = self._bytes(int(headers[b"content-length"]))
        elif headers.get(b"transfer-encoding") == b"chunked":
            body = self._chunks()
        else:
            body = self._line()
        self.closing = headers.get(b"connection") == b"close"
        return int(body)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._line(), 16):
            body += self._bytes(size)
            self._line()
        self._line()
        return body

    def _line(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError("cut")
        return line

    def _bytes(self, count: int) -> bytes:
        found = self._file.read(count)
        if len(found) < count:
            raise EOFError("cut")
        return found

    def ask(self, path: str = "/", *, last: bool = False) -> int:
        """Send a request, and return the pid of the worker that answers."""
        self.send(path, last=last)
        return self.answer()

    def at_end(self) -> bool:
        """Wait for what comes next; return whether it is the end."""
        return self._file.read(1) == b""

    def ended(self, within_s: float = DEADLINE_S) -> bool:
        """Whether the server ends it within a time, without a word: a reset is an end, too."""
        if not select.select([self._socket], [], [], within_s)[0]:
            return False
        try:
            return self.at_end()
        except OSError:
            return True

    @property
    def port(self) -> int:
        """The client's."""
        return int(self._socket.getsockname()[1])

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask_once(address: Address) -> int:
    """Ask on a connection of its own, and want its end after the answer."""
    with Connection(address) as client:
        pid = client.ask(last=True)
        assert client.at_end(), "more than one answer"
        return pid


def worker_of(pid: int) -> int:
    """The worker that a process belongs to: it leads a session of its own."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return pid  # gone since


def kind_of(error: Exception) -> str:
    """Name a failure by what a client sees."""
    if isinstance(error, EOFError):
        return f"end of file, {error}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return f"{type(error).__name__}: {error}"


@dataclass
class Seen:
    """What one kind of client has seen."""

    answers: Counter[int] = field(default_factory=Counter)  # by pid
    workers: set[int] = field(default_factory=set)  # the workers that these belong to
    failures: Counter[str] = field(default_factory=Counter)  # by kind
    ends: int = 0  # connections that a server ended after an answer, nothing being under way


class Traffic:
    """Threads that ask, each on a connection for each request or on one that it keeps."""

    def __init__(
        self,
        address: Address,
        *,
        kept: bool = False,
        clients: int = 4,
        pause_s: float = GAP_S,
        late_s: float = 0.0,
    ) -> None:
        """kept: each client keeps its connection for as long as the server does.

        pause_s: of each client between its requests.  late_s: and up to so long, at random, from
        each connection to its first request.
        """
        self.seen = Seen()
        self._address, self._kept, self._pause_s = address, kept, pause_s
        self._late_s = late_s
        self._stopping = threading.Event()
        self._news = threading.Condition()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Traffic:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for each in self._threads:
            each.join()

    def wait_for(self, worker: int) -> None:
        """Wait until a worker has answered: itself, or a process that it has started."""
        with self._news:
            answered = self._news.wait_for(lambda: worker in self.seen.workers, DEADLINE_S)
        assert answered, f"{worker} never answered: {self.seen}"

    def wait_for_answers(self, more: int) -> None:
        """Wait until so many more requests are answered, or one has failed."""
        with self._news:
            wanted = self.seen.answers.total() + more
            assert self._news.wait_for(
                lambda: self.seen.answers.total() >= wanted or self.seen.failures, DEADLINE_S
            )

    def _run(self) -> None:
        connection: Connection | None = None
        while not self._stopping.is_set():
            try:
                if connection is None:
                    connection = Connection(self._address)
                    self._stopping.wait(random.uniform(0, self._late_s))
                pid = connection.ask(last=not self._kept)
                if not self._kept and not connection.at_end():
                    raise ValueError("more than one answer")
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
        with self._news:
            if failure:
                self.seen.failures[failure] += 1
            else:
                if pid not in self.seen.answers:
                    self.seen.workers.add(worker_of(pid))
                self.seen.answers[pid] += 1
                self.seen.ends += ended
            self._news.notify_all()
