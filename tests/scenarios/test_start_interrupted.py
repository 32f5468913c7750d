"""A start that is called off: Ctrl-C, signals and deaths while it goes on."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.running import DEADLINE_S, MARK, WORKERS, ask, eventually, marked, wait_gone
from tests.scenarios.starting import MINIMAL, Popen, Start, start_of
from tests.scenarios.tools import worker


@pytest.fixture
def gate(start: Start) -> Path:
    path = start.folder / "gate.sh"
    os.mkfifo(path)
    return path


@contextmanager
def waiting(start: Start, gate: Path, *options: str, **more: object) -> Iterator[tuple[Popen, int]]:
    """A launching process that waits for a worker; and a descriptor that holds the worker back."""
    words = (*options, f"unix:{start.folder}/s?mode=0600", "--", *worker("ready_at_gate", gate))
    with start_of(start, "--log-file", start.log_file, *words, **more) as process:
        held = os.open(gate, os.O_WRONLY)  # succeeds when the worker reads
        try:
            yield process, held
        finally:
            os.close(held)


def nothing_is_left(start: Start) -> None:
    eventually(lambda: start.left() == [], f"nothing left of {start.left()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_a_signal_to_the_one_that_waits_stops_everything(
    start: Start, gate: Path, number: signal.Signals
) -> None:
    with waiting(start, gate) as (process, _):
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 130
        assert start.left() == []
        assert process.stderr
        assert process.stderr.read() == "SocketProtector: interrupted; nothing was started\n"


def test_a_signal_while_a_refusal_is_said_is_no_traceback(start: Start) -> None:
    says = (
        "import os, signal, sys\n"
        "from socketprotector.launch import cli\n"
        "cli.tell = lambda text: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(cli.main(['--no-such-option']))\n"
    )

    ended = start(command=(sys.executable, "-c", says))

    assert (ended.status, ended.err) == (130, "")


@pytest.mark.parametrize(
    ("program", "module"),
    [("socketprotector", "launch.cli"), ("socketprotector.ctl", "ctl.main")],
)
def test_ctrl_c_while_modules_are_loaded_is_no_traceback(
    start: Start, program: str, module: str
) -> None:
    says = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name == 'socketprotector.{module}':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting)\n"
        f"from {program}.__main__ import main\n"
        "sys.exit(main())\n"
    )

    ended = start(command=(sys.executable, "-c", says))

    assert (ended.status, ended.err) == (130, "")


@pytest.mark.costly
def test_ctrl_c_on_the_terminal_stops_everything(start: Start, gate: Path) -> None:
    ours, theirs = pty.openpty()
    take_terminal = ("setsid", "--ctty", "--wait")

    with waiting(start, gate, before=take_terminal, stdin=theirs, stdout=theirs, stderr=theirs) as (
        process,
        _,
    ):
        os.close(theirs)
        os.write(ours, b"\x03")
        assert process.wait(DEADLINE_S) == 130
        assert start.left() == []
    os.close(ours)


def test_the_terminal_going_away_stops_everything(start: Start, gate: Path) -> None:
    ours, theirs = pty.openpty()
    take_terminal = ("setsid", "--ctty", "--wait")

    with waiting(start, gate, before=take_terminal, stdin=theirs, stdout=theirs, stderr=theirs) as (
        process,
        _,
    ):
        os.close(theirs)
        os.close(ours)
        process.wait(DEADLINE_S)
        nothing_is_left(start)


def test_killing_the_one_that_waits_stops_everything(start: Start, gate: Path) -> None:
    with waiting(start, gate) as (process, _):
        resident = start.pid
        process.kill()
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
        assert not wait_gone([resident])
        nothing_is_left(start)


@pytest.mark.parametrize("options", [(), ("--handoff", "listener")], ids=["", "listener"])
def test_killing_the_protector_that_starts_is_reported(
    start: Start, gate: Path, options: tuple[str, ...]
) -> None:
    with waiting(start, gate, *options) as (process, held):
        os.kill(start.pid, signal.SIGKILL)
        assert process.wait(DEADLINE_S) == 111
        assert process.stderr
        said = process.stderr.read()
        assert "was killed before a generation was serving" in said
        os.write(held, b"go")
    # Its worker sees end of file on the channel, or has none.
    eventually(lambda: not marked(start.environment[MARK]), "the end of the worker")
    assert start.left() == []


def test_term_to_the_protector_that_starts_stops_it_and_says_so(start: Start, gate: Path) -> None:
    with waiting(start, gate) as (process, _):
        start.send(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 100
        assert process.stderr
        said = process.stderr.read()
        assert said == "SocketProtector: stopped before a generation was serving\n"
        assert start.left() == []


def test_hup_to_the_protector_that_starts_is_remembered(start: Start, gate: Path) -> None:
    with waiting(start, gate) as (process, held):
        start.send(signal.SIGHUP)
        start.wait_for("event=signal signal=SIGHUP")
        assert process.poll() is None
        gate.unlink()
        gate.touch()  # nothing holds the second generation back
        os.write(held, b"go")
        assert process.wait(DEADLINE_S) == 0
    start.wait_for("event=reloaded generation=2")
    start.stop(signal.SIGINT)


@contextmanager
def held_up(start: Start, *options: str) -> Iterator[tuple[Popen, int]]:
    """A command line that is held up while it is checked; and what holds it, to be closed."""
    gate, settings = start.folder / "gate.sh", start.folder / "settings.sh"
    os.mkfifo(gate)
    settings.touch()
    command = (sys.executable, str(WORKERS / "held_up.py"), str(gate))
    words = (
        "--env-file",
        str(settings),
        f"unix:{start.folder}/s?mode=0600",
        "--",
        *map(str, MINIMAL),
    )
    with start_of(start, *options, *words, command=command) as process:
        yield process, os.open(gate, os.O_WRONLY)


def test_signals_before_the_protector_stands_are_not_lost(start: Start) -> None:
    """HUP and TERM that come while the foreground process is still parsing and executing."""
    with held_up(start, "-f") as (process, held):
        process.send_signal(signal.SIGHUP)
        os.close(held)
        assert process.stderr
        seen = ""
        while "event=reloaded" not in seen:
            seen += process.stderr.readline()
        assert ask(f"{start.folder}/s") == "hello"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert start.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_command_line_is_read_ends_it(
    start: Start, number: signal.Signals
) -> None:
    with held_up(start) as (process, held):
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 130
        os.close(held)
    assert start.left() == []


def test_a_second_ctrl_c_does_not_cut_the_clean_up_short(start: Start) -> None:
    command = ("sh", "-c", "trap '' TERM; echo deaf >&2; sleep 1000; sleep 1000")
    words = ("--kill-timeout", "300ms", f"unix:{start.folder}/s?mode=0600", "--", *command)
    with start_of(start, "--log-file", start.log_file, *words) as process:
        start.wait_for("^deaf|\ndeaf")
        process.send_signal(signal.SIGINT)
        start.wait_for("event=stopping")
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
        assert start.left() == []


def test_ctrl_c_and_ready_may_cross(start: Start, gate: Path) -> None:
    """Whichever wins: either it serves and the status is 0, or nothing is left of it."""
    with waiting(start, gate) as (process, held):
        os.write(held, b"go")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode in (0, 130), said
    if process.returncode == 0:
        assert ask(f"{start.folder}/s").endswith("hello")
        start.stop()
    assert start.left() == []


@pytest.mark.costly
def test_nothing_of_a_killed_start_is_in_the_way_of_the_next(start: Start) -> None:
    words = (f"unix:{start.folder}/s?mode=0600", "--", *MINIMAL)
    start.up(*words)
    first = start.pid
    os.kill(first, signal.SIGKILL)
    assert not wait_gone([first])
    eventually(lambda: not marked(start.environment[MARK]), "the end of the worker")
    assert sorted(start.left()) == [f"{start.folder}/pid", f"{start.folder}/s"]

    start.up(*words)

    assert start.pid != first
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()
    assert start.left() == []
    assert len(re.findall("event=ready", start.log)) == 2
