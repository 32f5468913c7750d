"""What the demo counts as failed, and what ended with a process that was killed."""

from __future__ import annotations

import errno
import io
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console

from socketprotector.ctl import discovery
from socketprotector.demo import cli
from socketprotector.demo.kill import kill
from socketprotector.demo.load import Load
from socketprotector.demo.protected import Protected, free_name
from socketprotector.demo.screen import Screen
from socketprotector.demo.seen import Failure, Kill, split_by_kills
from socketprotector.demo.story import Story
from socketprotector.launch import listen_spec
from socketprotector.model import handoff_modes, known_servers
from socketprotector.model.errors import SystemRefused, UsageError

KILL = Kill(10.0, frozenset({4000}))
#: Begun before the kill by a client of a port that the process held, and reset.
HELD = Failure("reset", 10.1, 9.5, None, "", 4000)


def failing(**other: object) -> Failure:
    return Failure(**{**{n: getattr(HELD, n) for n in HELD.__dataclass_fields__}, **other})


def test_what_a_killed_process_held_ended_with_it() -> None:
    assert split_by_kills([HELD], [KILL]) == ([HELD], [])


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(failing(port=4001), id="of another port"),
        pytest.param(failing(started_s=10.05), id="begun after it, from the same port"),
        *(pytest.param(failing(kind=k), id=k) for k in ("refused", "timed_out", "wrong", "local")),
    ],
)
def test_no_kill_excuses_any_other(failure: Failure) -> None:
    assert split_by_kills([failure], [KILL]) == ([], [failure])


def test_a_kill_knows_the_clients_of_the_process_and_no_others() -> None:
    holding = (
        "import os, socket\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "print(server.getsockname()[1], flush=True)\n"
        "taken = server.accept()[0]\n"
        "print(flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        address = ("127.0.0.1", int(process.stdout.readline()))
        with socket.create_connection(address) as taken:
            process.stdout.readline()
            with socket.create_connection(address):  # it waits to be accepted
                found = kill(process.pid)
            assert process.wait() == -signal.SIGKILL
            assert found.held == {taken.getsockname()[1]}


def test_one_that_is_gone_cannot_be_killed() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(ProcessLookupError):
        kill(process.pid)


@pytest.fixture
def told() -> io.StringIO:
    return io.StringIO()


def of(told: io.StringIO) -> Story:
    nothing: Protected = None  # type: ignore[assignment]  # what is asked here needs none
    return Story(Screen(Console(file=told, width=80)), nothing, 0.0)


def test_it_says_how_many_have_failed_and_how(told: io.StringIO) -> None:
    story = of(told)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        story._loads = [Load(address, concurrency=1, count=3).start()]

        assert not story._verdict()

    lines = told.getvalue().splitlines()
    assert lines[-1] == "0 connections, 3 failed"
    assert lines.count("refused: [Errno 111] Connection refused") == 3


def test_an_answer_that_came_while_the_load_itself_stood_still_is_not_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socketprotector.demo.load.SWEEP_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        load = Load(f"127.0.0.1:{server.getsockname()[1]}", concurrency=1, count=1, timeout_s=1000)
        poll = load._poll

        def stand_still(timeout_s: float) -> list[tuple[int, int]]:
            """Find nothing; before the load goes on, the answer comes, and then its time is up."""
            with server.accept()[0] as client:
                client.sendall(b"[1] " + client.recv(100))
            for each in load._open.values():
                each.due_s = time.monotonic()
            load._poll = poll
            return []

        load._poll = cast("select.epoll", SimpleNamespace(register=poll.register, poll=stand_still))
        seen = load.start().join()
    assert (seen.connections, seen.failures) == (1, ())


@pytest.mark.parametrize(
    ("failures", "last"),
    [
        ((HELD, HELD), "12 connections, 0 failed, 2 cut by our kill -9"),
        ((HELD, failing(port=4001)), "12 connections, 1 failed, 1 cut by our kill -9"),
        ((), "12 connections, 0 failed"),
    ],
)
def test_it_says_apart_how_many_its_own_kills_have_cut(
    told: io.StringIO, failures: tuple[Failure, ...], last: str
) -> None:
    story = of(told)
    seen = SimpleNamespace(connections=12, failures=failures)
    story._loads = [cast("Load", SimpleNamespace(join=lambda: seen))]
    story._kills = [KILL]

    assert story._verdict() == ("0 failed" in last)

    assert told.getvalue().splitlines()[-1] == last


def test_what_its_clients_lack_on_this_machine_is_no_failure_of_what_they_connect_to(
    told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = of(told)
    monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: errno.EADDRNOTAVAIL)
    story._loads = [Load("127.0.0.1:1", concurrency=1, count=1).start()]
    story._loads[0].join()

    with pytest.raises(SystemRefused, match=r"Cannot assign .*local ports"):
        story._verdict()
    story._drawn_s = 0.0
    with pytest.raises(SystemRefused, match="loopback"):
        story._show()  # at once


def test_it_asks_for_the_descriptors_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 1024))

    with pytest.raises(SystemRefused, match=r"64 .*ulimit -n 128"):
        cli._run(0.0)


