"""In the background of a terminal that wants no output from there (`stty tostop`)."""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest

from tests.procfs import state_of
from tests.running import DEADLINE_S, Client, eventually
from tests.scenarios.starting import MINIMAL, Start, on_a_terminal

#: As a shell does with `command &`: a group of its own, which is not the terminal's.
IN_BACKGROUND = """
import os, sys, termios
mode = termios.tcgetattr(2)
mode[3] |= termios.TOSTOP
termios.tcsetattr(2, termios.TCSANOW, mode)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    os.execvp(sys.argv[1], sys.argv[1:])
pid, status = os.waitpid(child, os.WUNTRACED)
if os.WIFSTOPPED(status):
    os.kill(child, 9)
    sys.exit("stopped by signal %d" % os.WSTOPSIG(status))
sys.exit(os.waitstatus_to_exitcode(status))
"""
LEADER = (sys.executable, "-c", IN_BACKGROUND)


@pytest.mark.parametrize("guarded", [(), ("--guard",)], ids=["alone", "guarded"])
def test_what_is_said_comes_to_the_terminal_and_stops_no_process(
    start: Start, guarded: tuple[str, ...]
) -> None:
    words = (*guarded, "--workers", "2", "unix:s", "--", *MINIMAL)
    with on_a_terminal(start, *words, before=LEADER) as (process, terminal):
        seen = terminal.read_until("event=ready")
        os.kill(start.pid, signal.SIGHUP)
        seen += terminal.read_until("event=reloaded")
        with Client(f"{start.folder}/s"):
            pass
        os.kill(start.pid, signal.SIGTERM)
        seen += terminal.read_until("event=stopped")
        assert process.wait(DEADLINE_S) == 0
        terminal.close()
    assert "signal=SIGTTOU" not in seen  # which would be one worker fewer each time
    assert start.left() == []


@pytest.mark.costly
def test_a_killed_protector_is_reported_by_the_guard(start: Start) -> None:
    with on_a_terminal(start, "--guard", "unix:s", "--", *MINIMAL, before=LEADER) as (
        process,
        terminal,
    ):
        seen = terminal.read_until("event=ready")
        pid = int(re.findall(r"event=start pid=(\d+)", seen)[0])
        os.kill(pid, signal.SIGKILL)
        terminal.read_until("event=protector-died")
        terminal.read_until("event=resumed")
        os.kill(start.pid, signal.SIGTERM)
        terminal.read_until("event=stopped")
        assert process.wait(DEADLINE_S) == 0
        terminal.close()
    assert start.left() == []


def test_the_reason_of_a_failed_start_is_shown_there(start: Start) -> None:
    words = ("--log-file", "log", "unix:s", "--", "/bin/false")
    with on_a_terminal(start, *words, before=LEADER) as (process, terminal):
        terminal.read_until("exited with status 1 before it was ready")
        assert process.wait(DEADLINE_S) == 3
        terminal.close()


def test_a_refusal_is_shown_there(start: Start) -> None:
    with on_a_terminal(start, "--no-such-option", before=LEADER) as (process, terminal):
        terminal.read_until("--no-such-option")
        assert process.wait(DEADLINE_S) == 2
        terminal.close()


def test_no_process_spins_there(start: Start) -> None:
    with on_a_terminal(start, "unix:s", "--", *MINIMAL, before=LEADER) as (process, terminal):
        terminal.read_until("event=ready")
        eventually(lambda: state_of(start.pid) == "S", "it sleeps")
        os.kill(start.pid, signal.SIGTERM)
        terminal.read_until("event=stopped")
        assert process.wait(DEADLINE_S) == 0
        terminal.close()
