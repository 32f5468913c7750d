"""--handoff listener at a UNIX path whose files others remove: clients are served."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.load import Load
from tests.running import Client, Protector, ask, eventually
from tests.scenarios.adopting import kill_protector, revived, served, upgrade
from tests.scenarios.operating import Operated
from tests.scenarios.probed import Asked
from tests.scenarios.tools import Gate, Release, pid_in, spawned, worker

MODE = ("--handoff", "listener")
SERVER = worker("accepts", "--ready", "never")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder / "web.sock"


@pytest.fixture
def one(
    protector: Callable[..., Protector], path: Path, place: Path, release: Release
) -> Iterator[Operated]:
    release.becomes(*SERVER)
    # Clients of a replaced socket wait for the starting generation, which may wait at a gate.
    words = (*MODE, "--guard", "--start-timeout", "10s", "--control", place)
    found = Operated(protector(*words, f"unix:{path}", "--", release.path).ready(), place)
    yield found
    found.daemon.stop()
    assert list(path.parent.iterdir()) == []


def tidy(path: Path) -> None:
    """Remove the files beside a path, as a program that removes old temporary files does."""
    for each in path.parent.iterdir():
        if each != path:
            each.unlink()


def at_rest(one: Operated) -> None:
    with one.line() as line:
        eventually(lambda: line.ask("status")["phase"] == "serving", "no reload is in progress")


def newest_answers(one: Operated, path: Path) -> None:
    eventually(lambda: pid_in(ask(str(path))) == spawned(one.daemon)[-1], "the newest answers")


@pytest.mark.costly
def test_files_removed_while_idle_harm_no_reload(one: Operated, path: Path) -> None:
    with Load(f"unix:{path}") as load:
        for _ in range(3):
            tidy(path)
            one.daemon.reload()
            served(load)
        tidy(path)
        assert "event=resumed" in upgrade(one.daemon)
        one.daemon.reload()
        served(load)
        tidy(path)
        revived(one.daemon, kill_protector(one.daemon))
        one.daemon.reload()
        served(load)
    newest_answers(one, path)
    assert load.snapshot().failures == ()


def test_clients_go_back_though_the_files_were_removed(
    protector: Callable[..., Protector], path: Path, place: Path, release: Release
) -> None:
    release.becomes(*SERVER)
    words = (*MODE, "--settle", "5s", "--control", place, f"unix:{path}", "--", release.path)
    daemon = protector(*words).ready()
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    tidy(path)
    path.unlink()
    os.kill(spawned(daemon)[-1], signal.SIGKILL)
    daemon.log.wait_for("event=reload-failed", after=mark)

    eventually(path.exists, "the path leads somewhere")
    answered = pid_in(ask(str(path)))
    eventually(
        lambda: answered in (spawned(daemon, 1)[0], spawned(daemon)[-1]),
        "the log has the worker that answered",
    )
    daemon.reload()
    assert pid_in(ask(str(path))) == spawned(daemon)[-1]
    daemon.stop()
    assert list(path.parent.iterdir()) == []


@pytest.mark.costly
def test_clients_wait_for_one_start_alone_when_a_release_fails_after_its_files_were_removed(
    protector: Callable[..., Protector], path: Path, asked: Asked
) -> None:
    words = (*MODE, "--ready", "accept", "--settle", "1h", "--settle-check", "http:/healthz")
    daemon = protector(*words, f"unix:{path}", "--", asked.release.path).ready()
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    tidy(path)
    asked.bad()
    daemon.log.wait_for("event=socket-replaced", after=mark)
    asked.good()

    # Though the generation that accepts settles for an hour.
    assert "200" in ask(str(path), "GET / HTTP/1.0\r\n\r")
    daemon.log.wait_for("event=route generation=3", after=mark)
    assert daemon.log.count("event=spawned") == 3
    daemon.stop()
    assert list(path.parent.iterdir()) == []


@pytest.mark.costly
def test_clients_of_a_socket_that_a_worker_shuts_down_wait_for_one_start_alone(
    protector: Callable[..., Protector], path: Path, release: Release, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    release.becomes(*worker("hostile_listener", "shuts_it_down", gate.path))
    words = (*MODE, "--settle", "1h", "--kill-timeout", "1s", f"unix:{path}", "--", release.path)
    daemon = protector(*words).ready()
    release.becomes(*SERVER)
    gate.open()
    daemon.log.wait_for("event=socket-replaced")

    assert pid_in(ask(str(path))) == spawned(daemon, 2)[0]
    assert daemon.log.count("event=spawned") == 2
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0
    assert list(path.parent.iterdir()) == []


@pytest.mark.costly
def test_files_removed_before_and_during_holds_keep_no_client_waiting(
    one: Operated, path: Path
) -> None:
    for _ in range(2):
        one.daemon.reload()
        with one.line() as line:
            line.ask("hold", seconds=3600)
            tidy(path)
            line.ask("release")
        assert ask(str(path), "hello").endswith(" hello")
        tidy(path)
        with one.line() as line:
            line.ask("hold", seconds=3600)
            with Client(str(path), "hello") as late:
                tidy(path)
                line.ask("release")
                assert late.hear().endswith(" hello")
        newest_answers(one, path)
        at_rest(one)
    one.daemon.reload()
    newest_answers(one, path)


@pytest.mark.costly
def test_the_path_removed_comes_back_at_the_next_reload(one: Operated, path: Path) -> None:
    for _ in range(2):
        path.unlink()
        one.daemon.reload()
        newest_answers(one, path)


@pytest.mark.costly
def test_all_files_removed_and_a_reload(one: Operated, path: Path) -> None:
    for _ in range(2):
        tidy(path)
        path.unlink()
        one.daemon.reload()
        newest_answers(one, path)


@pytest.mark.costly
def test_a_reload_fails_while_another_program_s_file_is_at_the_path(
    one: Operated, path: Path
) -> None:
    one.daemon.reload()
    path.unlink()
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        mark = one.daemon.signal(signal.SIGHUP)
        failed = one.daemon.log.wait_for("event=(reload-failed|reloaded)", after=mark)
    assert f"{path}: another program has put its file there; remove it" in failed

    path.unlink()
    one.daemon.reload()
    newest_answers(one, path)


def faults(one: Operated, path: Path) -> list[str]:
    """Return what `status` reports about the path's clients."""
    with one.line() as line:
        found = line.ask("status")["warnings"]
    return [each for each in found if each.startswith(f"unix:{path}: no client can connect")]


