"""One rival that runs: started, reloaded, upgraded and killed as its entry says."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from bench.processes import HERE, ROOT, CannotMeasure, descendants, free_port
from bench.rivals.catalogue import Rival
from bench.rivals.installing import PROGRAMS, VENV, helpers, run
from bench.service import reap

START_S = 20.0
STOP_S = 5.0
#: HAProxy's master forgets a signal that comes while it starts.
SETTLES_S = 1.0
#: How long an operator waits for the first answer of a new release.
LOOKS_S = 30.0
_REQUEST = b"GET / HTTP/1.0\r\n\r\n"
_ENDS = ("TERM", "QUIT")
_FRONT = """\
daemon off; {user} worker_processes 1; pid {folder}/front.pid; error_log {folder}/front.log warn;
events {{ worker_connections 2048; }}
http {{
    access_log off; keepalive_requests 1000000;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxied;
    fastcgi_temp_path {folder}/fastcgi; scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location / {{ proxy_pass http://unix:{path}:; proxy_next_upstream off; }}
    }}
}}
"""


def steps(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return each step as what to do, and with what.

    SIGNAL, `old SIGNAL` (to the process that was the first one), `answers` (wait for a new one),
    `run COMMAND`, `write FILE TEXT`, `stop`, `start`.
    """
    found = []
    for each in words:
        what, _, rest = each.partition(" ")
        if what not in ("old", "answers", "run", "write", "stop", "start"):
            signal.Signals[f"SIG{what}"]  # raises KeyError
            what, rest = "signal", what
        found.append((what, rest))
    return found


class Answer(NamedTuple):
    """A client's answer."""

    pid: int
    release: int
    word: str


