"""What the checks use inside of the machine: systemctl, one instance of the unit, clients."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

#: For each fact that is waited for.  An emulated processor is some twenty times slower.
DEADLINE_S = 120.0
UNITS = Path("/etc/systemd/system")
PYTHON = "/opt/venv/bin/python"
TESTS = "/opt/tests"
PROGRAMS = f"{TESTS}/vm/programs"
ECHO = f"{PYTHON} {TESTS}/workers/echo.py"
#: Between two looks, and two clients: each costs an emulated processor a hundred times as much.
_PAUSE_S = 0.3
_TRIES = 4
_TRACING = Path("/sys/kernel/tracing")
_T = TypeVar("_T")


class NotRun(Exception):
    """This system does not have what the check is about; the text says what."""


def eventually(fact: Callable[[], _T], what: str, deadline_s: float = DEADLINE_S) -> _T:
    """Wait until fact() is true, and return it.  Raises AssertionError."""
    until = time.monotonic() + deadline_s
    while not (found := fact()):
        assert time.monotonic() < until, f"not seen in {deadline_s:g} s: {what}"
        time.sleep(_PAUSE_S)
    return found


def run(*words: str, deadline_s: float = 1200.0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; the caller looks at its status."""
    return subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=deadline_s,
        check=False,
    )


def systemctl(*words: str) -> str:
    """Run systemctl, which must succeed; return what it said."""
    done = run("systemctl", *words)
    assert done.returncode == 0, f"systemctl {' '.join(words)}: {done.returncode}: {done.stderr}"
    return done.stdout


def systemd_version() -> int:
    """Return 252, 257 and so on."""
    found = re.match(r"systemd (\d+)", run("systemctl", "--version").stdout)
    assert found, "systemctl does not say its version"
    return int(found[1])


_ports = iter(range(4401, 5000))


