"""The protected service of a soak: how it is started, watched and ended.

Its processes are found by kinship: this process is their sub-reaper, so all that it ever
started stays below it, and nothing else is ever signalled.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.account import Kill, Victim
from bench.earlier import EarlierCode
from bench.held import held_ports
from bench.processes import descendants, resident_kib
from socketprotector.demo.kill import accepted_by
from socketprotector.demo.load import client_number
from socketprotector.system import procfs

ROOT = Path(__file__).resolve().parent.parent
_PR_SET_CHILD_SUBREAPER = 36
_SYS_PIDFD_GETFD = 438  # on every architecture
_NAME = "SocketProtector"
_CTL = Path(sys.executable).with_name("socketprotectorctl")
_DIES_S = 10.0
#: The releases that serve; the others of a service fail.
GOOD = ("good", "good-2", "good-3")


@dataclass(frozen=True)
class Kind:
    """What is protected in a soak, and how."""

    name: str
    program: str  # what the shell executes; {held}: the folder where it notes what it holds
    options: tuple[str, ...] = ()
    #: What it is asked, as --ready and as --health: what earlier code does not know.
    question: str = "accept"
    listen: str = "127.0.0.1:0"  # {folder}: its own
    http: bool = False  # it is asked by one HTTP request a connection
    scales: bool = True  # it loses nothing where a worker of a generation that serves is ended
    #: Its workers fork children by the client library, and this is its --drain-timeout, in seconds:
    #: longer than a client stays.
    drain_s: int = 0

    @property
    def accepts(self) -> bool:
        """Whether its workers accept by themselves."""
        return "--handoff" in self.options

    @property
    def forks(self) -> bool:
        """Whether its workers' children serve, and have children that serve no client."""
        return self.drain_s > 0


_LISTENER = ("--handoff", "listener")
_PYTHON = shlex.quote(sys.executable)
_SCRIPTS = Path(sys.executable).parent
#: Unmodified servers take some connections in before they leave, unless all that is new comes to
#: another socket (docs/servers.md): so these are not scaled.
SERVICES = {
    each.name: each
    for each in (
        Kind("connection", f"{_PYTHON} -m bench.held {{held}}"),
        Kind("processes", f"{_PYTHON} -m bench.forked", drain_s=90),
        Kind(
            "processes-wsgi",
            f"{_SCRIPTS}/socketprotector-run --processes 3 bench.forked:wsgi",
            _LISTENER,
            "http:/",
            http=True,
            drain_s=10,
        ),
        Kind("asyncio", f"{_PYTHON} -m bench.listening asyncio {{fd}}", _LISTENER, scales=False),
        Kind(
            "unix",
            f"{_PYTHON} -m bench.listening asyncio {{fd}}",
            _LISTENER,
            listen="unix:{folder}/socket",
            scales=False,
        ),
        Kind("prefork", f"{_PYTHON} -m bench.listening prefork {{fd}}", _LISTENER, scales=False),
        Kind(
            "uvicorn",
            f"{_SCRIPTS}/uvicorn --log-level warning --fd {{fd}} bench.listening:asgi",
            _LISTENER,
            "http:/",
            http=True,
            scales=False,
        ),
        Kind(
            "gunicorn",
            f"{_SCRIPTS}/gunicorn --log-level warning --workers 2 --threads 4 bench.listening:wsgi",
            _LISTENER,
            "http:/",
            http=True,
            scales=False,
        ),
    )
}


class Gone(Exception):
    """The service has ended without being asked to."""


@dataclass(frozen=True)
class Size:
    """What a process takes at one moment."""

    descriptors: int
    rss_kib: int
    pss_kib: int


def size_of(pid: int) -> Size:
    """Measure a process.  Raises OSError when it is gone."""
    rolled_up = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+)", rolled_up, re.MULTILINE)
    count = len(os.listdir(f"/proc/{pid}/fd"))
    return Size(count, resident_kib(pid), int(found[1]) if found else 0)


def open_files(pid: int) -> list[str]:
    """Return what each descriptor of a process is; nothing if it is gone."""
    found = []
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            try:
                found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
            except OSError:
                continue  # closed meanwhile
    except FileNotFoundError:
        pass
    return sorted(found)


