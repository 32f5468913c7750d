"""Starts the real command for a test, waits for what it says, and sees that nothing is left.

Everything waits for a fact (a log line, an end of file, a process's end) with a deadline.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import uuid
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tests import forked
from tests.procfs import command_line_of, parent_of

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ROOT / "tests" / "workers"
COMMAND = (sys.executable, "-m", "socketprotector")
#: Options with which workers accept; those that are built on tests/workers/plain.py do either.
LISTENER = ("--handoff", "listener", "--ready", "notify")
DEADLINE_S = 30.0

#: Host and port, or the path of a UNIX socket (in bytes or with a 0 in front: an abstract name).
Address = tuple[str, int] | tuple[str, int, int, int] | str | bytes

#: --start-timeout where a good start has to fit into it on a busy machine, and one that hangs is
#: waited for.
FAIR_START_S = 8
#: In the environment of whatever a test starts, so that what it leaves behind is found.  Not
#: SOCKETPROTECTOR_*, which never reaches a worker.
MARK = "TEST_OF_SOCKETPROTECTOR"

#: What a detached start without a log file says first where there is no syslog, as in a container.
_NO_SYSLOG = (
    "SocketProtector: no syslog daemon listens at /dev/log: until one does, every line of the log "
    "and of the workers is lost; use --log-file FILE, or -f to write to this terminal\n"
)


@dataclass
class Ended:
    """A command that has ended: its exit status, and what it has written."""

    status: int
    out: str
    err: str
    #: Whether it has warned that there is no syslog.
    warned: bool = False

    @classmethod
    def of_start(cls, status: int, out: str, err: str) -> Ended:
        """A start, without that warning in `err`: so the machine's state changes no test."""
        return cls(status, out, err.replace(_NO_SYSLOG, "", 1), warned=_NO_SYSLOG in err)

    def __repr__(self) -> str:
        return f"status {self.status}\n--- out\n{self.out}\n--- err\n{self.err}"

    @property
    def lines(self) -> list[str]:
        """What it said on stderr."""
        return self.err.splitlines()


class Lines:
    """What a pipe says, line by line, read by a thread; tests wait for a line.

    Each look takes in first what was written by then, so that what was said before a fact is
    there once the fact is known: the thread may be late.
    """

    def __init__(self, stream: int) -> None:
        """Take ownership of the pipe's end; it is closed at the end of file."""
        self._stream = stream
        self._lines: list[str] = []
        self._rest = b""  # of a line that has no end yet
        self._ended = False
        self._news = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._stream, select.POLLIN)
        while not self._ended:
            [(_, events)] = poll.poll()
            with self._news:
                if not self._take() and not events & select.POLLIN:
                    self._ended = True
                    if self._rest:
                        self._add(self._rest)
                    os.close(self._stream)
                self._news.notify_all()

    def _take(self) -> bool:
        """Take in what was written so far; say whether that was anything."""
        if self._ended:
            return False
        waiting = array("i", [0])
        fcntl.ioctl(self._stream, termios.FIONREAD, waiting)
        left = waiting[0]
        while left > 0:
            data = os.read(self._stream, left)
            left -= len(data)
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                self._add(line)
        return waiting[0] > 0

    def _add(self, line: bytes) -> None:
        self._lines.append(line.decode("utf-8", "replace"))

    @property
    def seen(self) -> list[str]:
        """All lines that were written so far; it grows."""
        with self._news:
            if self._take():
                self._news.notify_all()
            return self._lines

    def wait_for(self, pattern: str, *, after: int = 0, deadline_s: float = DEADLINE_S) -> str:
        """Return the first line, from index `after` on, in which the pattern is found."""
        found = self.look_for(pattern, after=after, within_s=deadline_s)
        assert found is not None, f"no line like {pattern!r} in:\n{self.text()}"
        return found

    def look_for(self, pattern: str, *, after: int = 0, within_s: float) -> str | None:
        """Return that line as soon as it is there; None: it did not come in that time."""
        wanted = re.compile(pattern)
        until = time.monotonic() + within_s
        at = after
        with self._news:
            while True:
                seen = self.seen
                for line in seen[at:]:
                    if wanted.search(line):
                        return line
                at = max(after, len(seen))
                left = until - time.monotonic()
                if self._ended or left <= 0:
                    return None
                self._news.wait(left)

    def count(self, pattern: str) -> int:
        return sum(1 for line in list(self.seen) if re.search(pattern, line))

    def text(self) -> str:
        return "\n".join(self.seen)

    def join(self) -> None:
        self._thread.join(DEADLINE_S)