class Service:
    """One instance of the shipped template, or another unit, and what belongs to it.

    Leaving it stops the unit, and removes its settings and drop-ins.
    """

    def __init__(
        self,
        name: str,
        command: str = ECHO,
        options: str = "",
        *,
        listen: str = "",
        user: str = "root",
        drop_in: Sequence[str] = (),
        unit: str = "",
    ) -> None:
        """`{port}` in listen and command: its port.  drop_in: lines of [Service].

        options: as on the command line; they are written into the file of settings.
        """
        self.name = name
        self.port = next(_ports)
        self.unit = unit or f"socketprotector@{name}.service"
        self.control = f"/run/socketprotector/{name}/control"
        self.settings = Path(f"/etc/socketprotector/{name}.toml")
        self._values: dict[str, Any] = {
            "listen": (listen or "127.0.0.1:{port}").format(port=self.port).split(),
            "command": shlex.split(command.format(port=self.port)),
            **({"user": user} if user else {}),
            **_keys(options),
        }
        self.settings.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._files = [self.settings]
        self._sockets: list[str] = []
        self._group = Path("/nonexistent")
        if drop_in:
            self.write(f"{self.unit}.d/test.conf", "[Service]", *drop_in)
            systemctl("daemon-reload")

    def settle(self, **values: Any) -> None:
        """Write the settings, with these keys beside those that there are (`_` for `-`)."""
        self._values |= {key.replace("_", "-"): value for key, value in values.items()}
        self._write()

    def forget(self, key: str) -> None:
        """Write them without a key."""
        del self._values[key]
        self._write()

    def _write(self) -> None:
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in self._values.items())
        self.settings.write_text("".join(lines), encoding="utf-8")

    def write(self, path: str, *lines: str) -> None:
        """Add a unit's file for as long as this lasts; announce it to systemd by daemon-reload."""
        file = UNITS / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._files.append(file)

    def opened_by_systemd(self, *lines: str) -> None:
        """Let systemd listen on the port: socket activation, by the shipped example."""
        unit = self.unit.replace(".service", ".socket")
        address = f"ListenStream=127.0.0.1:{self.port}"
        self.write(f"{unit}.d/test.conf", "[Socket]", "ListenStream=", address, *lines)
        self._sockets.append(unit)
        systemctl("daemon-reload")
        systemctl("start", unit)

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for unit in (*self._sockets, self.unit):
            run("systemctl", "stop", unit)
            run("systemctl", "kill", "-s", "KILL", unit)
            run("systemctl", "reset-failed", unit)
        units = [file for file in self._files if file != self.settings]
        for file in self._files:
            file.unlink(missing_ok=True)
        if units:
            for folder in {file.parent for file in units} - {UNITS}:
                shutil.rmtree(folder, ignore_errors=True)
            run("systemctl", "daemon-reload")

    # -- what systemd knows

    def show(self, name: str) -> str:
        return systemctl("show", "-P", name, self.unit).strip()

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    @property
    def status_text(self) -> str:
        return self.show("StatusText")

    @property
    def stored(self) -> int:
        """How many descriptors are in systemd's store."""
        return int(self.show("NFileDescriptorStore"))

    def processes(self) -> list[int]:
        """All that are in the unit's control group, and in what it was when it ran."""
        if name := self.show("ControlGroup"):
            self._group = Path("/sys/fs/cgroup", name.lstrip("/"), "cgroup.procs")
        try:
            return [int(line) for line in self._group.read_text(encoding="ascii").split()]
        except OSError:
            return []

    def journal(self, lines: int = 60) -> str:
        run("journalctl", "--sync")
        said = run("journalctl", "-b", "-o", "cat", "--no-pager", "-n", str(lines), "-u", self.unit)
        return said.stdout

    # -- what the protector says

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run("socketprotectorctl", "--control", self.control, *words)

    def status(self) -> dict[str, Any]:
        """Raises OSError, ValueError where there is no answer."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(DEADLINE_S)
            asking.connect(self.control)
            asking.sendall(b'{"v": 1, "command": "status"}\n')
            with asking.makefile("rb") as lines:
                answer: dict[str, Any] = json.loads(lines.readline())["result"]
        return answer

    def workers(self) -> list[int]:
        """Pids of the workers of the generation that serves."""
        return [
            worker["pid"]
            for generation in self.status()["generations"]
            if generation["phase"] in ("serving", "settling")
            for worker in generation["workers"]
        ]

    # -- what is done to it

    def start(self) -> Service:
        systemctl("start", self.unit)
        return self

    def reload(self) -> None:
        systemctl("reload", self.unit)

    def signal(self, number: signal.Signals) -> None:
        """Send it to the protector alone, by way of systemd."""
        systemctl("kill", "--kill-who=main", "-s", number.name, self.unit)

    def kill(self) -> None:
        """SIGKILL the protector, and wait for the one that systemd starts in its place."""
        before = self.pid
        os.kill(before, signal.SIGKILL)
        self.revived(before)

    def revived(self, before: int) -> None:
        eventually(
            # "reloading" where a reload was under way, and goes on.
            lambda: (
                self.pid not in (0, before) and self.show("ActiveState") in ("active", "reloading")
            ),
            f"another protector in the place of {before}",
            1200,  # which takes in thousands of descriptors
        )

    def upgrade(self, ask: Callable[[], object] | None = None) -> None:
        """USR2 (or what ask() does), and wait until the next program serves.

        The new program has half a minute to say that it can go on, which an emulated processor on
        a busy machine may not do it in; then the old one goes on, and it is asked for again.
        """
        ask = ask or partial(self.signal, signal.SIGUSR2)
        wanted = self.status()["restarts"] + 1
        for _ in range(_TRIES):
            ask()
            try:
                eventually(lambda: self.restarted(wanted), "the upgraded program's answer", 60)
                return
            except AssertionError as error:
                failed = error
        raise failed

    def restarted(self, times: int) -> bool:
        """Whether a protector answers that is the successor of so many."""
        try:
            return bool(self.status()["restarts"] == times)
        except (OSError, ValueError):
            return False

    def generation(self) -> int:
        """The number of the one that serves."""
        [serving] = [g["number"] for g in self.status()["generations"] if g["phase"] == "serving"]
        number: int = serving
        return number


def _keys(options: str) -> dict[str, Any]:
    """Return what stands in a file for words of a command line, each option with its value."""
    words = options.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return {
        key.removeprefix("--"): int(value) if value.isdecimal() else value for key, value in pairs
    }


# -- clients -------------------------------------------------------------------


def ask_line(port: int) -> int:
    """Connect, say a line, and return the pid that answers.  Raises OSError, ValueError."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
        client.sendall(b"hello\n")
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answer:
            said = answer.read()
    found = re.fullmatch(rb"\[(\d+)\] (hello|pong)\n", said)
    if not found:
        raise ValueError(f"wrong answer {said!r}" if said else "empty answer")
    return int(found[1])


