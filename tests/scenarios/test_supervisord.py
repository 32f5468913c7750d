"""docs/moving.md: the section on supervisord, with the real one and a server of the tests."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.load import Load
from tests.procfs import kinds_of
from tests.running import DEADLINE_S, ROOT, WORKERS, Client, ask, eventually, wait_gone
from tests.scenarios.adopting import served
from tests.scenarios.tools import Gate, pid_in

BIN = Path(sys.executable).parent
PAGE = (ROOT / "docs/moving.md").read_text(encoding="utf-8")
SECTION = re.search(
    r"^```ini\n# web.new\n(\[program:web\]\n.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
)
CONFIGURATION = """\
[supervisord]
nodaemon=true
logfile={folder}/supervisord.log
pidfile={folder}/supervisord.pid
childlogdir={folder}
[unix_http_server]
file={control}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{control}
{program}
stdout_logfile={folder}/web.log
redirect_stderr=true
startretries=100
"""

pytestmark = needs.unless((BIN / "supervisord").exists(), "supervisor")


class Supervisord:
    """One in the foreground, with the program of the page."""

    def __init__(self, folder: Path, environment: dict[str, str], program: str, port: int) -> None:
        self._folder = folder
        self._environment = {**os.environ, **environment}
        self._environment["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.port = port
        self.address = "127.0.0.1", self.port
        #: Short: 107 bytes are what a socket's path has.
        control = Path(os.environ["XDG_RUNTIME_DIR"]) / "supervisord"
        program = program.replace("/srv/web", str(folder)).replace("8000", str(self.port))
        (folder / "conf").write_text(
            CONFIGURATION.format(folder=folder, control=control, program=program.strip())
        )
        self._process = subprocess.Popen(
            [BIN / "supervisord", "-c", folder / "conf"],
            env=self._environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def run(self, *words: str | Path) -> str:
        """What a command of ours or of theirs says."""
        done = subprocess.run(
            [BIN / words[0], *words[1:]],
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
        )
        return done.stdout.strip()

    def ctl(self, *words: str) -> str:
        return self.run("supervisorctl", "-c", self._folder / "conf", *words)

    @property
    def log(self) -> str:
        path = self._folder / "web.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, pattern: str, times: int = 1) -> list[str]:
        """Wait until it was logged so often; return what the pattern's groups are."""
        eventually(lambda: len(re.findall(pattern, self.log)) >= times, f"{times} of {pattern}")
        return re.findall(pattern, self.log)

    def ready(self, times: int = 1) -> None:
        self.wait_for(r"event=ready\b", times)

    def protector(self) -> int:
        return int(self.wait_for(r"event=(?:start|resumed) pid=(\d+)")[-1])

    def workers(self) -> list[int]:
        """All that were started."""
        return [int(pid) for pid in self.wait_for(r"event=spawned .*\bpid=(\d+)")]

    def close(self) -> None:
        self._process.terminate()  # it stops its programs first
        try:
            self._process.wait(DEADLINE_S)
        finally:
            self._process.kill()
            self._process.wait()
            print(f"--- supervisord\n{(self._folder / 'supervisord.log').read_text()}")
            print(f"--- web\n{self.log}")


@pytest.fixture
def supervised(
    tmp_path: Path, marked_environment: dict[str, str], free_port: Callable[[], int]
) -> Iterator[Callable[[str], Supervisord]]:
    """Start one that runs the page's program, or what is made of that."""
    server = tmp_path / "server"
    accepts = f"exec '{sys.executable}' -S -E '{WORKERS / 'accepts.py'}'"
    server.write_text(f'#!/bin/sh\necho "server $*"\ncase "$*" in "--fd 3") {accepts};; esac\n')
    many = tmp_path / "ported-daemon"
    many.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S -E '{WORKERS / 'many.py'}'\n")
    for path in (server, many):
        path.chmod(0o755)
    started: list[Supervisord] = []

    def start(program: str) -> Supervisord:
        started.append(Supervisord(tmp_path, marked_environment, program, free_port()))
        started[-1].ready()
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def program() -> str:
    """Return the page's, with the server of these tests."""
    assert SECTION is not None
    assert " --guard " in SECTION[1]
    program, found = re.subn(
        r"--ready .*\n +127.*", "http=8000 -- ./server --fd {fd:http}", SECTION[1]
    )
    assert found == 1
    return program