class Protector:
    """A protector in the foreground with its log at hand."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        through: Sequence[str] = (),
        command: Sequence[str] = COMMAND,
        **more: Any,
    ) -> None:
        """`through`: a command that executes the protector in its place, as nice does.

        more: for Popen.
        """
        receive, send = os.pipe()
        out, out_send = os.pipe()
        self.process = forked.popen(
            [*through, *command, "-f", *arguments],
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": out_send,
                "stderr": send,
                "env": {**os.environ, **environment},
                "start_new_session": True,
                **more,
            },
        )
        os.close(send)
        os.close(out_send)
        self.log = Lines(receive)
        self.out = Lines(out)

    @property
    def pid(self) -> int:
        return self.process.pid

    def ready(self) -> Protector:
        """Wait until the first generation serves."""
        self.log.wait_for(r"event=ready\b")
        return self

    @property
    def addresses(self) -> list[str]:
        """The canonical addresses it listens on, in index order."""
        line = self.log.wait_for(r"event=start\b.* listen=")
        found = re.search(r'listen="?([^"]+)"?', line)
        assert found
        return found[1].split()

    @property
    def port(self) -> int:
        return int(self.addresses[0].rpartition(":")[2])

    def signal(self, number: signal.Signals) -> int:
        """Send a signal; return the log's length before it, to wait from there."""
        mark = len(self.log.seen)
        self.process.send_signal(number)
        return mark

    def reload(self) -> None:
        """Reload, and wait until the new generation serves."""
        mark = self.signal(signal.SIGHUP)
        self.log.wait_for(r"event=(reloading|reload-failed)\b", after=mark)
        # What was said before is of another one: of a protector that was killed as it said so.
        while not re.search(r"event=(reloading|reload-failed)\b", self.log.seen[mark]):
            mark += 1
        line = self.log.wait_for(r"event=(reloaded|reload-failed)\b", after=mark)
        assert "event=reloaded" in line, self.log.text()

    def worker_pids(self) -> list[int]:
        """The processes of the workers that live now."""
        found = []
        for line in list(self.log.seen):
            if match := re.search(r"event=spawned .*\bpid=(\d+)", line):
                pid = int(match[1])
                if parent_of(pid) == self.pid:
                    found.append(pid)
        return found

    def stop(self, *, status: int = 0) -> None:
        """Stop gracefully and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE_S) == status, self.log.text()
        self.log.join()

    def wait(self) -> int:
        """Wait for its end and return the exit status."""
        status = self.process.wait(DEADLINE_S)
        self.log.join()
        return status

    def end(self) -> None:
        """Whatever the test left: end it, and its workers with it."""
        for _ in range(2):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
                try:
                    self.process.wait(DEADLINE_S)
                except subprocess.TimeoutExpired:
                    self.process.kill()
        self.process.wait()


#: By mark: the processes that were there before it.  To read the environment of each one of a
#: machine was most of what a test costs in its own process; no number comes again within a test.
_before: dict[str, set[str]] = {}


def _processes() -> set[str]:
    return {name for name in os.listdir("/proc") if name.isdigit()}


def reserved_port() -> socket.socket:
    """Bind a port of 127.0.0.1 that no other process gets until the socket is closed.

    The socket does not listen.  The kernel gives its port to no process that asks for any port.  A
    process that names the port gets it, because both sides set SO_REUSEADDR.
    """
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", 0))
    return made


def marked(mark: str) -> list[int]:
    """The living processes that carry a test's mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for name in _processes() - _before[mark]:
        try:
            with open(f"/proc/{name}/environ", "rb", buffering=0) as file:
                if wanted in file.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue
    return sorted(found)


