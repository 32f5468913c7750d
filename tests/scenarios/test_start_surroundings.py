"""What the protector is started from: descriptors, limits, folders, terminals, installs."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import socketprotector_client

import socketprotector
from tests import needs
from tests.copies import copy_package
from tests.procfs import cpu_s, descriptors, status_of, terminal_of
from tests.running import COMMAND, DEADLINE_S, Client, ask
from tests.scenarios.starting import MINIMAL, TELLS, Start, on_a_terminal, start_of, told
from tests.scenarios.tools import worker

# -- descriptors ---------------------------------------------------------------


#: A worker writes to a pipe of its own, or without the relay to the log file itself.
relayed = pytest.mark.parametrize("relay", [(), ("--no-log-relay",)])


def is_output(target: str, start: Start, relay: tuple[str, ...]) -> bool:
    if not relay:
        return target.startswith("pipe:[")
    return target == str(start.log_file)


@relayed
@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&-", "0<&- 1>&- 2>&-"])
def test_standard_descriptors_may_be_closed(
    start: Start, closed: str, relay: tuple[str, ...]
) -> None:
    before = ("sh", "-c", f'exec "$@" {closed}', "-")
    words = (*relay, "--log-file", "log", "127.0.0.1:0", "unix:s?mode=0600", "--", *TELLS)
    shown = {"PYTHONWARNINGS": "default::ResourceWarning"}

    ended = start(*words, before=before, environment=shown)

    assert ended.status == 0, ended
    assert ended.err == "", "it closes what it has opened, too"
    found = told(f"{start.folder}/s")
    assert found["descriptors"]["0"] == "/dev/null"
    assert is_output(found["descriptors"]["2"], start, relay)
    assert descriptors(start.pid)[0] == "/dev/null"
    start.stop()
    assert start.left() == []


def test_the_starting_process_closes_what_it_has_opened(start: Start) -> None:
    environment = {"PYTHONWARNINGS": "error::ResourceWarning"}

    ended = start.up("unix:s?mode=0600", "--", *MINIMAL, environment=environment)

    assert ended.err == ""
    start.stop()


@relayed
def test_standard_descriptors_may_be_closed_in_the_foreground(
    start: Start, relay: tuple[str, ...]
) -> None:
    before = ("sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "-")
    words = ("-f", *relay, "--log-file", "log", "unix:s?mode=0600", "--", *TELLS)

    with start_of(start, *words, before=before) as run:
        start.wait_for("event=ready")
        found = told(f"{start.folder}/s")
        assert found["descriptors"]["0"] == "/dev/null"
        assert is_output(found["descriptors"]["1"], start, relay)
        run.send_signal(signal.SIGTERM)
        assert run.wait(DEADLINE_S) == 0
    assert start.left() == []


def test_it_starts_although_its_output_is_not_read(start: Start) -> None:
    receive, send = os.pipe()
    os.close(receive)

    ended = start(
        "--backlog", "999999", "127.0.0.1:0", "unix:s?mode=0600", "--", *MINIMAL, stdout=send
    )
    os.close(send)

    assert ended.status == 0
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()


@pytest.mark.costly
def test_a_failed_start_with_closed_descriptors_has_its_status(start: Start) -> None:
    before = ("sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "-")

    for mode in ((), ("-f",)):
        ended = start(*mode, "unix:s?mode=0600", "--", "false", before=before)

        assert (ended.status, ended.out, ended.err) == (3, "", "")
        assert start.left() == []


@pytest.mark.parametrize("mode", ["detached", "foreground"])
def test_leaked_descriptors_reach_no_process(start: Start, mode: str) -> None:
    receive, send = os.pipe()
    high = fcntl.fcntl(send, fcntl.F_DUPFD, 200)
    leaked = os.readlink(f"/proc/self/fd/{send}")
    options = ("-f",) if mode == "foreground" else ()
    words = (*options, "--log-file", "log", "unix:s?mode=0600", "--", *TELLS)
    with start_of(start, *words, pass_fds=(send, high)) as process:
        os.close(send)
        os.close(high)
        start.wait_for("event=ready")
        found = told(f"{start.folder}/s")
        assert leaked not in descriptors(start.pid).values()
        assert sorted(map(int, found["descriptors"])) == [0, 1, 2, 3, 4, 5]
        assert os.read(receive, 1) == b"", "no process has it any more"
        if mode == "foreground":
            process.send_signal(signal.SIGTERM)
    os.close(receive)
    if mode == "detached":
        start.stop()


def test_a_high_limit_of_descriptors_costs_no_time(start: Start) -> None:
    """python-daemon closes all that could be open: a million of them here."""
    nr_open = int(Path("/proc/sys/fs/nr_open").read_text())
    limit = min(1_048_576, nr_open)

    def with_limit(hard: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))

    options = "--log-file", "log", "unix:s?mode=0600", "--", *TELLS
    assert start(*options, preexec_fn=with_limit(1024)).status == 0
    usual_s = cpu_s(start.pid)
    start.stop()
    try:
        ended = start(*options, preexec_fn=with_limit(limit))
    except subprocess.SubprocessError:
        needs.skip("root, to raise a hard limit")

    assert ended.status == 0
    found = told(f"{start.folder}/s")
    assert found["nofile"] == [1024, limit], "the caller's soft limit"
    assert cpu_s(start.pid) < usual_s * 3, "it does not close each possible descriptor"
    start.stop()


def test_the_protector_stays_as_small_as_it_is(start: Start, tmp_path: Path) -> None:
    """As installed: with bytecode.  A process that has to compile its modules keeps 1.5 MB more."""
    installed = tmp_path / "installed"
    for package in (socketprotector, socketprotector_client):
        [source] = package.__path__
        copy_package(source, installed / package.__name__)
    subprocess.run([sys.executable, "-m", "compileall", "-q", installed], check=True)
    start.environment["PYTHONPATH"] = str(installed)
    start.up("unix:s?mode=0600", "--", *MINIMAL)

    resident_kb = int(status_of(start.pid)["VmRSS"].split()[0])

    # Some room for the next feature.  The same modules are 2 MB more in Python 3.12 and 3.13.
    most_mb = 15.5 if sys.version_info < (3, 12) else 18.0
    assert resident_kb <= most_mb * 1024
    start.stop()


# -- folders and installs ------------------------------------------------------


def test_a_current_link_to_a_release_is_followed_at_each_reload(start: Start) -> None:
    for name in ("one.sh", "two.sh"):
        release = start.folder / name
        release.mkdir()
        daemon = release / "daemon"
        daemon.write_text(f"#!/bin/sh\nRELEASE={name} exec {' '.join(TELLS)}\n")
        daemon.chmod(0o755)
    current = start.folder / "current.sh"
    current.symlink_to("one.sh")

    start.up(f"unix:{start.folder}/s?mode=0600", "--", "./daemon", cwd=current)
    first = told(f"{start.folder}/s")
    current.unlink()
    current.symlink_to("two.sh")
    start.reload()
    second = told(f"{start.folder}/s")

    assert first["environment"]["RELEASE"] == "one.sh"
    assert first["directory"] == str(start.folder / "one.sh")
    assert second["environment"]["RELEASE"] == "two.sh"
    assert second["directory"] == str(start.folder / "two.sh")
    start.stop()


def test_paths_are_the_callers_and_the_command_too(start: Start) -> None:
    """./daemon, --chdir and the files are taken against the caller's folder, not --chdir's."""
    room = start.folder / "room.sh"
    room.mkdir()
    daemon = start.folder / "daemon.sh"
    daemon.write_text(f"#!/bin/sh\nexec {' '.join(TELLS)}\n")
    daemon.chmod(0o755)

    ended = start(
        *("--pid-file", "pid", "--log-file", "log", "--chdir", "room.sh", "unix:s?mode=0600"),
        *("--", "./daemon.sh"),
    )

    assert ended.status == 0, ended
    assert told(f"{start.folder}/s")["directory"] == str(room)
    assert Path(f"/proc/{start.pid}/cwd").resolve() == Path("/"), "it holds no folder busy"
    start.stop()


def test_a_folder_that_goes_away_later_fails_only_reloads(start: Start) -> None:
    room = start.folder / "room.sh"
    room.mkdir()
    start.up("--chdir", "room.sh", "unix:s?mode=0600", "--", *MINIMAL)
    room.rmdir()

    start.send(signal.SIGHUP)

    start.wait_for("event=reload-failed .*room.sh: No such file or directory")
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()


@pytest.mark.parametrize("path", ["absolute", "relative", "current directory"])
@pytest.mark.costly
def test_it_needs_no_install_but_a_python_path(start: Start, path: str) -> None:
    """As from a checkout; the module is found by the resident process and by workers too."""
    copy = start.folder / "copy.sh"
    copy.mkdir()
    for package in (socketprotector, socketprotector_client):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    script = start.folder / "worker.py"
    script.write_text(
        "import sys, socketprotector_client as c\n"
        "print(c.__file__, file=sys.stderr, flush=True)\n"
        "for client, address in c.connections():\n"
        "    client.close()\n"
    )
    environment = {"PYTHONPATH": str(copy) if path == "absolute" else "copy.sh"}
    cwd = start.folder
    if path == "current directory":
        cwd, environment = copy, {"PYTHONPATH": ""}

    start.up(
        *(f"unix:{start.folder}/s?mode=0600", "--", sys.executable, script),
        environment=environment,
        cwd=cwd,
    )

    start.reload()
    start.stop()

    # What the workers said comes through the relay, which ends with the protector at the latest.
    if path == "current directory":
        assert "socketprotector_client" in start.log
    else:
        assert f"{copy}/socketprotector_client/__init__.py" in start.log


@pytest.mark.parametrize("option", ["-I", "-E"])
def test_an_isolated_python_stays_isolated(start: Start, option: str) -> None:
    """PYTHONPATH, which the option lets it ignore, has another package of this name."""
    planted = start.folder / "planted"
    (planted / "socketprotector").mkdir(parents=True)
    (planted / "socketprotector/__init__.py").write_text("raise SystemExit('planted')\n")
    isolated = (sys.executable, option, "-m", "socketprotector")
    if subprocess.run([*isolated, "--version"], capture_output=True).returncode:
        needs.skip("an install that a Python finds without PYTHONPATH")

    ended = start(
        *("unix:s?mode=0600", "--", *MINIMAL),
        command=isolated,
        environment={"PYTHONPATH": str(planted)},
    )

    assert ended.status == 0, start.log
    start.stop()


# -- terminals -----------------------------------------------------------------


def test_output_of_the_foreground_is_on_the_terminal(start: Start) -> None:
    with on_a_terminal(start, "unix:s?mode=0600", "--", *worker("talks")) as (process, terminal):
        terminal.read_until("event=ready")
        with Client(f"{start.folder}/s", "a line of the worker"):
            terminal.read_until("a line of the worker")
        terminal.write(b"\x03")
        terminal.read_until("event=stopped")
        assert process.wait(DEADLINE_S) == 0
        terminal.close()
    assert start.left() == []


@pytest.mark.costly
def test_the_terminal_of_the_foreground_going_away_stops_it(start: Start) -> None:
    with on_a_terminal(start, "--log-file", "log", "unix:s?mode=0600", "--", *MINIMAL) as (
        process,
        terminal,
    ):
        start.wait_for("event=ready")
        terminal.close()
        assert process.wait(DEADLINE_S) == 0
    assert "event=signal signal=SIGHUP" in start.log
    assert "event=stopping" in start.log
    assert start.left() == []


def test_under_nohup_the_terminal_may_go_away(start: Start) -> None:
    words = ("--log-file", "log", "unix:s?mode=0600", "--", *MINIMAL)
    with on_a_terminal(start, *words, before=("nohup",)) as (process, terminal):
        start.wait_for("event=ready")
        terminal.close()
        # Nothing comes of it: what comes after it is served.
        assert ask(f"{start.folder}/s") == "hello"
        process.send_signal(signal.SIGUSR1)
        start.wait_for("event=reopened")
        assert process.poll() is None
        assert "event=stopping" not in start.log
        assert "event=reloading" not in start.log
        process.send_signal(signal.SIGHUP)
        start.wait_for("event=signal signal=SIGHUP")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0


def test_a_detached_protector_has_no_terminal_and_reloads_on_hup(start: Start) -> None:
    """Also when HUP was ignored by the process that started it."""
    start.up("unix:s?mode=0600", "--", *MINIMAL, before=("nohup",))

    assert os.getsid(start.pid) != start.pid, "no session leader: it can get no terminal"
    assert os.getsid(start.pid) != os.getsid(0)
    terminal = terminal_of(start.pid)
    assert terminal == 0
    start.reload()
    start.stop()


@pytest.mark.parametrize("options", [(), ("--guard",)], ids=["alone", "guarded"])
@pytest.mark.costly
def test_a_caller_may_ignore_the_end_of_its_children(start: Start, options: Sequence[str]) -> None:
    """As some supervisors and container entry points do; it is inherited over exec."""
    ignores = "from signal import *; import os, sys; signal(SIGCHLD, SIG_IGN); "
    before = (sys.executable, "-c", ignores + "os.execvp(sys.argv[1], sys.argv[1:])")

    start.up(*options, "unix:s?mode=0600", "--", *MINIMAL, before=before)

    start.reload()
    start.stop()


def test_stdin_may_be_a_socket(start: Start) -> None:
    """As under `ssh host SocketProtector ...`, where others take it for inetd and do not detach."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ended = start("unix:s?mode=0600", "--", *MINIMAL, stdin=theirs)

        assert ended.status == 0
        assert os.getsid(start.pid) != os.getsid(0)
        theirs.close()
        assert ours.recv(1) == b"", "no process holds the other end"
    start.stop()


def test_a_reader_of_the_commands_output_gets_its_end(start: Start) -> None:
    """`$(SocketProtector ...)` returns: the protector holds none of the caller's descriptors."""
    words = (*COMMAND, "--pid-file", "pid", "--log-file", "log", "unix:s?mode=0600", "--", *MINIMAL)
    ended = subprocess.run(
        ["sh", "-c", 'echo "$("$@" 2>&1)"', "-", *words],
        cwd=start.folder,
        env={**start.environment, "PWD": str(start.folder)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "\n", "")
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()