def unix_clients_of(pid: int, pidfd: int) -> frozenset[int]:
    """Return the numbers of the UNIX clients whose connections a stopped process has open."""
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = set()
    for number, _ in procfs.sockets(pid):
        fd = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        with socket.socket(fileno=fd) as held:
            try:
                name = held.getpeername()
            except OSError:
                continue  # a listening socket
        if isinstance(name, bytes):
            numbers.add(client_number(name))
    return frozenset(numbers - {0})


def become_sub_reaper() -> None:
    """From now on whatever our descendants leave behind becomes our child."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


#: Exit statuses that reap() has taken, by pid.
_ended: dict[int, int] = {}


def reap() -> None:
    """Take the statuses of orphans that were left to us, and of our own children."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _ended[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        pass


def status_of(child: subprocess.Popen[bytes]) -> int | None:
    """Return the exit status of a child, which reap() may have taken; None: it runs."""
    reap()
    # poll() invents the status of a child that reap() has taken.
    return _ended.get(child.pid, child.returncode)


def _stat(pid: int) -> tuple[str, int, int]:
    """Return (state, parent, start time); ("", 0, 0) when it is gone."""
    try:
        after = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0, 0
    return after[0], int(after[1]), int(after[19])


def _session(pid: int) -> int:
    """Return the session of a process; 0 when it is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class Service:
    """A guarded protector with its releases in a folder, as its log and /proc show it."""

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        options: Sequence[str],
        workers: int,
        earlier: EarlierCode | None = None,
    ) -> None:
        """Lay out the releases; start() starts it.

        earlier: what it is started by, until the first upgrade.
        """
        self.kind = kind
        self._listen = kind.listen.format(folder=folder)
        self.log = folder / "log"
        self.pid_file = folder / "pid"
        self.address = ""
        self.guard = 0
        self.guarded = True
        self.events: Counter[str] = Counter()
        self.serving = 0  # generation
        self.begun = 0  # pid of the protector that last logged that it goes on
        self.left_earlier = ""  # how this code came to run in the place of the earlier, once it did
        self.generation_of: dict[int, int] = {}  # worker's pid -> generation
        self._spawned: set[int] = set()  # the pids of all workers ever
        self.release_serving = GOOD[0]  # by the log
        #: Whether `current` was moved as an operator would, and may name a release that fails.
        self.by_hand = False
        self._earlier = earlier
        self._version = ""  # of the protector that last logged that it goes on
        self._folder = folder
        #: As long as it exists, --settle-check fails.
        self.failing = folder / "failing"
        ready = kind.question if earlier is None else "notify"
        self.rolls = "rolling" in options
        self._current = folder / "live" / "current"
        self._current.parent.mkdir()
        drain = ("--drain-timeout", f"{kind.drain_s}s") if kind.forks else ()
        self._options = ("--workers", str(workers), *kind.options, *drain, "--ready", ready)
        self._options += tuple(options)
        self._protector = 0
        self._read = 0
        self._held = folder / "held"
        self._held.mkdir()
        self._make_releases()

    def _make_releases(self) -> None:
        words = self.kind.program.format(held=shlex.quote(str(self._held)), fd='"$1"')
        path = [self._earlier.client_library] if self._earlier is not None else []
        packages = ":".join(map(str, [*path, ROOT]))
        good = f"export PYTHONPATH={shlex.quote(packages)}\nexec {words}\n"
        releases = {
            **dict.fromkeys(GOOD, good),
            "wrong": f"export BENCH_WRONG=1\n{good}",
            "exits": "exit 3\n",
            "hangs": "exec sleep 600\n",
            "not-executable": good,
        }
        for name, text in releases.items():
            program = self._folder / "releases" / name / "daemon"
            program.parent.mkdir(parents=True)
            program.write_text("#!/bin/sh\n" + text)
            program.chmod(0o644 if name == "not-executable" else 0o755)
        self.release(GOOD[0])

    def release(self, name: str) -> None:
        """Let `current` lead to another release, as an operator would."""
        new = self._current.with_name("by-hand")
        new.symlink_to(f"../releases/{name}")
        self.by_hand = name not in GOOD
        new.replace(self._current)

    @property
    def named(self) -> str:
        """The release that `current` names."""
        return Path(os.readlink(self._current)).name

    def command(self) -> list[str]:
        """Return the command that starts it."""
        installed = (str(Path(sys.executable).parent / _NAME),)
        releases, path = (
            (
                ("--releases", str(self._folder / "releases"), "--current", str(self._current)),
                "{release}",
            )
            if self._earlier is None
            else ((), str(self._current))
        )
        return [
            *(self._earlier.command if self._earlier is not None else installed),
            *("--guard", *self._options, *releases),
            *("--pid-file", str(self.pid_file), "--log-file", str(self.log)),
            *(f"web={self._listen}", "--", f"{path}/daemon"),
            *(["{fd:web}"] if self.kind.accepts else []),
        ]

    def start(self) -> None:
        """Start it and wait until it serves.  Raises CalledProcessError."""
        own = self._earlier.environment if self._earlier is not None else {}
        done = subprocess.run(
            self.command(),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, **own},
        )
        # It prints no UNIX path.
        self.address = (done.stdout.split() or [self._listen])[-1].removeprefix("tcp:")
        self.guard = int(self.pid_file.read_text())
        self.look()

    @property
    def from_earlier(self) -> bool:
        """Whether earlier code starts it, until the first upgrade."""
        return self._earlier is not None

    # -- what is seen ----------------------------------------------------------

    def look(self) -> None:
        """Take in what the log says since the last look."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            words = dict(re.findall(r"(\w+)=([^\s\"]+)", line))
            event = words.get("event", "")
            self.events[event] += 1
            if event == "spawned":
                self.generation_of[int(words["pid"])] = int(words["generation"])
                self._spawned.add(int(words["pid"]))
            elif event == "route":
                self.serving = int(words["generation"])
                self.events["shared"] += "sharing" in words
            elif event in ("ready", "reloaded", "recovered") and "release" in words:
                self.events["deployed"] += words["release"] != self.release_serving
                self.release_serving = words["release"]
            elif event in ("start", "resumed", "adopted"):
                self._begins(int(words["pid"]), words["version"])
            elif event == "upgrading":
                self.begun = 0

    def _begins(self, pid: int, version: str) -> None:
        if self._version not in ("", version):
            self.left_earlier = "USR2" if pid == self._protector else "a kill, and the guard"
        self._protector = self.begun = pid
        self._version = version

    def protector(self) -> int:
        """Return the pid of the protector, 0 while there is none."""
        if self.guarded:
            # By kinship: the log is late, and a protector may be killed before it writes any.
            own = []
            for pid in _children(self.guard):
                try:
                    name = Path(f"/proc/{pid}/comm").read_text().strip()
                except OSError:
                    continue
                state, _, started = _stat(pid)
                if name == _NAME and state not in ("", "Z"):
                    own.append((started, pid))  # an orphaned probe is older
            return max(own)[1] if own else 0
        return self._protector if _stat(self._protector)[0] not in ("", "Z") else 0

    def relay(self) -> int:
        """Return the pid of the relay, 0 while there is none."""
        for parent in (self.protector(), self.guard):
            for pid in _children(parent) if parent else ():
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if any(each.endswith((b"/log_relay.py", b"/relay.py")) for each in words):
                    return pid
        return 0

    def workers(self) -> dict[int, int]:
        """Return the living workers: pid -> generation."""
        kin = {self.guard, self.protector(), os.getpid()}
        living = {}
        for pid, generation in list(self.generation_of.items()):
            state, parent, _ = _stat(pid)
            if state in ("", "Z") or parent not in kin:
                del self.generation_of[pid]  # another process's number by now, or free
            else:
                living[pid] = generation
        return living

    def forked(self, worker: int) -> tuple[list[int], list[int]]:
        """Return the children of a worker, and their children."""
        children = _children(worker)
        return children, [pid for child in children for pid in _children(child)]

    def strays(self) -> list[int]:
        """Return the living processes in the sessions of workers that have ended."""
        sessions = {pid: _session(pid) for pid in descendants_now()}
        ended = {each for each in self._spawned if _stat(each)[0] in ("", "Z")}
        return [pid for pid, session in sessions.items() if session in ended]

    def lines_between(self, begin_s: float, end_s: float) -> list[str]:
        """Return what the log says of the seconds between two moments of CLOCK_MONOTONIC."""
        shift = time.time() - time.monotonic()
        first, last = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at_s + shift))
            for at_s in (begin_s, end_s)
        )
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if first <= line[: len(first)] <= last]

    # -- what is done to it ----------------------------------------------------

    def send(self, number: signal.Signals) -> None:
        """Send a signal as an administrator would: to the pid in the pid file.

        Raises Gone.
        """
        pid = self.guard if self.guarded else self.protector()
        if not pid or _stat(pid)[0] in ("", "Z"):
            raise Gone(f"{'guard' if self.guarded else 'protector'} {pid or self._protector}")
        os.kill(pid, number)

    def try_release(self) -> None:
        """Order a dry run of the release, without a wait for the outcome."""
        self._order("reload", "--dry-run", "--timeout", "10s")

    def canary(self, seconds: float) -> None:
        """Order a canary that has its share for so long, without a wait for the verdict."""
        limit = f"{seconds * 1000:.0f}ms"
        self._order("reload", "--canary", "30%", "--for", limit, "--no-wait")

    def promote(self, *, now: bool) -> None:
        """Order the next stage of a rollout, or its end."""
        self._order("promote", *(["--now"] if now else []))

    def roll_back(self) -> None:
        """Order the end of a reload; without one, the release before."""
        self._order("rollback", "--no-wait")

    def deploy(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        """Order the deploy of a release, without a wait for the verdict."""
        # By its socket, at which it waits for a protector that is being started again.
        place = ("--control", str(self._folder / "socketprotector" / "daemon.control"))
        return self._order("deploy", name, "--timeout", "10s", *more, place=place)

    def scale(self, workers: int) -> None:
        """Order this number of workers, and wait for the answer.  Raises CalledProcessError."""
        command = [str(_CTL), "--pid-file", str(self.pid_file), "scale", str(workers)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def hold(self, seconds: float) -> None:
        """Order a hold of that length, without a wait for the answer."""
        self._order("hold", "--for", f"{seconds * 1000:.0f}ms")

    def _order(self, *words: str, place: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        place = place or ("--pid-file", str(self.pid_file))
        made = subprocess.Popen(
            [str(_CTL), *place, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _ended.pop(made.pid, None)  # of an earlier process with that pid
        return made

    def upgrade(self) -> None:
        """Ask for an upgrade, to this code from whatever runs.  Raises Gone."""
        if self._earlier is not None:
            # A program that is starting would load modules of both, fail, and be started again.
            self.wait(lambda: self.protector() == self.begun, _DIES_S)
            self._earlier.replace()
        self.send(signal.SIGUSR2)

    def kill(self, victim: Victim, pid: int, worker: int = 0) -> Kill | None:
        """Send KILL to a process of the service and wait for its end.

        worker: in whose session the process is, if it is not a worker itself.
        """
        state, parent, _ = _stat(pid)
        kin = {self.guard, self.protector(), os.getpid()}
        if state in ("", "Z") or (_session(pid) != worker if worker else parent not in kin):
            return None
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        try:
            if victim == "guard":  # from now on only the log shows it, and it is late
                self.look()
                self._protector = self.protector()
            held: frozenset[int] = frozenset()
            noted = not (self.kind.accepts or self.kind.forks)
            if victim == "worker" and not noted:
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
                held = accepted_by(pid) | unix_clients_of(pid, pidfd)
            before_s = time.monotonic()
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            after_s = time.monotonic()
            poll = select.poll()  # select() takes no descriptor above 1023
            poll.register(pidfd, select.POLLIN)
            ended = poll.poll(_DIES_S * 1000)
        except (FileNotFoundError, ProcessLookupError):
            return None
        finally:
            os.close(pidfd)
        if not ended:
            raise TimeoutError(f"{victim} {pid} lives {_DIES_S:g} s after SIGKILL")
        if victim == "guard":
            self.guarded = False
        if victim == "worker" and noted:
            table = self._held / str(pid)
            held = held_ports(table)
            table.unlink(missing_ok=True)
        return Kill(victim, pid, before_s, after_s, held)

    def wait(self, fact: Callable[[], bool], limit_s: float) -> bool:
        """Look until a fact holds; say whether it did within the limit."""
        until_s = time.monotonic() + limit_s
        while True:
            self.look()
            reap()
            if fact():
                return True
            if time.monotonic() > until_s:
                return False
            time.sleep(0.02)

    def end(self, limit_s: float, sign: signal.Signals = signal.SIGTERM) -> bool:
        """Stop it; say whether everything of it was gone within the limit."""
        if not self.guard:
            return True
        try:
            self.send(sign)
        except Gone:
            pass  # what it left is seen below
        return self.wait(lambda: not descendants_now(), limit_s)


def descendants_now() -> list[int]:
    """Return every living process below this one."""
    for _ in range(3):
        try:
            return [pid for pid in descendants(os.getpid()) if _stat(pid)[0] not in ("", "Z")]
        except (FileNotFoundError, ProcessLookupError):
            continue  # one ended while it was looked at
    return _children(os.getpid())