def test_how_many_have_failed_is_seen_on_a_narrow_terminal() -> None:
    shown = io.StringIO()
    screen = Screen(Console(file=shown, width=30, force_terminal=True, _environ={}))
    story = Story(screen, None, 0.0)  # type: ignore[arg-type]
    story._drawn_s = 0.0
    with socket.create_server(("127.0.0.1", 0)) as server:
        story._loads = [Load(f"127.0.0.1:{server.getsockname()[1]}", concurrency=1, count=0)]
        story._loads[0].start().join()
        with screen.running():
            story._show()

    assert "0 failed" in shown.getvalue()


def test_where_nothing_was_served_nothing_was_shown(told: io.StringIO) -> None:
    assert not of(told)._verdict()


def test_no_listener_is_called_as_the_demo_is() -> None:
    with pytest.raises(UsageError):
        listen_spec.parse("demo", os.sep)


def test_of_the_command_line_it_ends_with_nothing_is_warned() -> None:
    options, _, command = cli.YOUR_TURN.replace("\\\n ", "").partition(" -- ")

    assert "--handoff listener" in options
    assert "--ready notify" in options  # so no timer says that it is ready
    told = known_servers.lacks(
        command.split(),
        (),
        mode=handoff_modes.LISTENER,
        settles=False,
        after_s=None,
        drain_signal="TERM",
    )
    assert told is None


def test_that_command_line_can_be_copied_from_a_terminal() -> None:
    shown = io.StringIO()

    Screen(Console(file=shown, width=80, force_terminal=True, _environ={})).say(cli.YOUR_TURN)

    assert shown.getvalue() == f"{cli.YOUR_TURN}\n"


def test_a_terminal_of_unknown_width_shows_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal

    Screen().say(cli.YOUR_TURN)

    assert capsys.readouterr().out == f"{cli.YOUR_TURN}\n"


def test_its_name_is_none_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(discovery, "query_all_sockets", list)
    monkeypatch.setattr(discovery, "names", lambda _: names)

    assert free_name() == "demo"
    names.append("demo")
    assert free_name() == f"demo-{os.getpid()}"


def test_its_folder_is_not_too_deep_for_a_control_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/" + "x" * 39)
    assert cli._place() == "/" + "x" * 39
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/" + "x" * 40)
    assert cli._place() == "/tmp"


def test_a_protector_with_a_lower_pid_than_the_killed_protector_is_back(told: io.StringIO) -> None:
    """Pids begin again from below once the highest was given."""
    found = {"phase": "serving", "pid": 30_000}
    story = of(told)
    story._protected = cast("Protected", SimpleNamespace(status=lambda: found))
    back = story._back_from(30_000)
    assert back() is None

    found["pid"] = 400

    assert back() == found
