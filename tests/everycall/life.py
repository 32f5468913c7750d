"""One short life of a real protector, in which one system call fails or kills its process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.certificates import self_signed
from tests.running import (
    COMMAND,
    LISTENER,
    MARK,
    WORKERS,
    Client,
    eventually,
    marked,
    reserved_port,
    wait_gone,
)

HERE = Path(__file__).parent
PYTHON = sys.executable
#: How long something may take on a busy machine.
LIMIT_S = 20.0
ECHO = f"{PYTHON} {WORKERS / 'echo.py'}"
STDIO = f"""{PYTHON} -c 'import os; print("[%d] %s" % (os.getpid(), input()))'"""
#: It also speaks TLS, as the first byte of a connection says.
ANSWERS = f"""{PYTHON} -c '
from socketprotector_client import serve
def answer(connection, address):
    if connection.recv(1, 2) == b"\\x16":  # MSG_PEEK
        import os, ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(os.environ["EVERYCALL_CERTIFICATE"])
        connection = context.wrap_socket(connection, server_side=True)
    with connection.makefile("rwb") as lines:
        for line in lines:
            if line == b"hello\\n":
                lines.write(line)
                lines.flush()
            elif line == b"\\r\\n":
                lines.write(b"HTTP/1.0 200 OK\\r\\n\\r\\n")
                break
def serve_one(connection, address):
    try:
        answer(connection, address)
    except OSError:
        pass  # the client or the prober has gone
serve(serve_one)'"""
RELEASE = f"sh -c '. {{release}}/settings; exec {ECHO}'"
RELEASES = ("--releases", "releases", "--current", "live/current")
KILL = 0
OUTCOME = "event=(reloaded|reload-failed)"
#: What a life says of files that the next start and stop remove.
FILES_UNTIL_NEXT = "until the next start files are left"


def build(folder: Path) -> Path:
    """Compile the library that is preloaded, and make a certificate beside it."""
    self_signed(folder)
    library, new = folder / "faults.so", folder / "faults.new"
    compile_it = ("gcc", "-shared", "-fPIC", "-O1", "-o", new, HERE / "faults.c", "-ldl")
    subprocess.run(compile_it, check=True)
    return new.replace(library)


@dataclass(frozen=True)
class Operation:
    """What happens while the calls count."""

    act: Callable[[Life], None]
    options: tuple[str, ...] = ()
    command: str = ECHO
    #: Whether clients come all the time, and lose nothing; else the operation is a start or a stop.
    load: bool = True