def test_status_reports_a_path_that_leads_no_client_to_a_worker(one: Operated, path: Path) -> None:
    assert faults(one, path) == []
    path.unlink()
    assert faults(one, path) == [
        f"unix:{path}: no client can connect: its socket file was removed; reload "
        "(first make its folder, if that is missing)"
    ]
    path.touch()
    assert faults(one, path) == [
        f"unix:{path}: no client can connect: another program has put its file there; remove it"
    ]

    path.unlink()
    one.daemon.reload()
    assert faults(one, path) == []


@pytest.mark.parametrize("how", ["killed", "upgraded"])
@pytest.mark.costly
def test_the_next_protector_makes_removed_files_again_with_the_rights_that_they_had(
    one: Operated, path: Path, how: str
) -> None:
    path.chmod(0o640)
    one.daemon.reload()
    mark = len(one.daemon.log.seen)
    tidy(path)
    path.unlink()
    if how == "upgraded":
        upgrade(one.daemon)
    else:
        revived(one.daemon, kill_protector(one.daemon))

    one.daemon.log.wait_for("event=route generation=3", after=mark)
    newest_answers(one, path)
    assert path.stat().st_mode & 0o777 == 0o640
    assert faults(one, path) == []
    one.daemon.reload()
    newest_answers(one, path)


def starting(one: Operated, release: Release, gate: Gate) -> int:
    """Begin a reload whose worker waits at a gate; return the log's position before it."""
    release.becomes(*gate.before(*SERVER))
    mark = one.daemon.signal(signal.SIGHUP)
    one.daemon.log.wait_for("event=spawned generation=2", after=mark)
    release.becomes(*SERVER)
    return mark


@pytest.mark.costly
def test_a_reload_does_not_wait_for_a_path_that_another_program_has_taken(
    one: Operated, path: Path, release: Release, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    mark = starting(one, release, gate)
    path.unlink()
    path.write_text("not ours")
    gate.stay_open()
    one.daemon.log.wait_for("event=not-steered", after=mark)

    # No client comes by the path, so generation 1 has accepted its last one.
    one.daemon.log.wait_for("event=drained generation=1", after=mark)
    mark = one.daemon.signal(signal.SIGHUP)
    one.daemon.log.wait_for(
        "event=reload-failed generation=3 reason=.*put its file there", after=mark
    )
    path.unlink()
    eventually(lambda: path.exists() and pid_in(ask(str(path))) > 0, "a worker answers")
    one.daemon.reload()
    newest_answers(one, path)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.costly
def test_a_directory_that_comes_back_has_the_path_again(
    one: Operated, path: Path, release: Release, tmp_path: Path, killed: bool
) -> None:
    gate = Gate(tmp_path / "gate")
    mark = starting(one, release, gate)
    shutil.rmtree(path.parent)
    if killed:
        revived(one.daemon, kill_protector(one.daemon))
    one.daemon.log.wait_for("event=not-steered", after=mark)
    path.parent.mkdir()

    # Without a reload: the steering is tried again and again.
    eventually(lambda: path.exists() and pid_in(ask(str(path))) > 0, "a worker answers")
    assert faults(one, path) == []
    gate.stay_open()
    at_rest(one)
    one.daemon.reload()
    newest_answers(one, path)
    assert one.daemon.log.count("event=one-socket-left") == 0


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.costly
def test_a_generation_becomes_ready_though_the_file_of_its_clients_socket_was_removed(
    one: Operated, path: Path, release: Release, tmp_path: Path, killed: bool
) -> None:
    one.daemon.reload()
    gate, mark = Gate(tmp_path / "gate"), len(one.daemon.log.seen)
    release.becomes(*gate.before(*SERVER))
    with one.line() as line:
        line.ask("hold", seconds=3600)
        with Client(str(path), "hello") as late:
            tidy(path)
            line.ask("release")
            # The path leads to the hold's socket, and so to the next generation's.
            one.daemon.log.wait_for("event=spawned generation=3", after=mark)
            release.becomes(*SERVER)
            if killed:
                revived(one.daemon, kill_protector(one.daemon))
            gate.stay_open()
            assert late.hear().endswith(" hello")
    at_rest(one)
    assert one.daemon.log.count("event=reload-failed .*No such file") == 0
    one.daemon.reload()
    newest_answers(one, path)


@pytest.mark.costly
def test_a_reload_fails_at_once_if_the_file_of_its_socket_is_removed(
    one: Operated, path: Path, release: Release, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    mark = starting(one, release, gate)
    tidy(path)
    gate.stay_open()  # while a probe waits at the socket, the worker may be about to accept it
    failed = one.daemon.log.wait_for("event=reload-failed generation=2", after=mark)
    assert "not ready within" not in failed
    assert pid_in(ask(str(path))) == spawned(one.daemon, 1)[0]
    one.daemon.reload()
    newest_answers(one, path)
