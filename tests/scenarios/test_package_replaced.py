"""The package's files change below a running protector, which has loaded all that it will need."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from socketprotector.system.late_modules import PROGRAMS
from tests import needs
from tests.copies import copy_package
from tests.procfs import running
from tests.running import DEADLINE_S, MARK, ROOT, Protector, ask, marked
from tests.scenarios.adopting import Installation, kill_protector, revived, upgrade
from tests.scenarios.operating import Line, Operated
from tests.scenarios.probed import Asked, get
from tests.scenarios.tools import EITHER_HANDOFF, pid_in, spawned, worker

MANY = worker("many")


def operated(
    installation: Installation, place: Path, *options: str, command: tuple[str, ...] = MANY
) -> Operated:
    """Start a protector, and remove its package when it serves."""
    words: list[str | Path] = ["--control", place, *options, "127.0.0.1:0", "--", *command]
    daemon: Protector = installation.start(*words).ready()
    one = Operated(daemon, place)
    shutil.rmtree(installation.folder / "one" / "socketprotector")
    return one


def replace_by_a_broken_version(installation: Installation) -> None:
    """Have other files in the place of the removed ones: none of them can be loaded."""
    package = installation.folder / "one" / "socketprotector"
    for folder in ("", "core", "daemon", "daemon/control", "model", "programs", "system"):
        (package / folder).mkdir()
        for name in ("__init__.py", "commands.py", "known_servers.py", "status.py", *PROGRAMS):
            (package / folder / name).write_text("raise SystemExit('another version')\n")


@pytest.mark.costly
def test_after_its_files_were_replaced_a_protector_holds_settles_and_restarts_workers(
    installation: Installation, place: Path
) -> None:
    one = operated(installation, place, "--settle", "0.2s", "--settle-check", "exit 0")
    replace_by_a_broken_version(installation)
    with Line(place) as line:
        line.ask("hold", seconds=60)
        line.ask("reload")
        one.until_generation(2, phase="serving")
        line.ask("release")
        os.kill(spawned(one.daemon)[-1], signal.SIGKILL)
        one.daemon.log.wait_for("event=worker-ready generation=2 worker=3")
        [reload] = line.ask("history")["history"]
        assert reload["result"] == "reloaded"
    assert pid_in(ask(one.address)) == spawned(one.daemon)[-1]
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_its_programs_are_those_of_the_version_that_started(
    installation: Installation,
    place: Path,
    asked: Asked,
    tmp_path: Path,
    marked_environment: dict[str, str],
) -> None:
    needs.module("watchfiles")
    source = tmp_path / "source"
    source.mkdir()
    asked.speaks_tls()
    asks = ("--ready", "https:/healthz", "--settle-check", "https:/healthz", "--settle", "0.2s")
    options = (*asks, "--health", "https:/healthz", "--health-every", "0.1s", "--log-prefix")
    command = (str(asked.release.path),)
    one = operated(installation, place, *options, "--watch", str(source), command=command)
    log = one.daemon.log
    log.wait_for("event=watching")
    replace_by_a_broken_version(installation)

    def kill(program: str) -> None:
        for pid in running(program, marked(marked_environment[MARK])):
            os.kill(pid, signal.SIGKILL)

    def serves(number: int) -> None:
        """The relay, the watcher and the prober are other processes, and do their work."""
        mark = len(log.seen)
        for each in PROGRAMS:
            kill(each)
        log.wait_for("event=relay-ended", after=mark)
        log.wait_for("event=watching", after=mark)
        with Line(place) as line:
            line.ask("hold", seconds=60)
            (source / f"{number}.py").write_text("pass")
            log.wait_for(rf"event=reloaded generation={number}\b", after=mark)
            line.ask("release")
        log.wait_for(rf"event=healthy generation={number}\b", after=mark)
        mark = len(log.seen)
        log.wait_for(rf"\[{number} \d+\] asked by", after=mark)

    serves(2)

    shutil.rmtree(installation.folder / "one" / "socketprotector")
    copy_package(ROOT / "socketprotector", installation.folder / "one" / "socketprotector")
    assert "event=resumed" in upgrade(one.daemon)
    serves(3)
    one.daemon.stop()


@EITHER_HANDOFF
def test_a_killed_protector_whose_package_was_replaced_comes_back_as_the_new_version(
    installation: Installation, place: Path, asked: Asked
) -> None:
    asks = ("--ready", "http:/healthz", "--settle-check", "http:/healthz", "--settle", "0.2s")
    options = ("--guard", *asks, "--health", "http:/healthz", "--health-every", "0.1s")
    one = operated(installation, place, *options, command=(str(asked.release.path),))
    package = installation.folder / "one" / "socketprotector"
    copy_package(ROOT / "socketprotector", package)
    installation.change("one", "__init__", r'__version__ = ".*"', '__version__ = "9.9.9"')

    def reload_while_held(number: int) -> None:
        mark = len(one.daemon.log.seen)
        with Line(place) as line:
            line.ask("hold", seconds=60)
            line.ask("reload")
            one.daemon.log.wait_for(rf"event=reloaded generation={number}\b", after=mark)
            line.ask("release")
        one.daemon.log.wait_for(rf"event=healthy generation={number}\b", after=mark)
        assert get(one.address[1])

    reload_while_held(2)
    assert one.status()["version"] != "9.9.9"
    revived(one.daemon, kill_protector(one.daemon))
    assert one.status()["version"] == "9.9.9"
    reload_while_held(3)
    one.daemon.stop()


@EITHER_HANDOFF
def test_a_protector_without_its_files_answers_and_reloads(
    installation: Installation, place: Path
) -> None:
    one = operated(installation, place)
    with Line(place) as line:
        for each in ("status", "history", "connections", "crashes"):
            assert line.ask(each), each
        line.ask("reload")
        one.until("route", 2)
        assert [each["result"] for each in line.ask("history")["history"]] == ["reloaded"]
    assert pid_in(ask(one.address)) == spawned(one.daemon)[-1]
    one.daemon.stop()


@pytest.mark.costly
def test_a_protector_of_stdio_without_its_files_hears_that_first_programs_fail(
    installation: Installation, place: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nread line; exit 7\n")
    program.chmod(0o755)
    one = operated(installation, place, "--handoff", "stdio", command=(str(program),))

    with socket.create_connection(one.address, DEADLINE_S) as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b""

    first = one.daemon.log.wait_for("event=program-failed")
    assert "status 7" in first
    assert one.generation(1)["first_programs"]["failed"] == 1
    one.daemon.stop()
