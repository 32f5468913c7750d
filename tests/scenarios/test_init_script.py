"""The init script, really run, in each shell there is, against a scratch root."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests import needs
from tests.load import Load
from tests.procfs import children_of, environment_of, name_of
from tests.rounds import rounds
from tests.running import (
    DEADLINE_S,
    FAIR_START_S,
    ROOT,
    WORKERS,
    Client,
    ask,
    eventually,
    wait_gone,
)
from tests.scenarios.releases import COMMAND, Releases
from tests.scenarios.tools import pid_in
from tests.unit.ctl.conftest import run as ctl_run

SCRIPT = ROOT / "init.d" / "socketprotector"
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)] or ["sh"]
#: What the script may ask of a machine; flock is not among it.
TOOLS = "cat chmod chown cksum dd grep id ln ls mkdir rm rmdir sed sh sleep sort tail tr"
ECHO = f"{sys.executable} {WORKERS / 'echo.py'}"
#: So many connections before and after what must fail none.
SERVED = rounds(20, 100)


class Machine:
    """A scratch root with the program installed, and what the script does to it."""

    def __init__(self, root: Path, shell: str, environment: dict[str, str]) -> None:
        self.root = root
        self._shell = shell
        self._environment = {**os.environ, **environment, "SOCKETPROTECTOR_ROOT": str(root)}
        self.program = root / "usr" / "bin" / "SocketProtector"
        self.program.parent.mkdir(parents=True)
        tool = self.program.with_name("socketprotectorctl")
        for program, module in ((self.program, "socketprotector"), (tool, "socketprotector.ctl")):
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
            program.chmod(0o755)
        (root / "etc" / "default" / "socketprotector.d").mkdir(parents=True)
        (root / "run").mkdir()
        self.output = ""

    def configure(self, name: str = "web", command: str = ECHO, **more: str) -> Path:
        """Write an instance's file: more settings, with or without the long prefix."""
        file = self.root / "etc" / "default" / "socketprotector"
        if name != "default":
            file = Path(f"{file}.d") / name
        settings = {"LISTEN": "127.0.0.1:0", "COMMAND": command, **more}
        file.write_text(
            "".join(
                f'{"" if key.startswith("MY_") else "SOCKETPROTECTOR_"}{key}="{value}"\n'
                for key, value in settings.items()
            )
        )
        return file

    def run(self, *words: str, path: Path | None = None, before: tuple[str, ...] = ()) -> int:
        """Run the script; return its exit status, and keep what it said.

        before: the words of a command that executes it.
        """
        environment = {**self._environment, **({"PATH": str(path)} if path else {})}
        done = subprocess.run(
            [*before, shutil.which(self._shell) or "sh", str(SCRIPT), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * DEADLINE_S,
            check=False,
            start_new_session=True,  # a signal to its own group ends nothing else
        )
        self.output = done.stdout
        print(f"$ socketprotector {' '.join(words)}\n{done.stdout}[{done.returncode}]")
        return done.returncode

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Begin to run the script, as run() does."""
        return subprocess.Popen(
            [shutil.which(self._shell) or "sh", str(SCRIPT), *words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def start(self, *names: str) -> tuple[str, int]:
        """Start instances; return the address that the first of them listens on."""
        assert self.run("start", *names) == 0
        return self.address()

    def address(self) -> tuple[str, int]:
        """The address that the last start has told."""
        found = re.search(r"listening on tcp:127\.0\.0\.1:(\d+)", self.output)
        assert found, self.output
        return "127.0.0.1", int(found[1])

    def run_directory(self, name: str = "web") -> Path:
        return self.root / "run" / "socketprotector" / name

    def pid_file(self, name: str = "web") -> Path:
        return self.run_directory(name) / "pid"

    def pid(self, name: str = "web") -> int:
        return int(self.pid_file(name).read_text())

    def tools(self, *more: str) -> Path:
        """A folder for PATH with what the script needs, and no more than this beside it."""
        tools = self.root / "tools"
        tools.mkdir()
        for tool in (*TOOLS.split(), *more):
            (tools / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
        return tools

    def leave_pid_file(self, content: str) -> None:
        """What a protector leaves behind that was killed."""
        self.run_directory().mkdir(parents=True)
        self.pid_file().write_text(content)

    def end(self) -> None:
        """End at once whatever still runs, by a pid file that a living protector holds."""
        for file in (self.root / "run").glob("socketprotector/*/pid"):
            if self.run("status", file.parent.name) == 0:
                pid = int(file.read_text())
                os.kill(pid, signal.SIGINT)
                assert wait_gone([pid]) == []


@pytest.fixture(params=SHELLS)
def machine(
    request: pytest.FixtureRequest, marked_environment: dict[str, str]
) -> Iterator[Machine]:
    # Not tmp_path: another user (SOCKETPROTECTOR_USER) must get there.
    with tempfile.TemporaryDirectory(prefix="sp-root-") as directory:
        root = Path(directory)
        root.chmod(0o755)
        machine = Machine(root, request.param, marked_environment)
        yield machine
        machine.end()


def worker_of(address: tuple[str, int]) -> int:
    """The pid that answers."""
    found = re.match(r"\[(\d+)\] hello", ask(address))
    assert found
    return int(found[1])


def named(name: str, pids: list[int]) -> list[int]:
    """Those of the processes, and of their descendants, that have this name."""
    found = [pid for pid in pids if name_of(pid) == name]
    for pid in pids:
        with suppress(OSError):  # it has ended
            found += named(name, children_of(pid))
    return found


def release(machine: Machine, text: str) -> str:
    """Install a release of the daemon, a shell script, in the place of the one before."""
    daemon = machine.root / "daemon"
    new = machine.root / "daemon.new"
    new.write_text(f"#!/bin/sh\n{text}\n")
    new.chmod(0o755)
    new.rename(daemon)
    return str(daemon)


def gated(machine: Machine, then: str) -> tuple[str, Path, Path]:
    """Install a daemon that waits for a file.  Returns the daemon, that file, one made before."""
    gate, reached = machine.root / "gate", machine.root / "reached"
    wait = f"touch {reached}\nwhile [ ! -e {gate} ]; do sleep 0.1; done\n"
    return release(machine, wait + then), gate, reached


def two_starts(
    machine: Machine, reached: Path
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Begin two starts; the second waits for the first."""
    first = machine.begin("start")
    eventually(reached.exists, "the first start waits for its daemon")
    second = machine.begin("start")
    assert second.stdout is not None
    assert "another start or restart is in progress" in second.stdout.readline()
    return first, second


# --- start, status, stop ------------------------------------------------------


def test_start_returns_when_the_daemon_serves_and_stop_when_all_has_ended(machine: Machine) -> None:
    """And what is asked of a state that is there already succeeds."""
    machine.configure()

    address = machine.start()

    worker = worker_of(address)
    pid = machine.pid()
    assert f"web: started (pid {pid})" in machine.output
    assert machine.run("status") == 0
    assert f"web: is running (pid {pid})" in machine.output
    assert machine.run("start") == 0
    assert f"is running already (pid {pid})" in machine.output
    assert machine.pid() == pid

    assert machine.run("stop") == 0

    assert machine.output == "socketprotector: web: stopped\n"
    assert wait_gone([worker], 0.0) == []
    assert wait_gone([pid], 5.0) == []  # it has let go of the pid file, and ends
    assert machine.run("stop") == 0
    assert "is not running" in machine.output
    assert not machine.run_directory().exists()
    assert machine.run("status") == 3


def test_its_output_may_be_closed(machine: Machine) -> None:
    machine.configure()
    closed = ("sh", "-c", 'exec "$@" >&- 2>&-', "sh")
    for action, status in (("status", 3), ("start", 0), ("status", 0), ("stop", 0)):
        assert machine.run(action, before=closed) == status


def test_the_lines_of_the_file_are_the_environment_of_the_daemon_but_not_our_own(
    machine: Machine,
) -> None:
    machine.configure(MY_COLOUR="light blue", OPTIONS="--workers 1")

    worker = worker_of(machine.start())

    environment = environment_of(worker)
    assert environment["MY_COLOUR"] == "light blue"
    assert "SOCKETPROTECTOR_OPTIONS" not in environment
    assert Path(f"/proc/{worker}/cwd").readlink() == Path("/")


@pytest.mark.costly
def test_a_line_of_the_file_changes_nothing_in_the_script_whatever_its_name(
    machine: Machine,
) -> None:
    lines = {"MY_COLOUR": "blue", "name": "shop", "ROOT": "/srv", "PATH": "/srv/bin", "IFS": ":"}
    file = machine.configure()
    with file.open("a") as opened:
        for each, value in {**lines, "pid_file": "/srv/pid", "user": "app"}.items():
            opened.write(f"{each}={value}\n")

    worker = worker_of(machine.start())

    assert f"web: started (pid {machine.pid()})" in machine.output
    assert "not found" not in machine.output
    environment = environment_of(worker)
    assert {each: environment[each] for each in lines if each != "IFS"} == {
        each: value for each, value in lines.items() if each != "IFS"
    }
    assert machine.run("reload") == 0
    assert "has changed since" not in machine.output
    machine.configure(PATH="/srv/bin", OPTIONS="--workers 2")
    assert machine.run("restart") == 0
    assert "not started with the settings" in machine.output
    assert machine.run("stop") == 0
    assert not machine.run_directory().exists()


@needs.ANOTHER_USER
def test_the_program_takes_no_modules_from_the_callers_folders(machine: Machine) -> None:
    program, seen = machine.root / "program", machine.root / "seen"
    program.write_text(f"#!/bin/sh\nenv >{seen}\nexit 1\n")
    program.chmod(0o755)
    machine.configure(PROGRAM=str(program))
    planted = [f"PYTHON{each}=/planted" for each in ("PATH", "HOME", "USERBASE", "STARTUP")]

    assert machine.run("start", before=("env", *planted)) == 1

    found = seen.read_text()
    assert "SOCKETPROTECTOR_STATUS_GROUP=socketprotector-status\n" in found
    assert "/planted" not in found


@needs.ANOTHER_USER
def test_the_run_directory_is_the_users_and_so_is_the_daemon(machine: Machine) -> None:
    # No Python, so no guard: it may be installed where the user nobody cannot go.
    machine.configure(
        command="sleep 1000",
        USER="nobody",
        GUARD="no",
        OPTIONS="--ready after:1ms --stop-timeout 0 --no-log-relay "
        f"--log-file {machine.root / 'log'}",
    )

    machine.start()

    assert machine.run_directory().owner() == "nobody"
    pid = machine.pid()
    children = children_of(pid)  # the worker, and maybe the relay of what it writes
    assert children
    for process in (pid, *children):
        assert Path(f"/proc/{process}").owner() == "nobody"
    assert machine.run("stop") == 0
    assert not machine.run_directory().exists()


@pytest.mark.costly
def test_it_works_without_flock(machine: Machine) -> None:
    tools = machine.tools()
    machine.configure()

    assert machine.run("start", path=tools) == 0
    assert machine.run("status", path=tools) == 0
    assert machine.run("reload", path=tools) == 0
    assert machine.run("stop", path=tools) == 0
    assert machine.run("status", path=tools) == 3

    machine.leave_pid_file(f"{os.getpid()}\n")
    assert machine.run("status", path=tools) == 1
    assert machine.run("stop", path=tools) == 0
    assert machine.run("status", path=tools) == 3


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
@pytest.mark.costly
def test_a_killed_protector_comes_back_and_is_found_upgraded_and_stopped(
    machine: Machine, flock: bool
) -> None:
    path = None if flock else machine.tools()
    machine.configure()
    assert machine.run("start", path=path) == 0
    address, guard = machine.address(), machine.pid()
    [first] = children_of(guard)
    worker = worker_of(address)

    os.kill(first, signal.SIGKILL)

    eventually(lambda: set(children_of(guard)) - {first, worker} != set(), "another protector")
    assert worker_of(address) == worker
    assert machine.run("reload", path=path) == 0
    assert machine.run("restart", path=path) == 0
    assert f"upgraded: pid {guard}" not in machine.output, "the protector's, not the guard's"
    assert machine.pid() == guard
    assert machine.run("status", path=path) == 0
    assert machine.run("stop", path=path) == 0
    assert wait_gone([guard], 0.0) == []
    assert machine.run("status", path=path) == 3


def test_without_a_guard_there_is_the_protector_alone(machine: Machine) -> None:
    machine.configure(GUARD="no")
    address = machine.start()

    assert worker_of(address) in children_of(machine.pid())


@pytest.mark.costly
def test_stop_ends_a_draining_generation_too(machine: Machine) -> None:
    machine.configure(OPTIONS="--stop-timeout 100ms --kill-timeout 100ms")
    address = machine.start()
    old = worker_of(address)
    with Client(address) as held:
        assert held.ask("mine") == f"[{old}] mine"
        with Load(f"127.0.0.1:{address[1]}", concurrency=1) as load:
            assert machine.run("reload") == 0
            load.wait_for(lambda now: set(now.pids) - {old} != set(), DEADLINE_S)
        new = worker_of(address)
        assert held.ask("still mine") == f"[{old}] still mine"

        assert machine.run("stop") == 0

    assert wait_gone([old, new], 0.0) == []


ENDLESS_STOP = "--stop-timeout 10m --kill-timeout 100ms"


@pytest.mark.parametrize("guard", ["yes", "no"], ids=["guard", "no guard"])
@pytest.mark.costly
def test_stop_says_when_the_end_does_not_come_in_time_and_a_second_one_cuts_no_client(
    machine: Machine, guard: str
) -> None:
    machine.configure(GUARD=guard, OPTIONS=ENDLESS_STOP, STOP_WAIT="1")
    address = machine.start()
    pid, worker = machine.pid(), worker_of(address)
    with Client(address) as held:
        assert held.ask("mine") == f"[{worker}] mine"

        assert machine.run("stop") == 1

        assert "a stop is in progress" not in machine.output
        assert f"has not ended yet (pid {pid})" in machine.output
        assert held.ask("still mine") == f"[{worker}] still mine"
        assert machine.run("start") == 1, "it serves no new client"
        assert f"is stopping (pid {pid})" in machine.output
        for action in ("stop", "restart", "try-restart"):
            assert machine.run(action) == 1
            assert f"a stop is in progress (pid {pid}): waiting for its end" in machine.output
            assert "is still serving" not in machine.output
            assert held.ask("still mine") == f"[{worker}] still mine"

        assert f"kill -INT {pid} ends them and their connections" in machine.output
        os.kill(pid, signal.SIGINT)
        assert wait_gone([pid, worker]) == []
    assert machine.run("restart") == 0
    assert worker_of(machine.address()) != worker
    assert machine.run("stop") == 0, "what was a stop of the one before is none of this one"
    assert machine.output == "socketprotector: web: stopped\n"


@pytest.mark.costly
def test_a_restart_during_a_stop_waits_for_the_last_client_and_starts(machine: Machine) -> None:
    machine.configure(GUARD="no", OPTIONS=ENDLESS_STOP)
    address = machine.start()
    pid, worker = machine.pid(), worker_of(address)
    control = machine.run_directory() / "control"
    with Client(address) as held:
        held.ask("mine")
        # Another program's stop: the script knows of it by the control socket alone.
        assert ctl_run("--control", str(control), "stop", "--no-wait").status == 0
        with machine.begin("restart") as script:
            eventually(lambda: named("sleep", [script.pid]) != [], "a script that waits")
            assert held.ask("still mine") == f"[{worker}] still mine"
            held.close()
            machine.output, _ = script.communicate(timeout=2 * DEADLINE_S)

    assert script.returncode == 0, machine.output
    assert f"a stop is in progress (pid {pid}): waiting for its end" in machine.output
    assert worker_of(machine.address()) != worker


def test_a_worker_that_says_stopping_does_not_make_the_protector_stop(machine: Machine) -> None:
    program = machine.root / "says.py"
    program.write_text(
        "from socketprotector_client import notify, serve\n"
        'notify("STATUS=stopping")\n'
        "serve(lambda client, peer: None)\n"
    )
    machine.configure(command=f"{sys.executable} {program}")
    machine.start()

    assert machine.run("start") == 0
    assert "is running already" in machine.output


@pytest.mark.costly
def test_stop_names_a_protector_that_is_suspended(machine: Machine) -> None:
    machine.configure(STOP_WAIT="0")
    machine.start()
    pid = machine.pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        assert machine.run("stop") == 1
        assert f"it is suspended; kill -CONT {pid} lets it stop" in machine.output
    finally:
        os.kill(pid, signal.SIGCONT)
    assert not wait_gone([pid])


# --- reload -------------------------------------------------------------------


@pytest.mark.parametrize("action", ["reload", "force-reload"])
@pytest.mark.costly
def test_a_reload_under_load_fails_no_client_and_says_that_it_worked(
    machine: Machine, action: str
) -> None:
    machine.configure(OPTIONS="--workers 2")
    address = machine.start()
    pid = machine.pid()
    with Load(f"127.0.0.1:{address[1]}", concurrency=8) as load:
        old = set(load.wait_for(lambda now: now.connections > SERVED, DEADLINE_S).pids)

        assert machine.run(action) == 0

        assert "reloaded: generation 2 is serving in place of generation 1" in machine.output
        now = load.wait_for(lambda now: set(now.pids) - old != set(), DEADLINE_S)
        load.wait_for(lambda later: later.connections > now.connections + SERVED, DEADLINE_S)
    assert load.snapshot().failures == ()
    assert machine.pid() == pid
    assert worker_of(address) not in old


@pytest.mark.costly
def test_a_reload_does_not_wait_for_clients_that_are_still_being_served(machine: Machine) -> None:
    machine.configure()
    address = machine.start()
    with Client(address) as held:
        old = held.ask("mine")

        assert machine.run("reload") == 0

        assert "reloaded: generation 2 is serving in place of generation 1" in machine.output
        assert held.ask("mine") == old


@pytest.mark.costly
def test_a_reload_whose_outcome_does_not_come_in_time_is_no_success(machine: Machine) -> None:
    daemon = release(machine, f"exec {ECHO}")
    machine.configure(command=daemon, RELOAD_WAIT="1")
    address = machine.start()
    release(machine, "exec sleep 1000")

    assert machine.run("reload") == 1

    assert worker_of(address)
    release(machine, f"exec {ECHO}")


def test_without_a_control_socket_a_reload_is_a_signal(machine: Machine) -> None:
    machine.configure(OPTIONS="--no-control")
    address = machine.start()
    with Load(f"127.0.0.1:{address[1]}", concurrency=1) as load:
        old = set(load.wait_for(lambda now: now.connections > 0, DEADLINE_S).pids)

        assert machine.run("reload") == 0

        assert "reload signal delivered" in machine.output
        load.wait_for(lambda now: set(now.pids) - old != set(), DEADLINE_S)


@pytest.mark.parametrize("broken", ["exit 3", "exec sleep 1000"], ids=["exits", "hangs"])
def test_a_reload_to_a_release_that_does_not_start_is_reported_and_the_old_one_serves_on(
    machine: Machine, broken: str
) -> None:
    daemon = release(machine, f"exec {ECHO}")
    machine.configure(command=daemon, OPTIONS=f"--start-timeout {FAIR_START_S}s", RELOAD_WAIT="30")
    address = machine.start()
    with Load(f"127.0.0.1:{address[1]}", concurrency=4) as load:
        load.wait_for(lambda now: now.connections > 10, DEADLINE_S)
        release(machine, broken)

        assert machine.run("reload") == 1

        assert "web: not reloaded: generation 2 failed" in machine.output
        assert "generation 1 is still serving" in machine.output
        now = load.snapshot()
        load.wait_for(lambda later: later.connections > now.connections + 10, DEADLINE_S)
    assert load.snapshot().failures == ()
    assert len(load.snapshot().pids) == 1


@pytest.mark.costly
def test_a_failed_reload_shows_the_end_of_the_traceback(machine: Machine) -> None:
    daemon = release(machine, f"exec {ECHO}")
    machine.configure(command=daemon, RELOAD_WAIT="30")
    machine.start()
    release(machine, f"exec {sys.executable} -c 'raise RuntimeError(\"no such table\")'")

    assert machine.run("reload") == 1

    assert "RuntimeError: no such table" in machine.output


def test_a_reload_of_what_does_not_run_is_7(machine: Machine) -> None:
    machine.configure()

    assert machine.run("reload") == 7
    assert machine.run("force-reload", "web") == 7


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ('MY_NAME="', 6, "not reloaded: cannot read"),
        ("SOCKETPROTECTOR_PROGRAM=/no/SocketProtector", 5, "there is no /no/SocketProtector"),
    ],
    ids=["settings", "program"],
)
def test_a_reload_that_finds_no_socketprotectorctl_by_the_settings_sends_nothing(
    machine: Machine, more: str, status: int, said: str
) -> None:
    elsewhere = machine.root / "opt"
    machine.program.parent.rename(elsewhere)
    daemon = release(machine, f"exec {ECHO}")
    file = machine.configure(command=daemon, PROGRAM=str(elsewhere / machine.program.name))
    address = machine.start()
    worker = worker_of(address)
    whole = file.read_text()
    file.write_text(f"{whole}{more}\n")
    release(machine, "exit 3")

    assert machine.run("reload") == status

    assert said in machine.output
    assert "signal delivered" not in machine.output
    release(machine, f"exec {ECHO}")
    file.write_text(whole)
    assert machine.run("reload") == 0
    assert "generation 2 is serving in place of generation 1" in machine.output, "the first one"
    assert worker_of(address) != worker


