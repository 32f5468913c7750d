"""The first process of a container, or a sub-reaper, without --guard: what others leave is its."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.procfs import children_of, state_of, wake_ups
from tests.running import DEADLINE_S, Client, Protector, ask, eventually
from tests.scenarios.releases import COMMAND, Releases
from tests.scenarios.tools import pid_in, worker
from tests.unit.ctl.conftest import run

#: A namespace of its own, in which it is PID 1; it ends with its maker.
CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
SUBREAPER = (
    *(sys.executable, "-c"),
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); "
    "os.execvp(sys.argv[1], sys.argv[1:])",
)
#: Each connection leaves a process behind that has no parent any more.
LEAVES = ("--handoff", "stdio", "--shell", "127.0.0.1:0", "--", "(true &) ; read line; echo $line")
MANY = ("127.0.0.1:0", "--", *worker("many"))
Start = Callable[..., Protector]
IN_CONTAINER = needs.root_with("unshare")


@pytest.fixture(
    params=[
        pytest.param(CONTAINER, marks=IN_CONTAINER, id="container"),
        pytest.param(SUBREAPER, id="sub-reaper"),
    ]
)
def through(request: pytest.FixtureRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = request.param
    return found


@pytest.fixture
def start(marked_environment: dict[str, str]) -> Iterator[Start]:
    """Run the command through another: start(through, *arguments)."""
    started: list[Protector] = []

    def begin(through: tuple[str, ...], *arguments: str) -> Protector:
        started.append(Protector(arguments, marked_environment, through=through))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()  # with all of its namespace, where it has one
        each.end()
        print(f"--- log of protector {each.pid} ---\n{each.log.text()}")


def inner(daemon: Protector) -> int:
    """The protector itself, as we see it; it is another's child in a namespace of its own."""
    if daemon.process.args[0] != "unshare":  # type: ignore[index]
        return daemon.pid
    eventually(lambda: children_of(daemon.pid) != [], "the first process of the namespace")
    return children_of(daemon.pid)[0]


def zombies(pid: int) -> list[int]:
    return [child for child in children_of(pid) if state_of(child) == "Z"]


@pytest.mark.costly
def test_what_others_leave_to_it_is_reaped(start: Start, through: tuple[str, ...]) -> None:
    daemon = start(through, *LEAVES).ready()
    pid = inner(daemon)
    pools = children_of(pid)
    for _ in range(50):
        assert ask(("127.0.0.1", daemon.port)) == "hello"

    eventually(lambda: children_of(pid) == pools, "no child but its workers")

    os.kill(pid, signal.SIGHUP)
    daemon.log.wait_for("event=reloaded generation=2")
    daemon.log.wait_for('event=exited generation=1 .*how="exited with status 0"')
    eventually(lambda: zombies(pid) == [], "the end of the old ones")
    before = wake_ups(pid)
    assert ask(("127.0.0.1", daemon.port)) == "hello"
    eventually(lambda: zombies(pid) == [], "the end of what that left")
    # Asleep but for the connection, the orphan and what they put off.
    assert wake_ups(pid) - before < 20
    os.kill(pid, signal.SIGTERM)
    assert daemon.wait() == 0


@pytest.mark.costly
def test_how_workers_ended_is_known_however_many_orphans_end_meanwhile(
    start: Start, through: tuple[str, ...]
) -> None:
    script = "i=0; while [ $i -lt 40 ]; do (true &); i=$((i+1)); done; kill -9 $$"
    daemon = start(through, "--start-tries", "3", "127.0.0.1:0", "--", "sh", "-c", script)

    assert daemon.wait() == 3
    assert daemon.log.count('event=exited .*how="was killed by SIGKILL"') == 3


@pytest.mark.costly
def test_orphans_end_is_seen_at_once_where_they_are_left_to_us(
    start: Start, through: tuple[str, ...]
) -> None:
    mode = ("--no-log-relay", "--handoff", "listener", "--ready", "notify", "127.0.0.1:0")
    daemon = start(through, *mode, "--", *worker("master", "v1")).ready()
    pid = inner(daemon)
    [master] = children_of(pid)
    orphans = children_of(master)
    with Client(("127.0.0.1", daemon.port)) as client:
        client.ask()
        os.kill(master, signal.SIGKILL)
        daemon.log.wait_for("event=orphans generation=1 worker=1")
    daemon.log.wait_for("event=orphans-gone generation=1 worker=1")
    eventually(lambda: not set(orphans) & set(children_of(pid)), "the end of all of them")
    os.kill(pid, signal.SIGTERM)
    assert daemon.wait() == 0


@IN_CONTAINER
@pytest.mark.costly
def test_from_outside_no_other_process_is_taken_for_one_of_the_container(
    start: Start, tmp_path: Path
) -> None:
    """The pids of its status are those of other processes here, such as ours with pid 1."""
    control = tmp_path / "control"
    daemon = start(CONTAINER, "--control", str(control), "--name", "web", *MANY).ready()
    pid = inner(daemon)
    with Client(("127.0.0.1", daemon.port), "hello"):
        shown = json.loads(run("--control", control, "connections", "--json").out)

        assert shown["connections"] == []
        assert "another PID namespace" in shown["unseen"][0]["why"]
    stopped = run("--control", control, "stop", "--timeout", f"{DEADLINE_S:.0f}s")

    assert (stopped.status, stopped.out) == (0, "stopped: web\n"), stopped.err
    assert state_of(pid) in ("Z", ""), "it was waited for"
    assert daemon.wait() == 0


