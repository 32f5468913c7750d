"""In the resident process no call can block without a bound but its wait for events.

Each system call that it makes during some 500 operations of all kinds is judged by what it is: its
flags, its arguments and what kind of descriptor it is made on.  How long it took says nothing.

What may wait, and for what, is in tests/README.md ("System calls of the resident process").
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from socketprotector.daemon.upgrade import TRIAL_S
from tests import needs
from tests.procfs import running, state_of, status_of
from tests.rounds import rounds
from tests.running import MARK, Client, Protector, eventually, marked
from tests.scenarios.operating import Line
from tests.scenarios.tools import Release, worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(rounds(400, 1200)),
    needs.programs("strace"),
]

ROUNDS = rounds(2, 250)
#: An upgrade's new program may take TRIAL_S until it answers, and as long again to begin, each call
#: of which a tracer looks at.
PATIENCE_S = 4 * TRIAL_S
TALKS = worker("talks")
#: One that leaves something behind and fails.
FAILS = "#!/bin/sh\nsleep 1000 &\necho no such table >&2\nexit 7\n"

#: These return at once, or wait for memory, a processor or a disk alone.
_NEVER = """
access arch_prctl bind brk capget capset chdir chmod clock_getres clock_gettime clone clone3 close
close_range dup dup2 dup3 epoll_create1 epoll_ctl eventfd2 execve exit exit_group faccessat
faccessat2 fchdir fchmod fchown fork fstat fstatfs ftruncate getcwd getdents64 getegid geteuid
getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom
getresgid getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid
kill lgetxattr link linkat listen lseek lsetxattr lstat
madvise membarrier memfd_create mkdir mmap mprotect mremap munmap newfstatat open openat pidfd_open
pidfd_send_signal pipe2 prctl pread64 prlimit64 pwrite64 readlink readlinkat rename renameat
restart_syscall rseq rt_sigaction rt_sigprocmask rt_sigreturn sched_getaffinity sched_getparam
sched_getscheduler sched_setscheduler set_robust_list set_tid_address setitimer setpriority
setrlimit setsockopt shutdown sigaltstack socket socketpair stat statfs statx symlink symlinkat
sysinfo tgkill umask
uname unlink unlinkat vfork
"""
NEVER = frozenset(_NEVER.split())
#: The one wait.
WAITS = frozenset(("epoll_wait", "epoll_pwait", "epoll_pwait2"))
_CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)$")
_FD = re.compile(r"^(\d+)<([^>]*(?:->[^>]*)?(?:>\])?)")


class Judge:
    """Reads what strace writes, and says which calls could have blocked."""

    def __init__(self, made: Mapping[str, bool]) -> None:
        """made: whether the pipes and sockets do not block that the process has already."""
        self._made = dict(made)
        self._spawning: set[str] = set()  # pipes that a fork's child closes by executing
        self._last_pipe: list[str] = []
        self._failed = False  # a fork's child could not execute
        self._vforked = ""  # the last child of posix_spawn, which had executed or ended by then
        self.seen: dict[str, int] = {}
        self.wrong: list[str] = []

    def read(self, line: str) -> None:
        found = _CALL.match(line)
        if not found or " = " not in line:
            return  # the last one, which was cut off when strace ended
        name, rest = found.groups()
        self.seen[name] = self.seen.get(name, 0) + 1
        if not self._allowed(name, rest):
            self.wrong.append(line[:300])

    def _allowed(self, name: str, rest: str) -> bool:
        self._note(name, rest)
        if name in WAITS or name in NEVER:
            return True
        judge = getattr(self, f"_{name}", None)
        return judge is not None and bool(judge(rest))

    def _note(self, name: str, rest: str) -> None:
        """Remember of what kind descriptors are."""
        if name == "pipe2":
            self._last_pipe = re.findall(r"<(pipe:\[\d+\])>", rest)
            for each in self._last_pipe:
                self._made[each] = "O_NONBLOCK" in rest
        elif name in ("fork", "vfork", "clone", "clone3"):
            self._spawning |= set(self._last_pipe)
            if "CLONE_VFORK" in rest or name == "vfork":
                self._vforked = rest.rpartition("= ")[2].strip()
        elif name in ("socket", "accept4"):
            for each in re.findall(r"= \d+<(socket:\[\d+\])>", rest):
                self._made[each] = "SOCK_NONBLOCK" in rest
        elif name == "ioctl" and "FIONBIO, [1]" in rest and (fd := _FD.match(rest)):
            self._made[fd[2]] = True
        elif name == "fcntl" and "F_SETFL" in rest and (fd := _FD.match(rest)):
            self._made[fd[2]] = "O_NONBLOCK" in rest

    def _is_file(self, rest: str) -> bool:
        fd = _FD.match(rest)
        return bool(fd) and fd[2].startswith("/") and not fd[2].startswith("/dev/pts")  # type: ignore[index]

    def _cannot_wait(self, rest: str) -> bool:
        fd = _FD.match(rest)
        if not fd:
            return False
        return self._made.get(fd[2], False)

    # -- those that it depends on ------------------------------------------------

    def _read(self, rest: str) -> bool:
        fd = _FD.match(rest)
        if fd and fd[2] in self._spawning:
            # Ends when the child executes, as posix_spawn does; what it says is why it could not.
            self._failed = self._failed or re.search(r"= [1-9]\d*$", rest) is not None
            return True
        return self._is_file(rest) or self._cannot_wait(rest)

    def _write(self, rest: str) -> bool:
        return self._is_file(rest) or self._cannot_wait(rest)

    _writev = _write

    def _pwritev2(self, rest: str) -> bool:
        return "RWF_NOWAIT" in rest or self._write(rest)

    def _recvmsg(self, rest: str) -> bool:
        # The flags that were given come last; msg_flags are those that came back.
        given = rest.rpartition("}, ")[2]
        return "MSG_DONTWAIT" in given or self._cannot_wait(rest)

    def _sendmsg(self, rest: str) -> bool:
        return "MSG_DONTWAIT" in rest or self._cannot_wait(rest)

    _sendto = _recvfrom = _sendmmsg = _sendmsg

    def _accept4(self, rest: str) -> bool:
        return self._cannot_wait(rest)

    _accept = _accept4

    def _poll(self, rest: str) -> bool:
        if re.search(r"\], \d+, 0\)|NULL, 0, 0\)", rest):
            return True
        fd = re.match(r"\[\{fd=(\d+<[^>]*>).*\], 1, \d+\)", rest)
        return bool(fd) and _FD.match(fd[1])[2] in self._spawning  # type: ignore[index]

    def _ppoll(self, rest: str) -> bool:
        return "tv_sec=0, tv_nsec=0" in rest

    def _wait4(self, rest: str) -> bool:
        if "WNOHANG" in rest:
            return True
        if self._is_spawned(rest, f"{self._vforked}, NULL"):
            return True
        # Of a child that could not execute and has closed all its files.
        failed, self._failed = self._failed, False
        return failed

    def _waitid(self, rest: str) -> bool:
        return "WNOHANG" in rest or self._is_spawned(rest, f"P_PID, {self._vforked}, NULL")

    def _is_spawned(self, rest: str, begins: str) -> bool:
        """posix_spawn takes in its child's end itself, by wait4, or waitid since glibc 2.41."""
        return bool(self._vforked) and rest.startswith(begins)

    def _flock(self, rest: str) -> bool:
        return "LOCK_NB" in rest or "LOCK_UN" in rest

    def _fcntl(self, rest: str) -> bool:
        return "SETLKW" not in rest

    def _ioctl(self, rest: str) -> bool:
        return re.search(r"FIONREAD|FIONBIO|FIOCLEX|FIONCLEX|TCGETS|TIOCGWINSZ", rest) is not None

    def _splice(self, rest: str) -> bool:
        return "SPLICE_F_NONBLOCK" in rest

    def _connect(self, rest: str) -> bool:
        return self._cannot_wait(rest)

    def _futex(self, rest: str) -> bool:
        return "FUTEX_WAKE" in rest


