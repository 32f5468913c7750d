"""What the machine does to a running protector: it stands still, its disk or its reader is full.

Where the log goes is the same for workers that accept, so that is run one way.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import needs
from tests.procfs import in_backlog
from tests.running import COMMAND, DEADLINE_S, ROOT, Client, Protector, ask, eventually
from tests.scenarios.faults import listens, reload_unseen
from tests.scenarios.tools import EITHER_HANDOFF, hold, pid_in, spawned, worker

Start = Callable[..., Protector]


@pytest.mark.costly
def test_the_wall_clock_decides_nothing() -> None:
    """It may jump: so it is only read for people, and compared with nothing."""
    wall = {"time.time", "time.localtime", "time.gmtime", "time.strftime", "datetime.now"}
    last = {"CLOCK_REALTIME", *(each.rpartition(".")[2] for each in wall)}

    def reads(tree: ast.AST) -> bool:
        return any(
            (
                isinstance(node, ast.Attribute)
                and node.attr in last
                and (node.attr == "CLOCK_REALTIME" or ast.unparse(node) in wall)
            )
            or (isinstance(node, ast.ImportFrom) and node.module == "time")
            for node in ast.walk(tree)
        )

    modules = {
        "/".join(path.parts[-2:]): ast.parse(path.read_text(encoding="utf-8"))
        for path in (ROOT / "socketprotector").rglob("*.py")
        if "ctl" not in path.parts  # it asks, and decides nothing
    }
    readers = {name: tree for name, tree in modules.items() if reads(tree)}

    assert readers.keys() == {
        *("programs/guard.py", "system/log.py", "model/log_format.py"),  # in the log
        # In the records:
        *("daemon/effects.py", "daemon/first_programs.py", "daemon/generation.py"),
        *("daemon/post_mortem.py", "daemon/releases.py", "daemon/reports.py"),
        *("daemon/worker_spawn.py",),
        # To the client:
        *("control/commands.py", "control/server.py", "control/status.py", "daemon/health.py"),
    }
    for name, tree in readers.items():
        decisions = (node for node in ast.walk(tree) if isinstance(node, ast.Compare))
        waits = (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("call_after", "extend")
        )
        assert not any(map(reads, (*decisions, *waits))), name


@EITHER_HANDOFF
def test_clients_wait_while_the_protector_is_stopped(protector: Start, handoff: str) -> None:
    """At workers that accept no client waits."""
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    held = Client(("127.0.0.1", daemon.port))
    assert held.ask().endswith("hello")
    hold(daemon.pid)

    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(50)]
    if handoff == "listener":
        assert {pid_in(client.hear()) for client in clients} == set(spawned(daemon))
        for number, client in enumerate(clients):
            client.say(f"line {number}")
    else:
        eventually(lambda: in_backlog(daemon.port) == 50, "the queue")
    assert held.ask("still").endswith("still")  # what a worker has is the worker's
    os.kill(daemon.pid, signal.SIGCONT)

    for number, client in enumerate(clients):
        assert client.hear().endswith(f" line {number}")
        client.close()
    held.close()
    daemon.stop()


@EITHER_HANDOFF
def test_signals_that_come_while_it_is_stopped_are_heard_afterwards(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    (pid,) = spawned(daemon)
    hold(daemon.pid)

    os.kill(pid, signal.SIGKILL)
    mark = daemon.signal(signal.SIGHUP)
    client = Client(("127.0.0.1", daemon.port), "after all")
    os.kill(daemon.pid, signal.SIGCONT)

    daemon.log.wait_for("event=reloaded", after=mark)
    assert client.hear().endswith("after all")
    client.close()
    daemon.stop()


@EITHER_HANDOFF
def test_a_reload_past_stopped_workers_leaves_theirs_to_them(
    protector: Start, handoff: str
) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    (old,) = spawned(daemon)
    taken = Client(("127.0.0.1", daemon.port))
    assert taken.ask().startswith(f"[{old}]")
    hold(old)
    waiting = Client(("127.0.0.1", daemon.port), "waits")
    if handoff == "connection":
        eventually(lambda: in_backlog(daemon.port) == 0, "it in the queue")

    daemon.reload()

    if handoff == "connection":
        assert pid_in(waiting.hear()) == spawned(daemon, 2)[0]  # taken back for the new one
        os.kill(old, signal.SIGCONT)
    else:
        assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon, 2)[0]
        os.kill(old, signal.SIGCONT)
        assert waiting.hear() == f"[{old}] waits"  # his listener is its own
    assert taken.ask("mine").startswith(f"[{old}]")
    taken.close()
    waiting.close()
    daemon.stop()


class Mute:
    """A protector whose stdout and stderr lead to a place of the test's choosing."""

    def __init__(self, output: int, environment: dict[str, str], *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "-f", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE_S) == 0


@pytest.fixture
def mute(marked_environment: dict[str, str]) -> Iterator[Callable[..., Mute]]:
    with ExitStack() as stack:

        def start(output: int, *arguments: str) -> Mute:
            made = Mute(output, marked_environment, *arguments)
            stack.callback(made.process.wait)
            stack.callback(made.process.kill)  # nothing happens to one that has ended
            return made

        yield start


def answers_through_reloads(daemon: Mute, address: str) -> None:
    """Serve, reload a few times, and serve again, seen from outside alone."""
    eventually(lambda: listens(address), "an answer")
    for _ in range(3):
        reload_unseen(daemon.process, address)
    daemon.stop()


@pytest.mark.costly
def test_a_full_pipe_without_a_reader_holds_nothing_up(
    mute: Callable[..., Mute], tmp_path: Path
) -> None:
    receive, send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        while True:
            os.write(send, b"x" * 4096)
    except BlockingIOError:
        pass
    os.set_blocking(send, True)
    path = str(tmp_path / "socket")
    daemon = mute(send, f"unix:{path}", "--", *worker("many"))
    os.close(send)

    answers_through_reloads(daemon, path)

    os.close(receive)


@pytest.mark.costly
def test_a_full_device_under_the_log_holds_nothing_up(
    mute: Callable[..., Mute], tmp_path: Path
) -> None:
    full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    path = str(tmp_path / "socket")
    daemon = mute(full, f"unix:{path}", "--", *worker("many"))
    os.close(full)

    answers_through_reloads(daemon, path)


def test_a_pipe_whose_reader_is_gone_holds_nothing_up(
    mute: Callable[..., Mute], tmp_path: Path
) -> None:
    receive, send = os.pipe2(os.O_CLOEXEC)
    os.close(receive)
    path = str(tmp_path / "socket")
    daemon = mute(send, f"unix:{path}", "--", *worker("many"))
    os.close(send)

    answers_through_reloads(daemon, path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.costly
def test_a_full_disk_under_the_log_file_holds_nothing_up(
    protector: Start, small_disk: Path
) -> None:
    log = small_disk / "log"
    with log.open("wb") as file:
        file.write(b"x" * 60_000 + b"\n")
    path = str(small_disk.parent / "socket")
    daemon = protector("--log-file", str(log), f"unix:{path}", "--", *worker("many"))
    eventually(lambda: listens(path), "an answer")
    with (small_disk / "rest").open("wb", buffering=0) as rest:
        try:
            while True:
                rest.write(b"x" * 4096)
        except OSError:
            pass

    for _ in range(3):
        reload_unseen(daemon.process, path)

    daemon.stop()