Starter = Callable[[str], Supervisord]


@pytest.mark.costly
def test_it_serves_reloads_without_a_lost_connection_and_stops(
    supervised: Starter, program: str
) -> None:
    daemon = supervised(program)
    child = int(daemon.ctl("pid", "web"))

    with Load(f"127.0.0.1:{daemon.port}", concurrency=8) as load:
        for number in (1, 2, 3):
            served(load)
            assert daemon.ctl("signal", "HUP", "web") == "web: signalled"
            daemon.wait_for("event=reloaded", number)
        served(load)
    assert not load.snapshot().failures
    assert int(daemon.ctl("pid", "web")) == child
    assert len(daemon.workers()) == 4
    assert daemon.log.count("server --fd 3\n") == 4

    assert daemon.ctl("stop", "web") == "web: stopped"
    assert wait_gone([child, daemon.protector(), *daemon.workers()]) == []
    assert "STOPPED" in daemon.ctl("status", "web")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(daemon.address, DEADLINE_S)


@pytest.mark.costly
def test_with_a_guard_a_killed_protector_is_not_missed(
    supervised: Starter, program: str, tmp_path: Path
) -> None:
    daemon = supervised(program)
    child, (worker,) = int(daemon.ctl("pid", "web")), daemon.workers()
    gate = Gate(tmp_path / "gate")
    idle = kinds_of(worker)

    with Client(daemon.address, f"wait {gate.path}") as held:
        eventually(lambda: kinds_of(worker) != idle, "the worker serves it")
        os.kill(daemon.protector(), signal.SIGKILL)
        daemon.wait_for("event=resumed")
        gate.open()
        assert pid_in(held.hear()) == worker

    assert pid_in(ask(daemon.address)) == worker
    assert int(daemon.ctl("pid", "web")) == child
    assert daemon.ctl("signal", "HUP", "web") == "web: signalled"
    daemon.wait_for("event=reloaded")
    assert wait_gone([worker]) == []


@pytest.mark.parametrize("killed", ["protector", "guard"])
@pytest.mark.costly
def test_a_process_that_has_the_port_keeps_the_next_one_from_starting(
    supervised: Starter, program: str, killed: str
) -> None:
    """The workers of a protector without a guard, or the protector of a guard."""
    daemon = supervised(program if killed == "guard" else program.replace("--guard ", ""))
    protector, (worker,) = daemon.protector(), daemon.workers()

    os.kill(int(daemon.ctl("pid", "web")), signal.SIGKILL)
    refused = r"cannot listen on .*: Address already in use; process (\d+) \(\w+\) has it"
    named = {int(pid) for pid in daemon.wait_for(refused, 2)}
    assert named <= ({worker, protector} if killed == "guard" else {worker})
    assert pid_in(ask(daemon.address)) == worker

    if killed == "guard":
        daemon.run("socketprotectorctl", "--name", "web", "stop")
    else:
        os.kill(worker, signal.SIGTERM)
    assert wait_gone([protector, worker]) == []
    daemon.ready(2)
    assert pid_in(ask(daemon.address)) == daemon.workers()[-1] != worker


@pytest.mark.costly
def test_workers_that_are_handed_connections_finish_and_end_with_a_killed_protector(
    supervised: Starter, program: str
) -> None:
    words = re.sub(r"--guard .*", "--name web 8000 -- ./ported-daemon", program)
    daemon = supervised(words)
    (worker,) = daemon.workers()

    with Client(daemon.address) as held:
        assert pid_in(held.ask("before")) == worker
        os.kill(daemon.protector(), signal.SIGKILL)
        daemon.ready(2)
        assert pid_in(held.ask("after")) == worker
        assert has_reader(worker)  # the relay outlives SocketProtector
        assert pid_in(ask(daemon.address)) == daemon.workers()[-1] != worker
    assert wait_gone([worker]) == []


def has_reader(pid: int) -> bool:
    """Whether a process's stdout is a pipe that a process may read."""
    assert os.readlink(f"/proc/{pid}/fd/1").startswith("pipe:")
    fd = os.open(f"/proc/{pid}/fd/1", os.O_WRONLY)
    try:
        poll = select.poll()
        poll.register(fd, 0)
        return poll.poll(0) != [(fd, select.POLLERR)]
    finally:
        os.close(fd)