# -- as PID 1 default actions are ignored, so each signal must have its own ----------------


@IN_CONTAINER
def test_hup_reloads_and_term_stops_the_first_process(start: Start) -> None:
    daemon = start(CONTAINER, *MANY).ready()
    pid = inner(daemon)
    assert "pid=1 " in daemon.log.wait_for("event=start")

    os.kill(pid, signal.SIGHUP)
    daemon.log.wait_for("event=reloaded generation=2")
    with Client(("127.0.0.1", daemon.port)) as client:
        client.ask()
        os.kill(pid, signal.SIGTERM)
        daemon.log.wait_for("event=stopping")
        assert client.ask().endswith(" hello")
    assert daemon.wait() == 0


@IN_CONTAINER
@pytest.mark.parametrize(
    "signals",
    [(signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGQUIT, signal.SIGINT)],
    ids=["INT", "TERM TERM", "QUIT INT"],
)
@pytest.mark.costly
def test_the_first_process_stops_at_once_when_it_is_told_so(
    start: Start, signals: tuple[signal.Signals, ...]
) -> None:
    daemon = start(CONTAINER, "--stop-timeout", "0", *MANY).ready()
    pid = inner(daemon)
    with Client(("127.0.0.1", daemon.port)) as client:
        assert pid_in(client.ask()) > 1  # and it stays connected: a graceful stop would wait
        mark = 0
        for number in signals:
            os.kill(pid, number)
            daemon.log.wait_for("event=signal ", after=mark)
            mark = len(daemon.log.seen)

        assert daemon.wait() == 0


@IN_CONTAINER
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
@pytest.mark.costly
def test_a_signal_while_the_first_process_starts_is_not_lost(
    start: Start, number: signal.Signals
) -> None:
    daemon = start(CONTAINER, "--ready", "notify", "127.0.0.1:0", "--", *worker("never_ready"))
    daemon.log.wait_for("event=spawned")

    os.kill(inner(daemon), number)

    daemon.log.wait_for("event=stopping")
    assert daemon.wait() in (0, 130)


@IN_CONTAINER
def test_the_first_processs_exit_status_says_how_the_start_went(start: Start) -> None:
    assert start(CONTAINER, "127.0.0.1:0", "--", "false").wait() == 3
    refused = start(CONTAINER, "127.0.0.1:0", "--", "/no/such/program")
    assert refused.wait() not in (0, 3)
    assert re.search("no such program|No such file", refused.log.text())


@IN_CONTAINER
@pytest.mark.costly
def test_the_first_process_is_upgraded_in_place(start: Start) -> None:
    daemon = start(CONTAINER, *LEAVES).ready()
    pid = inner(daemon)
    pools = children_of(pid)
    for _ in range(5):
        os.kill(pid, signal.SIGUSR2)
        assert ask(("127.0.0.1", daemon.port)) == "hello"
    daemon.log.wait_for("event=resumed")

    eventually(lambda: children_of(pid) == pools, "no child but its workers")
    os.kill(pid, signal.SIGTERM)
    assert daemon.wait() == 0


# -- below a first process that reaps nothing ----------------------------------------------


@IN_CONTAINER
@pytest.mark.costly
def test_orphans_are_reaped_where_the_first_process_reaps_none(start: Start) -> None:
    """The kernel counts them among their group until they are reaped."""
    first = (
        *(sys.executable, "-c"),
        "import os, sys; pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ); "
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
    )
    mode = ("--no-log-relay", "--handoff", "listener", "--ready", "notify", "127.0.0.1:0")
    daemon = start((*CONTAINER, *first), *mode, "--", *worker("master", "v1")).ready()
    reaper = inner(daemon)
    [pid] = children_of(reaper)
    [master] = children_of(pid)
    with Client(("127.0.0.1", daemon.port)) as client:
        client.ask()
        os.kill(master, signal.SIGKILL)
        daemon.log.wait_for("event=orphans generation=1 worker=1")

    daemon.log.wait_for("event=orphans-gone generation=1 worker=1")

    assert zombies(reaper) == []
    assert zombies(pid) == []
    os.kill(pid, signal.SIGTERM)
    assert daemon.wait() == 0
    assert daemon.log.count("signal=KILL") == 0


@IN_CONTAINER
@pytest.mark.costly
def test_the_next_container_starts_the_release_that_the_last_one_has_proved(
    start: Start, tmp_path: Path
) -> None:
    releases, control = Releases(tmp_path / "volume"), str(tmp_path / "control")
    words = ("--control", control, *releases.options, "127.0.0.1:0", "--", *COMMAND)
    first = start(CONTAINER, *words).ready()
    for name in ("2", "3"):
        assert run("--control", control, "deploy", name).status == 0
    assert run("--control", control, "deploy", "bad").status == 3
    assert run("--control", control, "rollback").status == 0

    first.process.kill()  # with all of its namespace
    first.process.wait()

    assert releases.named == "2"
    start(CONTAINER, *words).log.wait_for(r"event=ready generation=1 release=2\b")
    found = run("--control", control, "rollback")  # the history is on the volume, too
    assert (found.status, releases.named) == (0, "1"), found