def ask_http(port: int) -> int:
    """The same of an HTTP server, whose answer's body is its pid."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        with client.makefile("rb") as answer:
            said = answer.read()
    found = re.search(rb"\r\n\r\n(\d+)\n$", said)
    if not found or b" 200 " not in said.split(b"\r\n", 1)[0]:
        raise ValueError(f"wrong answer {said!r}" if said else "empty answer")
    return int(found[1])


class Held:
    """A client that stays connected."""

    def __init__(self, port: int) -> None:
        self._client = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        self._lines = self._client.makefile("rb")

    def ask(self) -> int:
        """Return the pid that answers.  Raises OSError, ValueError."""
        self._client.sendall(b"hello\n")
        found = re.fullmatch(rb"\[(\d+)\] hello\n", self._lines.readline())
        if not found:
            raise ValueError("empty answer")
        return int(found[1])

    def close(self) -> None:
        self._lines.close()
        self._client.close()


class Load:
    """A few clients that come one after the other; each failure is counted, by its kind."""

    def __init__(self, port: int, ask: Callable[[int], int] = ask_line, clients: int = 2) -> None:
        self._port = port
        self._ask = ask
        self._ended = threading.Event()
        self.answered = 0
        self.failed: Counter[str] = Counter()
        self.pids: set[int] = set()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        for each in self._threads:
            each.start()

    def _run(self) -> None:
        while not self._ended.wait(_PAUSE_S):
            try:
                self.pids.add(self._ask(self._port))
                self.answered += 1
            except (OSError, ValueError) as error:
                self.failed[type(error).__name__ if isinstance(error, OSError) else str(error)] += 1

    def more(self, count: int = 10) -> None:
        """Wait until so many more were answered: it goes on."""
        wanted = self.answered + count
        eventually(lambda: self.answered >= wanted, f"{count} more answers; {self.text()}")

    def end(self) -> None:
        self._ended.set()
        for each in self._threads:
            each.join()

    @property
    def failures(self) -> int:
        return sum(self.failed.values())

    def text(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.failed.items()))
        return f"{self.answered} answered, {self.failures} failed" + (
            f" ({kinds})" if kinds else ""
        )


@contextmanager
def load_on(
    service: Service, ask: Callable[[int], int] = ask_line, clients: int = 2
) -> Iterator[Load]:
    """Clients for as long as this lasts."""
    load = Load(service.port, ask, clients)
    try:
        load.more()
        yield load
    finally:
        load.end()


def waits_awake(pid: int, during: Callable[[], object]) -> int:
    """Return how often a process asks for events without waiting, as the kernel traces it."""
    event = _TRACING / "events/syscalls/sys_enter_epoll_wait"
    (event / "filter").write_text(f"common_pid == {pid} && timeout == 0")
    (_TRACING / "trace").write_text("")
    (event / "enable").write_text("1")
    try:
        during()
    finally:
        (event / "enable").write_text("0")
    lines = (_TRACING / "trace").read_text(encoding="ascii").splitlines()
    return sum(not line.startswith("#") for line in lines)


def is_refused(port: int) -> bool:
    """Whether no process listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), DEADLINE_S).close()
    except ConnectionRefusedError:
        return True
    return False


def lives(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    return _stat(pid)[0] not in "ZX"


def parent_of(pid: int) -> int:
    """The pid of its parent; 0: it has ended."""
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """Its state, its parent's pid, and more, as proc(5) orders them."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ["X", "0"]
    return stat.rpartition(")")[2].split()