# --- restart ------------------------------------------------------------------


@pytest.mark.parametrize("action", ["restart", "try-restart"])
def test_a_restart_with_the_settings_of_the_start_is_an_upgrade_and_a_reload_and_fails_no_client(
    machine: Machine, action: str
) -> None:
    file = machine.configure(OPTIONS="--workers 2")
    address = machine.start()
    pid = machine.pid()
    # What the protector is not started with is no other setting.
    file.write_text(f"# web\n{file.read_text()}SOCKETPROTECTOR_STOP_WAIT=70\n")
    with Load(f"127.0.0.1:{address[1]}", concurrency=8) as load:
        old = set(load.wait_for(lambda now: now.connections > SERVED, DEADLINE_S).pids)

        assert machine.run(action) == 0

        assert "upgraded: pid " in machine.output
        assert "reloaded: generation 2 is serving in place of generation 1" in machine.output
        now = load.wait_for(lambda now: set(now.pids) - old != set(), DEADLINE_S)
        load.wait_for(lambda later: later.connections > now.connections + SERVED, DEADLINE_S)
    assert load.snapshot().failures == ()
    assert machine.pid() == pid
    assert worker_of(address) not in old


@pytest.mark.costly
def test_a_restart_whose_upgrade_or_reload_fails_says_so_and_the_old_one_serves_on(
    machine: Machine,
) -> None:
    machine.configure(command=release(machine, f"exec {ECHO}"))
    address = machine.start()
    first = worker_of(address)

    release(machine, "exit 7")
    assert machine.run("restart") == 1
    assert "exited with status 7" in machine.output
    assert worker_of(address) == first

    # `ps` shows no other program: the file is what an upgrade executes.
    whole = machine.program.read_text()
    machine.program.write_text("#!/bin/sh\nexit 1\n")
    release(machine, f"exec {ECHO}")
    assert machine.run("restart") in (0, 1)  # whether it can be told from the one before
    machine.program.write_text(whole)
    assert worker_of(address)