def wait_gone(pids: Sequence[int], deadline_s: float = DEADLINE_S) -> list[int]:
    """Wait until processes have ended; return those that live on after the deadline."""
    until = time.monotonic() + deadline_s
    left = []
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            left.append(pid)
        os.close(fd)
    return left


def output_of(*words: str | Path, cwd: str | Path = ROOT, **environment: str) -> str:
    """Run a command that succeeds; return what it has said, on stdout and stderr."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def shared_path(folder: Path) -> Path:
    """Return a path of a UNIX socket so long that the generations have one socket for all."""
    return folder / ("s" * (107 - len(os.fsencode(f"{folder}/"))))


def eventually(fact: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for a fact that nothing announces (a number in /proc), looking ever less often."""
    until = time.monotonic() + deadline_s
    pause_s = 0.001
    while not fact():
        assert time.monotonic() < until, f"never came: {what}"
        select.select([], [], [], pause_s)
        pause_s = min(2 * pause_s, 0.02)


class Client:
    """One connection that talks in lines: what is sent, and what comes back later."""

    #: Those that are not closed, or not collected yet.
    known: ClassVar[weakref.WeakSet[Client]] = weakref.WeakSet()

    def __init__(
        self,
        address: Address,
        line: str | None = None,
        *,
        source: Address | None = None,
        timeout_s: float = DEADLINE_S,
    ) -> None:
        """line: to be sent at once.  source: where it connects from."""
        family = socket.AF_UNIX
        if isinstance(address, tuple):
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(timeout_s)
        self._got = b""
        self.known.add(self)
        try:
            if source is not None:
                self.socket.bind(source)
            self.socket.connect(address)
            if line is not None:
                self.say(line)
        except BaseException:
            self.socket.close()
            raise

    def say(self, line: str) -> None:
        self.socket.sendall(line.encode() + b"\n")

    def hear(self) -> str:
        """Return the next line; what came before the end of file, if that comes first."""
        while b"\n" not in self._got:
            data = self.socket.recv(65536)
            if not data:
                break
            self._got += data
        line, _, self._got = self._got.partition(b"\n")
        return line.decode()

    def ask(self, line: str = "hello") -> str:
        self.say(line)
        return self.hear()

    def rest(self) -> list[str]:
        """Say no more, and return all lines until the end."""
        self.socket.shutdown(socket.SHUT_WR)
        while data := self.socket.recv(65536):
            self._got += data
        return self._got.decode().splitlines()

    def has_answer(self) -> bool:
        return bool(self._got or select.select([self.socket], [], [], 0)[0])

    def reset(self) -> None:
        """Close so that the other side reads a reset."""
        linger_for_no_time = b"\1\0\0\0\0\0\0\0"
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_no_time)
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(address: Address, line: str = "hello", timeout_s: float = DEADLINE_S) -> str:
    """Connect, send a line, return the line that comes back."""
    with Client(address, line, timeout_s=timeout_s) as client:
        return client.hear()


@contextmanager
def mark() -> Iterator[dict[str, str]]:
    """An environment that marks what a test starts; at the end nothing with it may live."""
    value = uuid.uuid4().hex
    _before[value] = _processes()
    yield {MARK: value}
    left = wait_gone(marked(value))
    del _before[value]
    shown = []
    for pid in left:
        try:
            shown.append(command_line_of(pid))
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended after all
    assert not left, f"left behind: {shown}"