@dataclass
class Life:
    """A protector in a folder of its own."""

    folder: Path
    library: Path
    operation: Operation
    plan: str = ""
    mark: dict[str, str] = field(default_factory=dict)
    port: int = 0
    guard: int = 0  # its pid, once the start has succeeded
    lost: int = 0
    is_second: bool = False  # another start, to see whether it clears up
    problems: list[str] = field(default_factory=list)
    _reserved: socket.socket = field(init=False)
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.plan:
            (self.folder / "plan").write_text(self.plan)
        self._reserved = reserved_port()
        self.port = self._reserved.getsockname()[1]
        (self.folder / "run").mkdir()
        for name in ("1", "2", "bad"):
            release = self.folder / "releases" / name
            release.mkdir(0o755, parents=True)
            (release / "settings").write_text("exit 7" if name == "bad" else "")
        (self.folder / "live").mkdir(0o755)
        (self.folder / "live" / "current").symlink_to("../releases/1")

    # -- actions ----------------------------------------------------------

    @property
    def log(self) -> str:
        file = self.folder / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def pid(self) -> int:
        with suppress(OSError, ValueError):
            return int((self.folder / "pid").read_text())
        return 0

    @property
    def protector(self) -> int:
        """The protector that runs now; under a guard that is not the process of the pid file."""
        found = re.findall(r"event=(?:start|resumed|adopted) pid=(\d+)", self.log)
        return int(found[-1])

    def _environment(self, *, faults: bool) -> dict[str, str]:
        found = {**os.environ, **self.mark, "XDG_RUNTIME_DIR": str(self.folder / "run")}
        found["EVERYCALL_CERTIFICATE"] = str(self.library.with_name("both.pem"))
        if faults:
            found |= {"EVERYCALL": str(self.folder), "LD_PRELOAD": str(self.library)}
        return found

    def start(self, *, faults: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the launching process to its end."""
        words = ("--guard", "--pid-file", "pid", "--log-file", "log", "--start-timeout", "8s")
        shell = ("sh", "-c", f"test -e bad && exit 1; exec {self.operation.command}")
        with (self.folder / "err").open("a") as err:
            done = subprocess.run(
                [*COMMAND, *words, *self.operation.options, f"127.0.0.1:{self.port}", "--", *shell],
                cwd=self.folder,
                env=self._environment(faults=faults),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                check=False,
                timeout=3 * LIMIT_S,
            )
        return subprocess.CompletedProcess((), done.returncode, "", self.said)

    @property
    def said(self) -> str:
        return (self.folder / "err").read_text(errors="replace")

    def ctl(self, *words: str, expected: int = 0) -> int:
        """Run socketprotectorctl, under faults as well; return its status.

        expected: the status without a fault.
        """
        control = (PYTHON, "-m", "socketprotector.ctl", "--pid-file", "pid", *words)
        try:
            done = subprocess.run(
                control,
                cwd=self.folder,
                env=self._environment(faults=True),
                capture_output=True,
                text=True,
                check=False,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            self.problems.append(f"{words[0]} did not end")
            return 1
        self.look_for_tracebacks(done.stderr)
        said = (done.stderr + done.stdout).strip()
        if done.returncode > 0 and not said:
            self.problems.append(f"{words[0]} ended with status {done.returncode} and no line")
        if done.returncode != expected and not self.plan:  # without a fault it must do its work
            self.problems.append(f"{words[0]} ended with status {done.returncode}: {said}")
        return done.returncode

    def send(self, number: signal.Signals, pid: int = 0) -> None:
        with suppress(ProcessLookupError):
            if target := pid or self.pid:  # 0 would be our own group
                os.kill(target, number)

    def until(self, fact: Callable[[], object], limit_s: float = LIMIT_S) -> bool:
        """Wait for a fact; return whether it came."""
        try:
            eventually(lambda: bool(fact()), "it", limit_s)
        except AssertionError:
            return False
        return True

    def says(self, pattern: str, times: int = 1) -> bool:
        return self.until(lambda: len(re.findall(pattern, self.log)) >= times, LIMIT_S / 2)

    def must_say(self, pattern: str, times: int = 1) -> None:
        """Wait for a line of the log, which only a kill may prevent."""
        if not self.says(pattern, times) and not self.kills:
            dropped = re.findall(r"dropped_lines=\d+", self.log)
            self.problems.append(f"the log has no line {pattern} {' '.join(dropped)}")

    @property
    def kills(self) -> bool:
        """Whether the fault was a kill, so that an order or a line may be lost."""
        return self.plan.endswith(f" {KILL}") and self.fired

    @property
    def release(self) -> str:
        return (self.folder / "live" / "current").readlink().name

    def answers(self) -> bool:
        """Return whether a new connection is answered."""
        with suppress(OSError), Client(("127.0.0.1", self.port), "hello", timeout_s=LIMIT_S) as it:
            return "hello" in it.hear()
        return False

    def _clients(self) -> None:
        while not self._over.wait(0.02):
            if not self.answers():
                self.lost += 1

    # -- a life -------------------------------------------------------------------------

    def arm(self) -> None:
        (self.folder / "armed").touch()

    def disarm(self) -> None:
        (self.folder / "armed").unlink(missing_ok=True)

    @property
    def fired(self) -> bool:
        return (self.folder / "fired").exists()

    @property
    def fired_in_guard(self) -> bool:
        return self.fired and (self.folder / "fired").read_text().strip() == str(self.guard)

    def live(self) -> list[str]:
        """Start, act, stop, and look for leftovers; return the problems."""
        with self._reserved:
            return self._live()

    def _live(self) -> list[str]:
        operation = self.operation
        starts = operation.act is start
        if starts:
            self.arm()
        begun = self.start()
        if starts:
            self.disarm()
        if begun.returncode != 0 and not (starts and self.fired):
            return [f"the start failed: {begun.stderr}"]
        if begun.returncode != 0:
            self._start_failed(begun)
            return self.problems
        self.guard = self.pid
        clients = threading.Thread(target=self._clients)
        if operation.load:
            clients.start()
        try:
            if not starts:
                self.arm()
                operation.act(self)
                self.disarm()
            if operation.act is not stop:
                self._serves_and_reloads()
        finally:
            self._over.set()
            if operation.load:
                clients.join()
        self._end()
        # A worker that dies has at most the one client of that time.
        if self.lost > int(self.kills) + (operation.act is death):
            self.problems.append(f"{self.lost} connections lost")
        return self.problems

    def _start_failed(self, begun: subprocess.CompletedProcess[str]) -> None:
        lines = begun.stderr.strip().splitlines()
        if begun.returncode >= 0 and not lines:
            self.problems.append(f"a start failed with status {begun.returncode} and no line")
        self._end()
        if not self.is_second:
            self._start_again([])

    def _start_again(self, files: list[str]) -> None:
        """Start and stop once more, without a fault, which also clears up what a kill has left."""
        self.is_second = True
        (self.folder / "err").write_text("")
        before, self.problems = self.problems, []
        again = self.start(faults=False)
        if again.returncode != 0:
            self.problems.append(f"the next start failed: {again.stderr}")
        else:
            self._end()
        if files and not self.problems:
            before = [each for each in before if not each.startswith("files are left")]
            before.append(f"{FILES_UNTIL_NEXT}: {files}")
        self.problems = before + self.problems

    def _serves_and_reloads(self) -> None:
        if not self.until(self.answers):
            self.problems.append("it does not serve")
        # By a signal: a protector may run without a control socket.
        times = len(re.findall("event=reloaded", self.log))
        self.send(signal.SIGHUP)
        if self.says("event=reloaded", times + 1):
            return
        if "event=guard-died" in self.log:  # a killed guard may have swallowed our HUP
            self.send(signal.SIGHUP)
            if self.says("event=reloaded", times + 1):
                return
        self.problems.append("the next reload failed")

    def _end(self) -> None:
        value = self.mark[MARK]
        until = time.monotonic() + LIMIT_S
        self.send(signal.SIGTERM)
        # After a kill a start may go on for a moment, in processes that fork.
        while (pids := marked(value)) and time.monotonic() < until:
            wait_gone(pids[:1], LIMIT_S / 4)
        if pids:
            left = [
                f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()[:80]!r}"
                for pid in marked(value)
                if Path(f"/proc/{pid}").exists()
            ]
            self.problems.append(f"processes are left: {left}")
            for pid in marked(value):
                self.send(signal.SIGKILL, pid)
            wait_gone(marked(value), LIMIT_S)
        ours = {"armed", "fired", "plan", "sites", "log", "err", "run", "bad", "releases", "live"}
        files = {path.name for path in self.folder.iterdir()} - ours
        kept = {"current", "current.history", "current.lock"}
        files |= {path.name for path in (self.folder / "live").iterdir()} - kept
        files |= {path.name for path in (self.folder / "run").rglob("*") if not path.is_dir()}
        if files:
            self.problems.append(f"files are left: {sorted(files)}")
            if not self.is_second:
                self._start_again(sorted(files))
        self.look_for_tracebacks(self.log + self.said)

    def look_for_tracebacks(self, text: str) -> None:
        found = re.search(r"Traceback.*?(\w*(?:Error|Exception)\b[^\n]*)", text, re.DOTALL)
        if "Traceback" in text:
            self.problems.append(f"a traceback: {found[0][-3000:] if found else text[-700:]}")

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# -- the operations ----------------------------------------------------------------------


def start(life: Life) -> None:
    """The start itself: see Life.live()."""


def reload(life: Life) -> None:
    life.send(signal.SIGHUP)
    life.must_say(OUTCOME)
    if "event=reloaded" in life.log:
        life.must_say("event=drained")


def failed_reload(life: Life) -> None:
    (life.folder / "bad").touch()
    life.send(signal.SIGHUP)
    life.must_say("event=reload-failed")
    (life.folder / "bad").unlink()


def canary(life: Life) -> None:
    if life.ctl("reload", "--canary", "50%", "--for", "500ms", "--timeout", "15s") == 0:
        life.must_say("event=reloaded")


def promote(life: Life) -> None:
    _canary_until(life, "promote", "event=reloaded")


def rollback(life: Life) -> None:
    _canary_until(life, "rollback", "event=reload-failed")


def _canary_until(life: Life, order: str, line: str) -> None:
    # The canary would last longer than must_say() waits.
    if life.ctl("reload", "--no-wait", "--canary", "50%", "--for", "60s"):
        life.ctl("rollback")  # a command that is killed as it reports has begun a canary
        return
    life.must_say("event=(route .*sharing|reload-failed)")
    if "event=reload-failed" in life.log:
        return
    if life.ctl(order) == 0:
        life.must_say(line)
    else:  # the fault may have ended the generation that it would go back to
        life.ctl("promote" if order == "rollback" else "rollback")


def deploy(life: Life) -> None:
    if life.ctl("deploy", "2", "--timeout", "15s") == 0 and life.release != "2":
        life.problems.append(f"a deploy succeeded, and the release is {life.release}")


def failed_deploy(life: Life) -> None:
    if life.ctl("deploy", "bad", "--timeout", "15s", expected=3) == 0:
        life.problems.append("a deploy of a bad release succeeded")
    if life.release == "bad" and not life.plan:
        life.problems.append("the bad release is current")


def hold(life: Life) -> None:
    if life.ctl("hold", "--for", "300ms") == 0:
        life.must_say("event=released")


def upgrade(life: Life) -> None:
    life.send(signal.SIGUSR2)
    life.must_say("event=(resumed|upgrade-failed)")


def recovery(life: Life) -> None:
    life.send(signal.SIGKILL, life.protector)
    life.must_say("event=resumed")
    life.until(life.answers)


def rotation(life: Life) -> None:
    (life.folder / "log").rename(life.folder / "sites.log")
    life.send(signal.SIGUSR1)
    old = life.folder / "sites.log"
    if not life.says("event=reopened"):
        if not life.kills and "event=reopen-failed" not in old.read_text(errors="replace"):
            life.problems.append("the log has no line about its rotation")
        life.send(signal.SIGUSR1)  # as logrotate's next run does
        life.must_say("event=reopened")
    text = old.read_text(errors="replace") + life.log
    old.unlink()
    life.look_for_tracebacks(text)


def stop(life: Life) -> None:
    life.send(signal.SIGTERM)
    if wait_gone(marked(life.mark[MARK]), LIMIT_S) and not life.kills:
        life.problems.append("a stop had no effect")


def death(life: Life) -> None:
    pids = re.findall(r"event=spawned .*\bpid=(\d+)", life.log)
    life.send(signal.SIGKILL, int(pids[-1]))
    life.must_say("event=worker-ready", 2)


OPERATIONS = {
    "start": Operation(start, load=False),
    "reload": Operation(reload),
    "failed-reload": Operation(failed_reload),
    "canary": Operation(canary),
    "rolling": Operation(
        reload, ("--workers", "2", "--reload-order", "rolling", "--drain-timeout", "9s")
    ),
    "promote": Operation(promote, ("--settle", "300ms")),
    "rollback": Operation(rollback),
    "probe": Operation(reload, ("--ready", "http:/"), ANSWERS),
    "probe-tls": Operation(reload, ("--ready", "https:/"), ANSWERS),
    "deploy": Operation(deploy, RELEASES, RELEASE),
    "failed-deploy": Operation(failed_deploy, RELEASES, RELEASE),
    "hold": Operation(hold),
    "upgrade": Operation(upgrade),
    "recovery": Operation(recovery),
    "rotation": Operation(rotation),
    "stop": Operation(stop, load=False),
    "death": Operation(death),
    "stdio": Operation(reload, ("--handoff", "stdio"), STDIO),
    "listener-reload": Operation(reload, LISTENER),
    "listener-hold": Operation(hold, LISTENER),
    "listener-upgrade": Operation(upgrade, LISTENER),
    "listener-recovery": Operation(recovery, LISTENER),
    "listener-stop": Operation(stop, LISTENER, load=False),
}