@pytest.mark.costly
def test_a_restart_and_a_start_take_the_release_that_was_proved_last(machine: Machine) -> None:
    releases = Releases(machine.root / "srv")
    machine.configure(command=COMMAND[0], OPTIONS=" ".join(releases.options))
    address = machine.start()
    control = ("--control", str(machine.run_directory() / "control"))

    def found() -> tuple[str, str]:
        pid = pid_in(ask(address))
        return environment_of(pid)["SOCKETPROTECTOR_RELEASE"], releases.named

    assert found() == ("1", "1")
    assert ctl_run(*control, "deploy", "2").status == 0
    assert ctl_run(*control, "deploy", "3").status == 0
    assert ctl_run(*control, "deploy", "bad").status == 3
    assert machine.run("restart") == 0
    assert "upgraded: pid " in machine.output
    assert found() == ("3", "3")
    assert ctl_run(*control, "rollback").status == 0
    assert found() == ("2", "2")
    assert machine.run("reload") == 0
    assert machine.run("stop") == 0
    address = machine.start()
    assert found() == ("2", "2")
    assert ctl_run(*control, "rollback", "--expect", "2").status == 0
    assert found() == ("1", "1")


@pytest.mark.parametrize("changed", ["options", "environment", "no tool", "no control"])
@pytest.mark.costly
def test_a_restart_that_has_to_stop_says_why_and_what_that_costs(
    machine: Machine, changed: str
) -> None:
    options = "--no-control" if changed == "no control" else "--workers 1"
    machine.configure(OPTIONS=options)
    first = worker_of(machine.start())
    pid = machine.pid()
    if changed == "options":
        machine.configure(OPTIONS="--workers 2")
    elif changed == "environment":
        machine.configure(OPTIONS=options, MY_LANG="C")
    elif changed == "no tool":
        machine.program.with_name("socketprotectorctl").unlink()

    assert machine.run("restart") == 0

    told = "not started with the settings" if changed in ("options", "environment") else "no socket"
    assert told in machine.output
    assert "New clients are refused meanwhile" in machine.output
    assert wait_gone([pid, first], 0.0) == []
    assert worker_of(machine.address()) != first