# -- the judge itself ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fine"),
    [
        ("epoll_wait(5<anon_inode:[eventpoll]>, [], 1023, -1) = 0", True),
        ("recvmsg(5<UNIX-SEQPACKET:[1->2]>, {msg_flags=0}, MSG_DONTWAIT) = 1", True),
        ("recvmsg(5<UNIX-SEQPACKET:[1->2]>, {msg_flags=MSG_DONTWAIT}, 0) = 1", False),
        ("sendto(5<UNIX-STREAM:[1->2]>, \"x\", 1, MSG_NOSIGNAL, NULL, 0) = 1", False),
        ("poll([{fd=5<anon_inode:[pidfd]>, events=POLLIN}], 1, 0) = 0 (Timeout)", True),
        ("poll([{fd=5<anon_inode:[pidfd]>, events=POLLIN}], 1, 1000) = 0 (Timeout)", False),
        ("wait4(5, 0x7ff, WNOHANG, NULL) = 0", True),
        ("wait4(5, 0x7ff, 0, NULL) = 5", False),
        ("waitid(P_PIDFD, 9, {}, WNOHANG|WEXITED|WNOWAIT, NULL) = 0", True),
        ("flock(3</run/x>, LOCK_EX) = 0", False),
        ("flock(3</run/x>, LOCK_EX|LOCK_NB) = 0", True),
        ("read(3<pipe:[77]>, \"\", 512) = 0", False),
        ("read(3</etc/hosts>, \"\", 512) = 0", True),
        ("write(2</dev/pts/0>, \"\", 512) = 0", False),
        ("clock_nanosleep(CLOCK_MONOTONIC, 0, {tv_sec=1}, NULL) = 0", False),
        ("a_call_of_the_future(1) = 0", False),
    ],
)  # fmt: skip
def test_what_could_block_is_told_from_what_could_not(line: str, fine: bool) -> None:
    judge = Judge({})
    judge.read(line)
    assert (judge.wrong == []) is fine