class Running:
    """A context manager; `unix`: on a UNIX socket, behind nginx."""

    def __init__(self, rival: Rival, folder: Path, *, unix: bool = False) -> None:
        self.rival = rival
        self.unix = unix or rival.fronted
        self._folder = folder
        self._port = free_port()
        self._path = folder / "web.sock"
        self._front_port = free_port()
        self.address = f"127.0.0.1:{self._front_port if self.unix else self._port}"
        self._release = "good"
        self.number = 0  # of the release that was deployed last
        self._log = (folder / "log").open("ab")
        self._first = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._front: subprocess.Popen[bytes] | None = None
        self.deploy("good")

    # -- releases ------------------------------------------------------------------

    def texts(self) -> dict[str, str]:
        """Return what the texts of an entry may name."""
        bad = self._release == "answers-500"
        return {
            "port": str(self._port),
            "path": str(self._path),
            "unix": f"unix:{self._path}?mode=0666",
            "folder": str(self._folder),
            "release": str(self._folder / "current" / "release"),
            "number": str(self.number),
            "status": "500" if bad else "200",
            "word": "fail" if bad else "pong",
            "broken": "}" if self._release == "broken" else "",
            "python": str(VENV / "bin" / "python") if self.rival.pip else sys.executable,
            "scripts": str(VENV / "bin"),
            "tools": sysconfig.get_path("scripts"),
            "worker": f"{sys.executable} -m bench.rivals.programs.worker",
            "programs": str(PROGRAMS),
            "built": str(HERE),
            "root": f"{ROOT}:{ROOT / 'client_lib'}",
        }

    def deploy(self, release: str) -> None:
        """Put a release in the place of the one before; a reload reads it."""
        self._release = release
        self.number += 1
        whole = self._folder / f"release-{self.number}"
        whole.mkdir()
        (whole / "release").write_text(f"{release} {self.number}\n", encoding="ascii")
        new = self._folder / "new"
        new.symlink_to(whole.name)
        new.replace(self._folder / "current")
        for name, text in self.rival.files.items():
            text = text.replace("USER", "user root;" if os.geteuid() == 0 else "")
            written = self._folder / f"{name}.new"
            written.write_text(text.format(**self.texts()).replace("%%", "%"), encoding="utf-8")
            written.replace(self._folder / name)

    # -- processes -----------------------------------------------------------------

    def _start(self) -> None:
        command = self.rival.at_path if self.unix else self.rival.command
        texts = self.texts()
        env = {
            **os.environ,
            "RELEASE": texts["release"],
            "PYTHONPATH": texts["root"],
            **self.rival.env,
        }
        words = shlex.split(command.format(**texts))
        process = subprocess.Popen(
            words, cwd=self._folder, env=env, stdin=subprocess.DEVNULL,
            stdout=self._log, stderr=self._log,
        )  # fmt: skip
        self._processes.append(process)
        self._first = process.pid
        until_s = time.monotonic() + START_S
        while True:
            try:
                self.ask()
            except OSError as error:
                if time.monotonic() > until_s or process.poll() is not None:
                    raise CannotMeasure(f"{self.rival.name}: {error}; {self.said()}") from error
                time.sleep(0.02)
            else:
                return

    def _start_front(self) -> None:
        place = self._folder / "front"
        place.mkdir()
        user = "user root;" if os.geteuid() == 0 else ""
        text = _FRONT.format(user=user, folder=place, port=self._front_port, path=self._path)
        (place / "nginx.conf").write_text(text, encoding="utf-8")
        self._front = subprocess.Popen(
            ["nginx", "-c", str(place / "nginx.conf"), "-e", "stderr"],
            stdout=self._log, stderr=self._log,
        )  # fmt: skip
        helpers.add(self._front.pid)
        until_s = time.monotonic() + START_S
        while time.monotonic() < until_s:
            try:
                socket.create_connection(("127.0.0.1", self._front_port)).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise CannotMeasure(f"nginx: {self.said()}")

    def family(self) -> list[int]:
        """Return the living processes of the rival: also those that it has left behind."""
        for _ in range(20):
            try:
                others = {pid for each in helpers for pid in (each, *descendants(each))}
                return [pid for pid in descendants(os.getpid()) if pid not in others]
            except (FileNotFoundError, ProcessLookupError):
                continue  # one of them has just ended
        return []

    def supervisor(self) -> int:
        """Return the pid of what supervises."""
        first = self.first()
        if not self.rival.guarded:
            return first
        below = [pid for pid in descendants(first) if _parent(pid) == first]
        named = [pid for pid in below if _comm(pid) == "SocketProtector"]
        return named[-1] if named else first

    def first(self) -> int:
        """Return the pid that gets the signals of an operator."""
        if self.rival.pid_file:
            try:
                return int((self._folder / "pid").read_text())
            except (OSError, ValueError):
                pass  # it is written again
        return self._first

    def ask(self, within_s: float = 5) -> Answer:
        """Return an answer.  Raises OSError."""
        with socket.socket(socket.AF_UNIX if self.unix else socket.AF_INET) as client:
            client.settimeout(within_s)
            client.connect(str(self._path) if self.unix else ("127.0.0.1", self._port))
            client.sendall(_REQUEST)
            said = b""
            while data := client.recv(4096):
                said += data
        try:
            pid, release, word = said.rpartition(b"\r\n\r\n")[2].decode().split()
            return Answer(int(pid), int(release), word)
        except ValueError:
            raise ConnectionResetError(f"only {said!r} came back") from None

    def until_new(self, limit_s: float = LOOKS_S) -> bool:
        """Wait until the release that was deployed last answers well; whether it did."""
        until_s = time.monotonic() + limit_s
        while time.monotonic() < until_s:
            try:
                answer = self.ask()
            except OSError:
                pass
            else:
                if answer.release == self.number:
                    return answer.word == "pong"
            time.sleep(0.001)
        return False

    # -- what an operator does -----------------------------------------------------

    def reload(self, release: str = "good") -> bool:
        """Deploy a release; whether each step could be done."""
        self.deploy(release)
        return self.order_reload()

    def order_reload(self) -> bool:
        """Reload the release that was deployed last; whether each step could be done."""
        return self._do(self.rival.reload)

    def upgrade(self) -> bool:
        """Replace the supervisor by the same program; whether each step could be done."""
        self.deploy("good")
        return self._do(self.rival.upgrade)

    def _do(self, words: tuple[str, ...]) -> bool:
        known, old = set(self.family()), self.first()
        for what, rest in steps(words):
            try:
                if what == "signal":
                    os.kill(old, signal.Signals[f"SIG{rest}"])
                elif what == "old":
                    os.kill(old, signal.Signals[f"SIG{rest}"])
                    if rest in _ENDS:
                        _gone([old], STOP_S)
                        self._until_first(old)
                elif what == "answers":
                    if not self.until_new():
                        self._end_new(known, old)
                        return False
                elif what == "run":
                    run(rest.format(**self.texts()))
                elif what == "write":
                    path, _, text = rest.partition(" ")
                    # As a pipe too: it must not wait for a reader that has gone.
                    fd = os.open(path.format(**self.texts()), os.O_WRONLY | os.O_NONBLOCK)
                    os.write(fd, text.encode())
                    os.close(fd)
                elif what == "stop":
                    self._stop()
                else:
                    self._start()
            except (CannotMeasure, OSError):
                return False
        return True

    def _until_first(self, old: int) -> None:
        """Wait until the new process has taken the pid file over."""
        until_s = time.monotonic() + STOP_S
        while self.first() == old and time.monotonic() < until_s:
            time.sleep(0.01)

    def _end_new(self, known: set[int], old: int) -> None:
        """End a second master whose release is no good, as manuals say."""
        for pid in self.family():
            if pid not in known and _parent(pid) == old and pid != old:
                os.kill(pid, signal.Signals[f"SIG{self.rival.stop}"])

    def _stop(self) -> None:
        first = self.first()
        if first in self.family():
            os.kill(first, signal.Signals[f"SIG{self.rival.stop}"])
        if not _gone(self.family(), STOP_S):
            for pid in self.family():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            _gone(self.family(), STOP_S)
        self._path.unlink(missing_ok=True)

    def said(self) -> str:
        """Return the end of what it wrote."""
        return (self._folder / "log").read_text(errors="replace").strip()[-300:]

    def __enter__(self) -> Self:
        try:
            self._start()
            if self.unix:
                self._start_front()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all of it."""
        self._stop()
        for process in self._processes:
            process.wait()
        if self._front is not None:
            self._front.terminate()
            self._front.wait()
            helpers.discard(self._front.pid)
        self._log.close()


def _gone(pids: list[int], limit_s: float) -> bool:
    """Wait until none of these processes runs; whether that was within the limit."""
    until_s = time.monotonic() + limit_s
    while any(_state(pid) not in ("", "Z") for pid in pids):
        if time.monotonic() > until_s:
            return False
        time.sleep(0.01)
    reap()
    return True


def _fields(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _state(pid: int) -> str:
    fields = _fields(pid)
    return fields[0] if fields else ""


def _parent(pid: int) -> int:
    fields = _fields(pid)
    return int(fields[1]) if fields else 0


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def cpu_s(pids: list[int]) -> float:
    """Return the processor time of these processes, and of the children that they have reaped."""
    spent = 0
    for pid in pids:
        spent += sum(map(int, _fields(pid)[11:15]))
    return spent / os.sysconf("SC_CLK_TCK")


def pss_kib(pids: list[int]) -> int:
    """Return their memory, what they share counted once."""
    whole = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    whole += int(line.split()[1])
        except OSError:
            continue  # it has ended
    return whole