@pytest.mark.parametrize(
    "wrong",
    [{"OPTIONS": "--wokers 2"}, {"command": "/usr/bin/deamon"}, {"LISTEN": "192.0.2.1:1"}],
    ids=["option", "command", "address"],
)
@pytest.mark.costly
def test_a_restart_with_a_mistake_in_the_settings_stops_nothing(
    machine: Machine, wrong: dict[str, str]
) -> None:
    machine.configure()
    address = machine.start()
    pid, worker = machine.pid(), worker_of(address)
    # The address that it has is free for the start after it.
    same = {"LISTEN": f"{address[0]}:{address[1]}"}
    machine.configure(**{**same, **wrong})

    for action in ("restart", "try-restart"):
        assert machine.run(action) == 6
        assert f"it is not stopped: pid {pid} is still serving" in machine.output
    assert worker_of(address) == worker

    machine.configure(**same)
    assert machine.run("restart") == 0
    assert worker_of(address) != worker


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("SOCKETPROTECTOR_OPTIONS=--workers 2", ", line 3: several words need quotes"),
        ("SOCKETPROTECTOR_LISTEN=unix:/s?mode=0660&group=0", ", line 3: several words need quotes"),
        ('SOCKETPROTECTOR_STOP_WAIT="60s"', "a _WAIT is '60s'; write whole seconds"),
        ("SOCKETPROTECTOR_RELOAD_WAIT=1m", "a _WAIT is '1m'; write whole seconds"),
        (": ${NO_SUCH_SETTING:?is missing}", "is missing"),
        ("MY_PATH=$NO_SUCH_SETTING", "NO_SUCH_SETTING"),
        ('MY_NAME="', "not configured: cannot read"),
    ],
)
def test_a_restart_with_a_line_that_is_no_setting_stops_nothing(
    machine: Machine, line: str, said: str
) -> None:
    file = machine.configure()
    address = machine.start()
    file.write_text(f"{file.read_text()}{line}\n")

    assert machine.run("restart") == 6

    assert said in machine.output
    assert worker_of(address)
    assert machine.run("stop") == 0, "which needs none of it"