def test_a_descriptor_that_was_made_so_does_not_block() -> None:
    judge = Judge({})
    for line in (
        "pipe2([3<pipe:[77]>, 4<pipe:[77]>], O_CLOEXEC|O_NONBLOCK) = 0",
        'read(3<pipe:[77]>, "", 512) = -1 EAGAIN',
        "pipe2([5<pipe:[78]>, 6<pipe:[78]>], O_CLOEXEC) = 0",
        "fcntl(5<pipe:[78]>, F_SETFL, O_RDONLY|O_NONBLOCK) = 0",
        'read(5<pipe:[78]>, "", 512) = -1 EAGAIN',
    ):
        judge.read(line)
    assert judge.wrong == []
    judge.read("fcntl(5<pipe:[78]>, F_SETFL, O_RDONLY) = 0")
    judge.read('read(5<pipe:[78]>, "", 512) = 0')
    assert len(judge.wrong) == 1


# -- a life ------------------------------------------------------------------------------


def made_by(pid: int) -> dict[str, bool]:
    """Of each pipe and socket that a process has: whether it does not block."""
    found = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            text = Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text(encoding="ascii")
            flags = re.search(r"^flags:\s+(\d+)", text, re.MULTILINE)
            assert flags
            found[os.readlink(fd)] = bool(int(flags[1], 8) & os.O_NONBLOCK)
    return found


@contextmanager
def judged(pid: int, file: Path) -> Iterator[Judge]:
    """Watch the calls of a process for as long as this lasts."""
    words = ["strace", "-qq", "-y", "-s", "64", "-p", str(pid), "-o", str(file)]
    with subprocess.Popen(words) as tracer:
        try:
            eventually(lambda: status_of(pid)["TracerPid"] == str(tracer.pid), "a tracer")
            judge = Judge(made_by(pid))
            yield judge
            for line in file.read_text(errors="replace").splitlines():
                judge.read(line)
        finally:
            tracer.terminate()


