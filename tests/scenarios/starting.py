"""Start the real command as an operator does, detached, and look at what it leaves."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import forked, needs
from tests.procfs import command_line_of
from tests.running import COMMAND, DEADLINE_S, MARK, Client, Ended, eventually, marked, wait_gone
from tests.scenarios.tools import worker

MINIMAL = worker("minimal")
#: Answers each connection with what it sees of itself.
TELLS = worker("tells")

Popen = subprocess.Popen[str]


class Start:
    """Runs the command to its end, which is when the first generation serves or has failed."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], options: tuple[str, ...] = ()
    ) -> None:
        """options: in front of those that the command is given."""
        self.folder = folder
        self.options = options
        self.environment = {**os.environ, **environment}
        self.pid_file = folder / "pid"
        self.log_file = folder / "log"

    def popen(
        self,
        *arguments: str | Path,
        before: Sequence[str] = (),
        command: Sequence[str] = COMMAND,
        cwd: Path | str | None = None,
        environment: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Popen:
        """Start the launching process.  `before` are words in front of it, like setpriv."""
        words = [*before, *command, *self.options, *(str(each) for each in arguments)]
        given = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "start_new_session": True,
            **more,
        }
        return forked.popen(
            words,
            text=True,
            cwd=cwd or self.folder,
            env={
                **self.environment,
                "PWD": str(cwd or self.folder),
                **(environment or {}),
            },
            **given,
        )

    def __call__(self, *arguments: str | Path, **more: Any) -> Ended:
        """Run it with the folder's pid file; a detached protector goes on after that."""
        with self.popen("--pid-file", self.pid_file, *arguments, **more) as process:
            try:
                out, err = process.communicate(timeout=DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return Ended.of_start(process.returncode, out or "", err or "")

    def up(self, *arguments: str | Path, **more: Any) -> Ended:
        """Run it, and see that it serves."""
        ended = self("--log-file", self.log_file, *arguments, **more)
        assert ended.status == 0, ended
        return ended

    # -- the protector that runs now -----------------------------------------

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text(encoding="ascii"))

    @property
    def log(self) -> str:
        exists = self.log_file.exists()  # a worker may write any byte
        return self.log_file.read_text(encoding="utf-8", errors="replace") if exists else ""

    @property
    def addresses(self) -> list[str]:
        """The canonical addresses it listens on, in index order."""
        found = re.findall(r'event=start\b.* listen="?([^"\n]+)"?', self.log)
        return str(found[-1]).split()

    @property
    def address(self) -> tuple[str, int]:
        """Of the first listener, a TCP one."""
        return tcp(self.addresses[0])

    def wait_for(self, pattern: str) -> None:
        """Wait for a line in the log file."""
        eventually(lambda: re.search(pattern, self.log) is not None, f"{pattern} in the log")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def reload(self) -> None:
        """Reload, and wait until the new generation serves."""
        before = len(re.findall("event=reloaded", self.log))
        self.send(signal.SIGHUP)
        eventually(lambda: len(re.findall("event=reloaded", self.log)) > before, "a reload")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop it and wait for its end."""
        pid = self.pid
        os.kill(pid, number)
        assert not wait_gone([pid]), self.log

    def left(self) -> list[str]:
        """What there is of it: processes that do not end, and files other than its log."""
        # A detached one says that it has failed before it has ended.
        found = [shown(pid) for pid in wait_gone(marked(self.environment[MARK]))]
        kept = {self.log_file, *(f for f in self.folder.iterdir() if f.suffix in (".py", ".sh"))}
        return found + [str(file) for file in self.folder.iterdir() if file not in kept]

    def end(self) -> None:
        """Whatever the test left."""
        try:
            pid = self.pid
            os.kill(pid, signal.SIGINT)
        except (OSError, ValueError):
            return
        wait_gone([pid])


@contextmanager
def start_of(start: Start, *arguments: str | Path, **more: Any) -> Iterator[Popen]:
    """The launching process while it waits; it has ended when this is left."""
    with start.popen("--pid-file", start.pid_file, *arguments, **more) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def shown(pid: int) -> str:
    return f"process {pid}: {command_line_of(pid) or '(gone)'}"


def tcp(address: str) -> tuple[str, int]:
    """host and port of a canonical address."""
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    return host.strip("[]"), int(port)


def told(address: tuple[str, int] | str) -> dict[str, Any]:
    """What the worker tells.py says of itself."""
    client: Client = Client(address)
    with client.socket, client.socket.makefile("rb") as lines:
        found: dict[str, Any] = json.loads(lines.readline())
    found["listener"] = found["header"][2] + 256 * found["header"][3]
    return found


class Terminal:
    """Our end of a terminal.  What is read beyond a line waited for is kept for the next one."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = ""

    def read_until(self, pattern: str) -> str:
        """Read to the end of a match; returns all of it."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while not (found := re.search(pattern, self._rest)):
            assert poll.poll(DEADLINE_S * 1000), self._rest
            self._rest += os.read(self._fd, 65536).decode()
        seen, self._rest = self._rest[: found.end()], self._rest[found.end() :]
        return seen

    def write(self, data: bytes) -> None:
        os.write(self._fd, data)

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def on_a_terminal(
    start: Start, *words: str, before: tuple[str, ...] = ()
) -> Iterator[tuple[Popen, Terminal]]:
    """A foreground protector that leads the session of a terminal, and the other end of that."""
    ours, theirs = pty.openpty()
    with start_of(
        start,
        *("-f", *words),
        before=("setsid", "--ctty", *before),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=False,
    ) as process:
        os.close(theirs)
        yield process, Terminal(ours)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = needs.IPV6