@pytest.mark.costly
def test_what_changes_during_the_start_is_not_what_it_was_started_with(machine: Machine) -> None:
    file = machine.configure(command=str(machine.root / "daemon"))
    release(machine, f"echo MY_COLOUR=blue >>{file}; exec {ECHO}")
    machine.start()

    assert machine.run("reload") == 0

    assert "has changed since the start" in machine.output


@pytest.mark.costly
def test_a_reload_says_that_only_a_restart_applies_other_settings(machine: Machine) -> None:
    file = machine.configure()
    machine.start()
    said = f"{file} has changed since the start: only restart applies that"

    assert machine.run("reload") == 0
    assert said not in machine.output
    machine.configure(OPTIONS="--workers 2")
    assert machine.run("reload") == 0
    assert said in machine.output
    assert machine.run("restart") == 0
    assert machine.run("reload") == 0
    assert said not in machine.output
    file.unlink()
    os.mkfifo(file)  # to read it would wait
    assert machine.run("reload", "web") == 0
    assert said not in machine.output, "a restart refuses it"


@pytest.mark.costly
def test_a_restart_without_settings_leaves_the_one_that_runs(machine: Machine) -> None:
    file = machine.configure()
    address = machine.start()
    file.unlink()

    assert machine.run("restart") == 6

    assert worker_of(address)


def test_restart_starts_what_does_not_run_and_try_restart_leaves_it(machine: Machine) -> None:
    machine.configure()

    assert machine.run("try-restart") == 0
    assert machine.run("status") == 3

    assert machine.run("restart") == 0
    assert machine.run("status") == 0


# --- what can be wrong --------------------------------------------------------


#: With the protector's name (PR_SET_NAME), if that is asked for.
FOREIGN = """\
import ctypes, sys
for line in sys.stdin.buffer:
    ctypes.CDLL(None).prctl(15, line.strip())
    print(flush=True)
"""


