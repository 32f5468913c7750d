"""HTTP clients for the tests: one that opens a connection for each request, one that keeps its own.

Written by hand, so that every way to fail is told apart and none is tried again.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import TracebackType

from tests.client.protector import ports_of
from tests.load import GAP_S
from tests.running import DEADLINE_S, ROOT, eventually

PROGRAMS = Path(__file__).parent / "programs"
GUNICORN = (
    *("-m", "gunicorn", "-c", "python:socketprotector_client.gunicorn", "-b", "ADDRESS"),
    *("--no-control-socket", "--worker-tmp-dir", "/dev/shm", "--log-level", "warning"),
    "tests.frameworks.programs.pages:wsgi",
)
PATH = {"PYTHONPATH": f"{ROOT}:{ROOT / 'client_lib'}", "PYTHONWARNINGS": "default"}

Address = tuple[str, int]


class Client:
    """A connection that stays open."""

    def __init__(self, address: Address) -> None:
        self.socket = socket.create_connection(address, DEADLINE_S)
        self._file = self.socket.makefile("rb")

    def send(self, path: str = "/", *, close: bool = False) -> None:
        end = "Connection: close\r\n" if close else ""
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{end}\r\n".encode())

    def read(self) -> tuple[int, bool]:
        """Return who answered, and whether it said that this was its last answer here."""
        status = self._file.readline()
        assert status.startswith(b"HTTP/1.1 200"), f"answered {status!r}"
        headers = {}
        while line := self._file.readline().strip().lower():
            name, _, value = line.partition(b":")
            headers[name] = value.strip()
        if b"content-length" in headers:
            body = self._file.read(int(headers[b"content-length"]))
        else:
            assert headers[b"transfer-encoding"] == b"chunked", headers
            body = b""
            while size := int(self._file.readline(), 16):
                body += self._file.read(size)
                self._file.readline()
            self._file.readline()
        return int(body), headers.get(b"connection") == b"close"

    def ask(self, path: str = "/", *, close: bool = False) -> tuple[int, bool]:
        self.send(path, close=close)
        return self.read()

    def at_end(self) -> bool:
        """Wait for what comes next; return whether it is the end."""
        return self._file.read(1) == b""

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def ask_once(address: Address) -> int:
    """Ask on a connection of its own, and want its end after the answer."""
    with Client(address) as client:
        pid, _ = client.ask(close=True)
        assert client.at_end(), "more than one answer"
        return pid


class Load:
    """Threads that ask all the time, on a connection for each request."""

    def __init__(self, address: Address, threads: int = 4) -> None:
        self._address = address
        self._stopping = threading.Event()
        self._news = threading.Condition()
        self.answers: dict[int, int] = {}
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Load:
        for each in self._threads:
            each.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        for each in self._threads:
            each.join()

    def wait_for(self, more: int) -> None:
        """Wait until so many more are answered."""
        with self._news:
            wanted = sum(self.answers.values()) + more
            assert self._news.wait_for(
                lambda: sum(self.answers.values()) >= wanted or self.failures, DEADLINE_S
            )

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                pid = ask_once(self._address)
            except Exception as error:
                with self._news:
                    self.failures.append(repr(error))
                    self._news.notify_all()
            else:
                with self._news:
                    self.answers[pid] = self.answers.get(pid, 0) + 1
                    self._news.notify_all()
                self._stopping.wait(GAP_S)


def port_of(pid: int) -> int:
    """Wait until it listens, and return on which port."""
    found: list[int] = []

    def listens() -> bool:
        found.extend(ports_of(pid))
        return bool(found)

    eventually(listens, "it listens")
    return found[0]