class Life:
    """One protector, and all that can be done to it."""

    def __init__(
        self, daemon: Protector, folder: Path, release: Release, good: tuple[str, ...], mark: str
    ) -> None:
        self.daemon = daemon
        self.folder = folder
        self.release = release
        self.control = Line(folder / "control")
        self.good = good
        self.mark = mark
        self.turn = 0

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.log))

    def act(self, what: str) -> None:
        self.turn += 1
        getattr(self, what)()

    def _after(self, pattern: str, act: Callable[[], object]) -> None:
        before = self.count(pattern)
        act()
        try:
            eventually(lambda: self.count(pattern) > before, pattern, PATIENCE_S)
        except AssertionError:
            pytest.fail(f"never came: {pattern}, in a log that ends with\n{self.log[-8000:]}")

    def reload(self) -> None:
        self.release.becomes(*self.good)
        self._after("event=reload(ed|-failed)", lambda: self.daemon.signal(signal.SIGHUP))

    def bad_reload(self) -> None:
        self.release.write(FAILS)
        self._after("event=reload-failed", lambda: self.daemon.signal(signal.SIGHUP))
        self.release.becomes(*self.good)

    def unexecutable(self) -> None:
        self.release.write("#!/no/such/interpreter\n")
        self._after("event=reload-failed", lambda: self.daemon.signal(signal.SIGHUP))
        self.release.becomes(*self.good)

    def other_settings(self) -> None:
        config = self.folder / "web.toml"
        text = re.sub(r"workers = \d", f"workers = {2 + self.turn % 3}", config.read_text())
        config.write_text(text)
        self.reload()

    def bad_settings(self) -> None:
        config = self.folder / "web.toml"
        good = config.read_text()
        config.write_text("workers = nonsense\n")
        self._after("event=reload-failed", lambda: self.daemon.signal(signal.SIGHUP))
        config.write_text(good)

    def dry_run(self) -> None:
        """Refused where workers accept from one socket, and beside a reload."""
        verdict = "event=dry-run-(passed|failed)"
        before = self.count(verdict)
        self.control.send("reload", dry_run=True)
        if self.control.answer()["ok"]:
            eventually(lambda: self.count(verdict) > before, verdict, PATIENCE_S)

    def deploy(self) -> None:
        """Refused beside a reload."""
        verdict = "event=reload(ed|-failed)"
        before = self.count(verdict)
        self.control.send("deploy", release=("a", "b", "none")[self.turn % 3], force=True)
        if self.control.answer()["ok"]:
            eventually(lambda: self.count(verdict) > before, verdict, PATIENCE_S)

    def rollback(self) -> None:
        self.control.send("rollback")
        self.control.answer()

    def upgrade(self) -> None:
        self._after("event=(resumed|upgrade-failed)", lambda: self.daemon.signal(signal.SIGUSR2))
        self.control.close()
        self.control = Line(self.folder / "control")

    def more(self) -> None:
        self.daemon.signal(signal.SIGTTIN)

    def fewer(self) -> None:
        self.daemon.signal(signal.SIGTTOU)

    def kill_worker(self) -> None:
        pids = self.pids()
        if not pids:
            return
        before = self.count("event=exited")
        try:
            os.kill(pids[self.turn % len(pids)], signal.SIGKILL)
        except ProcessLookupError:
            return  # it has drained meanwhile
        eventually(lambda: self.count("event=exited") > before, "its end", PATIENCE_S)

    def pids(self) -> list[int]:
        found = self.control.status()
        workers = [each for gen in found["generations"] for each in gen["workers"]]
        return [each["pid"] for each in workers if each["state"] != "orphaned"]

    def rotate(self) -> None:
        (self.folder / "log").rename(self.folder / "log.1")
        self.daemon.signal(signal.SIGUSR1)
        new = self.folder / "log"
        eventually(lambda: new.exists() and "reopened" in self.log, "rotation", PATIENCE_S)

    def hold(self) -> None:
        self.control.send("hold", seconds=0.05)
        self.control.answer()

    def look(self) -> None:
        for command in ("status", "crashes", "connections", "releases", "hello"):
            self.control.send(command)
            self.control.answer()

    def diff(self) -> None:
        self.control.send("diff")
        self.control.answer()

    def connect(self) -> None:
        try:
            with Client(f"{self.folder}/s", "a line") as client:
                client.hear()
        except ConnectionError:
            pass  # it was a worker's that has just been killed

    def hold_relay(self) -> None:
        relays = running("log_relay.py", marked(self.mark))
        for pid in relays:
            os.kill(pid, signal.SIGSTOP)
        self.connect()