@pytest.fixture
def foreign() -> Iterator[subprocess.Popen[bytes]]:
    """A living process that is no protector, and must not get a signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", FOREIGN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    yield process
    process.communicate()
    assert process.returncode == 0


@needs.ANOTHER_USER
@pytest.mark.parametrize("way", ["all", "setpriv", "runuser", "su", "none", "no flock"])
def test_a_signal_is_sent_with_the_rights_of_the_protectors_user(
    machine: Machine, foreign: subprocess.Popen[bytes], way: str
) -> None:
    """That user can write any number into the pid file and hold its lock."""
    path = None if way == "all" else machine.tools("flock", *{way} & {"setpriv", "runuser", "su"})
    if way == "no flock":
        assert path
        (path / "flock").unlink()
        (path / "setpriv").symlink_to(shutil.which("setpriv") or "")
        assert foreign.stdin
        assert foreign.stdout
        foreign.stdin.write(b"SocketProtector\n")
        foreign.stdin.flush()
        foreign.stdout.readline()
    machine.configure(USER="nobody", STOP_WAIT="1")
    machine.leave_pid_file("")
    for each in (machine.run_directory(), machine.pid_file()):
        shutil.chown(each, "nobody")
    theirs = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(machine.pid_file()), str(foreign.pid)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with theirs, ExitStack() as at_the_end:
        at_the_end.callback(theirs.kill)
        assert theirs.stdout
        assert theirs.stdout.readline() == "holds\n"

        for action in ("stop", "reload"):
            assert machine.run(action, path=path) == 1
            assert f"cannot signal process {foreign.pid} as user 65534" in machine.output
        assert foreign.poll() is None

        # Its own it may.
        machine.pid_file().write_text(f"{theirs.pid}\n")
        if way == "none":
            assert machine.run("stop", path=path) == 1
            assert "setpriv, runuser or su is needed" in machine.output
        else:
            reaper = threading.Thread(target=theirs.wait)  # a zombie has a name, too
            reaper.start()
            assert machine.run("stop", path=path) == 0
            reaper.join(DEADLINE_S)
            assert theirs.returncode == -signal.SIGTERM


@needs.ROOT
def test_no_signal_is_sent_with_the_rights_of_another_user_than_the_protectors(
    machine: Machine, foreign: subprocess.Popen[bytes]
) -> None:
    """A user's name can be another one's number."""
    path = machine.tools("flock")
    mistaken = path / "setpriv"
    mistaken.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    mistaken.chmod(0o755)
    machine.configure(STOP_WAIT="1")
    machine.leave_pid_file(f"{foreign.pid}\n")
    for each in (machine.run_directory(), machine.pid_file()):
        shutil.chown(each, "nobody")
    with machine.pid_file().open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        assert machine.run("stop", path=path) == 1

    assert "cannot become user 65534" in machine.output
    assert foreign.poll() is None


@needs.ANOTHER_USER
@pytest.mark.parametrize("tool", ["flock", "id", "ls", "ln"])
@pytest.mark.parametrize("action", ["stop", "status", "start"])
def test_a_fifo_in_the_place_of_the_pid_file_holds_nothing_up(
    machine: Machine, tool: str, action: str
) -> None:
    """Its user may put it there while the script looks: here whenever that runs this tool."""
    path = machine.tools("flock", "mv", "mkfifo")
    swap = f"mkfifo {machine.root}/fifo && mv {machine.root}/fifo {machine.pid_file()}"
    real = (path / tool).readlink()
    (path / tool).unlink()
    (path / tool).write_text(
        f'#!/bin/sh\n[ -p {machine.pid_file()} ] || {{ {swap}; }}\n{real} "$@"\n'
    )
    (path / tool).chmod(0o755)
    machine.configure(PROGRAM="/bin/true")
    machine.leave_pid_file("999999\n")
    for each in (machine.run_directory(), machine.pid_file()):
        shutil.chown(each, "nobody")

    status = machine.run(action, path=path)

    assert machine.pid_file().is_fifo(), "the positive control"
    assert status == {"stop": 0, "status": 1, "start": 0}[action]


#: Takes the lock and writes a number, then is the user nobody.
HOLDS = """\
import ctypes, fcntl, os, pwd, signal, sys
ctypes.CDLL(None).prctl(15, b"SocketProtector")  # PR_SET_NAME
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(sys.argv[2] + "\\n")
file.flush()
os.setgroups([])
os.setuid(pwd.getpwnam("nobody").pw_uid)
print("holds", flush=True)
signal.pause()
"""


@needs.ANOTHER_USER
@pytest.mark.parametrize("where", ["socket", "options", "config"])
def test_in_a_folder_of_roots_something_else_says_who_the_user_is(
    machine: Machine, foreign: subprocess.Popen[bytes], where: str
) -> None:
    (machine.root / "web.toml").write_text('# user = "root"\nuser = "nobody"\n[env]\nuser = "x"\n')
    options = {"options": "--user nobody", "config": f"--config {machine.root}/web.toml"}
    machine.configure(OPTIONS=options.get(where, ""), STOP_WAIT="1")
    machine.leave_pid_file(f"{foreign.pid}\n")
    if where == "socket":
        with socket.socket(socket.AF_UNIX) as control:
            control.bind(str(machine.run_directory() / "control"))
        shutil.chown(machine.run_directory() / "control", "nobody")
    with machine.pid_file().open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        assert machine.run("stop") == 1

    assert f"cannot signal process {foreign.pid} as user 65534" in machine.output


def test_no_number_means_a_group_of_processes(machine: Machine) -> None:
    machine.configure(GUARD="no")
    for number in ("0", "00", "1", "-1"):
        machine.run_directory().mkdir(parents=True, exist_ok=True)
        machine.pid_file().write_text(f"{number}\n")
        with machine.pid_file().open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert machine.run("stop") == 1
        assert machine.run("stop") == 0
        assert "is not running" in machine.output


@pytest.mark.parametrize("content", ["dead", "foreign", "empty", "nonsense"])
@pytest.mark.costly
def test_a_stale_pid_file_does_not_mislead(
    machine: Machine, foreign: subprocess.Popen[bytes], content: str
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    text = {"dead": f"{gone.pid}\n", "foreign": f"{foreign.pid}\n", "empty": ""}
    machine.configure()
    machine.leave_pid_file(text.get(content, "; reboot\n"))

    assert machine.run("status") == 1
    assert str(machine.pid_file()) in machine.output
    assert machine.run("reload") == 7
    assert machine.run("try-restart") == 0
    assert machine.run("status") == 1

    if content == "nonsense":  # it may be another program's file
        assert machine.run("start") == 6
        assert machine.run("stop") == 0
    address = machine.start()
    assert worker_of(address)
    assert machine.run("stop") == 0


def test_stop_removes_a_stale_pid_file(machine: Machine, foreign: subprocess.Popen[bytes]) -> None:
    machine.configure()
    machine.leave_pid_file(f"{foreign.pid}\n")

    assert machine.run("stop") == 0

    assert machine.run("status") == 3
    assert not machine.run_directory().exists()


@pytest.mark.parametrize("guard", ["yes", "no"])
@pytest.mark.costly
def test_one_whose_folder_was_removed_is_named_and_gets_no_second_one(
    machine: Machine, guard: str
) -> None:
    """As by a cleaner of /run: nothing but the process itself tells that it runs."""
    machine.configure(GUARD=guard)
    address = machine.start()
    pid, worker = machine.pid(), worker_of(address)
    shutil.rmtree(machine.run_directory())
    try:
        others = ("start", "reload") if guard == "yes" else ()
        for action, status in (("status", 4), ("restart", 1), *((each, 1) for each in others)):
            assert machine.run(action, "web") == status
            assert f"process {pid} still runs, but {machine.pid_file()} was removed" in (
                machine.output
            )
        assert worker_of(address) == worker
    finally:
        os.kill(pid, signal.SIGTERM)
        assert wait_gone([pid]) == []
    assert machine.run("status", "web") == 3
    machine.start()
    assert machine.run("stop") == 0


@pytest.mark.costly
def test_one_of_another_user_is_not_taken_for_one_whose_folder_was_removed(
    machine: Machine,
) -> None:
    if os.geteuid() != 0:
        needs.another_user()
    machine.configure()
    machine.start()
    pid = machine.pid()
    shutil.rmtree(machine.run_directory())
    machine.configure(USER="nobody")
    try:
        assert machine.run("status", "web") == 3
    finally:
        os.kill(pid, signal.SIGTERM)
        assert wait_gone([pid]) == []


def test_a_lock_of_another_program_on_a_left_pid_file_is_no_protector(machine: Machine) -> None:
    machine.configure()
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    machine.leave_pid_file(f"{gone.pid}\n")
    with machine.pid_file().open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for action, status in (("status", 4), ("start", 1), ("stop", 1), ("restart", 1)):
            assert machine.run(action, "web") == status
            assert f"another process locks {machine.pid_file()}" in machine.output
    assert machine.run("status", "web") == 1


@needs.programs("flock")
@pytest.mark.parametrize("content", ["", "0\n", "; reboot\n"])
def test_a_locked_pid_file_without_a_number_may_be_a_protectors(
    machine: Machine, content: str
) -> None:
    machine.configure()
    machine.leave_pid_file(content)
    with machine.pid_file().open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for action, status in (("status", 4), ("start", 1), ("stop", 1), ("restart", 1)):
            assert machine.run(action, "web") == status
            assert (
                f"names no process, but another process locks {machine.pid_file()}"
                in machine.output
            )


@needs.ANOTHER_USER
@pytest.mark.costly
def test_a_protector_whose_process_is_hidden_from_a_user_is_running(machine: Machine) -> None:
    machine.configure()
    machine.start()
    user = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    hidden = f"mount -t proc -o hidepid=2 proc /proc && exec {user}"

    words = ("unshare", "--mount", "sh", "-c", f'{hidden} "$@"', "sh")
    assert machine.run("status", "web", before=words) == 0, machine.output
    assert "is running" in machine.output


@pytest.mark.costly
def test_a_killed_protector_is_dead_with_its_pid_file_left_and_starts_again(
    machine: Machine,
) -> None:
    machine.configure(GUARD="no")
    machine.start()
    pid = machine.pid()
    os.kill(pid, signal.SIGKILL)
    assert wait_gone([pid]) == []

    assert machine.run("status") == 1
    assert worker_of(machine.start())


def test_a_release_that_does_not_start_is_reported_with_its_reason_and_leaves_nothing(
    machine: Machine,
) -> None:
    machine.configure(command=release(machine, "echo no such module >&2; exit 3"))

    assert machine.run("start") == 1

    assert "no such module" in machine.output
    assert "web: does not start" in machine.output
    assert not machine.run_directory().exists()
    assert machine.run("status") == 3


def test_a_machine_without_the_program_is_5(machine: Machine) -> None:
    machine.configure()
    machine.program.rename(machine.root / "elsewhere")

    assert machine.run("start") == 5
    assert "not installed" in machine.output

    machine.configure(PROGRAM=str(machine.root / "elsewhere"))
    assert machine.run("start") == 0


@needs.programs("flock")
def test_a_start_during_a_start_waits_and_finds_that_it_runs(machine: Machine) -> None:
    daemon, gate, reached = gated(machine, f"exec {ECHO}")
    machine.configure(command=daemon)
    first, second = two_starts(machine, reached)

    gate.touch()

    assert (first.wait(DEADLINE_S), second.wait(DEADLINE_S)) == (0, 0)
    assert first.stdout is not None
    assert second.stdout is not None
    assert f"web: is running already (pid {machine.pid()})" in second.stdout.read()
    assert f"web: started (pid {machine.pid()})" in first.stdout.read()
    first.stdout.close()
    second.stdout.close()
    assert machine.run("stop") == 0
    assert list(machine.run_directory().parent.iterdir()) == []


@needs.programs("flock")
def test_a_start_during_a_start_that_fails_starts_again(machine: Machine) -> None:
    daemon, gate, reached = gated(machine, "exit 3")
    machine.configure(command=daemon)
    first, second = two_starts(machine, reached)

    gate.touch()

    assert (first.wait(DEADLINE_S), second.wait(DEADLINE_S)) == (1, 1)
    for each in (first, second):
        assert each.stdout is not None
        each.stdout.close()
    assert machine.run("status") == 3
    assert list(machine.run_directory().parent.iterdir()) == []


@needs.programs("flock")
def test_a_start_during_a_restart_waits_and_what_a_file_starts_keeps_no_lock(
    machine: Machine,
) -> None:
    daemon, gate, reached = gated(machine, f"exec {ECHO}")
    file = machine.configure(command=daemon)
    gate.touch()
    assert machine.run("start") == 0
    gate.unlink()
    reached.unlink()
    with file.open("a") as opened:
        opened.write(f"sleep 1000 >/dev/null 2>&1 & echo $! >>{machine.root}/sleepers\n")
    restart = machine.begin("restart")
    eventually(reached.exists, "the restart waits for its daemon")
    start = machine.begin("start")
    assert start.stdout is not None
    for line in start.stdout:
        if "another start or restart is in progress" in line:
            break

    gate.touch()

    assert (restart.wait(DEADLINE_S), start.wait(DEADLINE_S)) == (0, 0)
    assert f"web: is running already (pid {machine.pid()})" in start.stdout.read()
    start.stdout.close()
    assert restart.stdout is not None
    restart.stdout.close()
    assert machine.run("start") == 0
    assert machine.run("stop") == 0
    assert list(machine.run_directory().parent.iterdir()) == []
    sleepers = [int(pid) for pid in (machine.root / "sleepers").read_text().split()]
    for pid in sleepers:
        os.kill(pid, signal.SIGKILL)
    assert wait_gone(sleepers) == []


@needs.ROOT
@pytest.mark.parametrize("where", ["setting", "option", "config"])
def test_an_unknown_user_is_6_and_leaves_nothing(machine: Machine, where: str) -> None:
    config = machine.root / "config"
    config.write_text('user = "nosuchuser"\n')
    settings = {
        "setting": {"USER": "nosuchuser"},
        "option": {"OPTIONS": "--user nosuchuser"},
        "config": {"OPTIONS": f"--config {config}"},
    }
    machine.configure(**settings[where])

    assert machine.run("start") == 6

    assert "nosuchuser: unknown user" in machine.output
    assert list(machine.run_directory().parent.iterdir()) == []


@needs.ANOTHER_USER
@pytest.mark.parametrize("where", ["option", "config"])
def test_the_user_of_the_options_has_the_run_directory_too(machine: Machine, where: str) -> None:
    config = machine.root / "config"
    config.write_text('user = "nobody"\n')
    config.chmod(0o644)
    machine.configure(
        command="sleep 1000",
        GUARD="no",
        OPTIONS=("--user nobody" if where == "option" else f"--config {config}")
        + f" --ready after:1ms --stop-timeout 0 --no-log-relay --log-file {machine.root / 'log'}",
    )

    machine.start()

    assert machine.run_directory().owner() == "nobody"
    assert machine.run("stop") == 0
    assert machine.run("status") == 3
    assert not machine.run_directory().exists()


@needs.ANOTHER_USER
def test_who_may_not_write_in_the_run_directory_gets_4(machine: Machine) -> None:
    machine.configure()
    machine.start()
    other = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

    for action in ("start", "restart", "try-restart"):
        assert machine.run(action, before=other) == 4
        assert machine.output.endswith("run this as root\n")
        assert len(machine.output.splitlines()) == 1
    assert machine.run("stop") == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("SOCKETPROTECTOR_LISTEN=[::1]:80 api=127.0.0.1:81", "several words need quotes"),
        ("SOCKETPROTECTOR_GUARD=false", "write yes or no"),
    ],
    ids=["words", "guard"],
)
def test_a_second_listener_without_quotes_and_a_wrong_word_are_6(
    machine: Machine, line: str, said: str
) -> None:
    with machine.configure().open("a") as file:
        file.write(f"{line}\n")

    assert machine.run("start") == 6

    assert said in machine.output


def test_what_is_not_configured_is_6(machine: Machine) -> None:
    assert machine.run("start") == 6
    assert machine.run("start", "ghost") == 6

    file = machine.configure(LISTEN="")
    assert machine.run("start") == 6
    assert str(file) in machine.output

    file.write_text('SOCKETPROTECTOR_LISTEN="4321\n')
    assert machine.run("start") == 6
    assert str(file) in machine.output

    machine.configure(OPTIONS="--no-such-option")
    assert machine.run("start") == 6
    assert "--no-such-option" in machine.output


def test_without_any_instance_there_is_nothing_to_stop(machine: Machine) -> None:
    assert machine.run("stop") == 0
    assert machine.run("status") == 3
    assert machine.run("status", "ghost") == 4


@pytest.mark.parametrize("words", [[], ["nonsense"], ["start", "../web"], ["start", "web;"]])
def test_bad_arguments_are_2(machine: Machine, words: list[str]) -> None:
    machine.configure()

    assert machine.run(*words) == 2
    assert machine.output.startswith("usage: ")


# --- several instances --------------------------------------------------------


@pytest.mark.costly
def test_an_action_is_for_all_instances_or_for_the_named_one(machine: Machine) -> None:
    machine.configure("default")
    machine.configure("api")
    web = machine.configure("web")
    shutil.copy(web, web.with_name("web~"))
    shutil.copy(web, web.with_name("web.dpkg-old"))

    assert machine.run("start") == 0
    pids = {name: machine.pid(name) for name in ("default", "api", "web")}
    assert len(set(pids.values())) == 3
    folders = [each for each in machine.run_directory().parent.iterdir() if each.is_dir()]
    assert sorted(each.name for each in folders) == sorted(pids)
    assert machine.run("status") == 0

    machine.configure("web", OPTIONS="--workers 2")
    assert machine.run("restart", "web") == 0
    web_address = machine.address()
    assert machine.pid("web") != pids["web"]
    assert [machine.pid(name) for name in ("default", "api")] == [pids["default"], pids["api"]]

    assert machine.run("stop", "api", "default") == 0
    assert [machine.run("status", name) for name in ("default", "api", "web")] == [3, 3, 0]
    assert machine.run("status") == 3
    assert worker_of(web_address)

    assert machine.run("reload") == 7, "not all of them run"
    assert "web: reloaded: generation 2" in machine.output

    web.unlink()
    assert machine.run("status", "web") == 0
    assert machine.run("stop") == 0, "what runs is stopped although its file is gone"
    assert wait_gone([*pids.values()], 0.0) == []
    assert list(machine.run_directory().parent.iterdir()) == []


@pytest.mark.costly
def test_all_are_stopped_at_once_however_long_one_still_serves(machine: Machine) -> None:
    machine.configure("a", OPTIONS="--stop-timeout 10m")
    machine.configure("b")
    assert machine.run("start") == 0
    pids = [machine.pid(name) for name in ("a", "b")]
    ports = re.findall(r"listening on tcp:127\.0\.0\.1:(\d+)", machine.output)
    stopping = threading.Thread(target=machine.run, args=["stop"])
    with Client(("127.0.0.1", int(ports[0]))) as held:
        held.ask("mine")
        stopping.start()
        assert wait_gone(pids[1:]) == []
        assert held.ask("still mine")
    stopping.join(DEADLINE_S)

    assert wait_gone(pids, 0.0) == []
    assert sorted(machine.output.splitlines()) == [
        f"socketprotector: {name}: stopped" for name in ("a", "b")
    ]


@pytest.mark.costly
def test_one_instance_that_does_not_start_keeps_no_other_from_it(machine: Machine) -> None:
    machine.configure("bad", command=release(machine, "exit 3"), MY_COLOUR="blue")
    machine.configure("good")

    assert machine.run("start") == 1

    assert machine.run("status", "good") == 0
    assert machine.run("status", "bad") == 3
    assert "MY_COLOUR" not in environment_of(machine.pid("good"))