#: What is done, and how often among so many.
ACTS = {
    "look": 40, "connect": 40, "more": 6, "fewer": 6, "kill_worker": 8, "reload": 12,
    "bad_reload": 6, "rotate": 6, "hold": 6, "other_settings": 3, "bad_settings": 2,
    "unexecutable": 2, "diff": 3, "dry_run": 3, "upgrade": 2, "hold_relay": 2,
    "deploy": 6, "rollback": 3,
}  # fmt: skip


@pytest.mark.costly
@pytest.mark.parametrize("mode", ["connection", "listener"])
def test_no_call_of_the_resident_process_can_block_but_its_wait(
    protector: Callable[..., Protector],
    tmp_path: Path,
    marked_environment: dict[str, str],
    mode: str,
) -> None:
    release = Release(tmp_path / "daemon")
    (tmp_path / "web.toml").write_text(config(mode))
    release.becomes(*serving(mode))
    for name in ("a", "b"):
        (tmp_path / "releases" / name).mkdir(parents=True)
        Release(tmp_path / "releases" / name / "daemon").becomes(str(release.path))
    (tmp_path / "current").symlink_to("releases/a")
    daemon = protector(
        "--config", tmp_path / "web.toml", "--log-file", tmp_path / "log",
        "--control", tmp_path / "control", f"unix:{tmp_path}/s",
    )  # fmt: skip
    log = tmp_path / "log"
    eventually(lambda: log.exists() and "event=ready" in log.read_text(), "ready")
    life = Life(daemon, tmp_path, release, serving(mode), marked_environment[MARK])
    chance = random.Random(1)
    acts = chance.sample(list(ACTS), len(ACTS))  # each once, and then as it comes
    acts += chance.choices(list(ACTS), list(ACTS.values()), k=ROUNDS)
    try:
        with judged(daemon.pid, tmp_path / "calls") as judge:
            for what in acts:
                life.act(what)
    finally:
        life.control.close()
    daemon.stop()

    assert state_of(daemon.pid) in "ZX"
    assert sum(judge.seen.values()) > 30 * len(acts)
    assert judge.wrong == [], "\n".join(judge.wrong[:30])


def config(mode: str) -> str:
    return "\n".join(
        (
            'command = ["{release}/daemon"]',
            'releases = "releases"',
            'current = "current"',
            "workers = 2",
            f'handoff = "{mode}"',
            f'ready = "check:{IS_GOOD}"' if mode == "listener" else 'ready = "notify"',
            'health = "http:/"',
            'health-every = "100ms"',
            'kill-timeout = "1s"',
            'settle = "200ms"',
            'settle-check = "cat; echo it does well"',
            "",
        )
    )


def serving(mode: str) -> tuple[str, ...]:
    return TALKS if mode == "connection" else (sys.executable, "-c", LISTENING)


#: True of that one, and not of one that fails.
IS_GOOD = "grep -qa listener.accept /proc/$SOCKETPROTECTOR_WORKER_PID/cmdline"
#: Accepts from descriptor 3, and answers line by line.
LISTENING = """
import socket, sys, threading
def serve(client):
    with client, client.makefile("rwb") as lines:
        for line in lines:
            print(line.decode(), end="", flush=True)
            lines.write(line)
            lines.flush()
listener = socket.socket(fileno=3)
listener.setblocking(True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
