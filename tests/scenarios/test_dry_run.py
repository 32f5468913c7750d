"""reload --dry-run: the release is started, asked and ended; no client ever comes to it."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.c.building import compiled, shared_folder
from tests.load import Load
from tests.procfs import children_of
from tests.running import FAIR_START_S, Ended, Protector, ask, eventually, shared_path, wait_gone
from tests.scenarios.adopting import at_rest, kill_protector, revived, upgrade
from tests.scenarios.config_file import File
from tests.scenarios.operating import MANY, Operated, Operating
from tests.scenarios.probed import Asked, get
from tests.scenarios.running_ctl import Running
from tests.scenarios.tools import EITHER_HANDOFF, Gate, Release, pid_in, spawned, worker
from tests.unit.ctl.conftest import run

Starter = Callable[..., Protector]
PASSED = "would reload: generation 2 became ready and was stopped; generation 1 is still serving\n"


@pytest.fixture
def release(tmp_path: Path) -> Release:
    made = Release(tmp_path / "release")
    made.becomes(*MANY)
    return made


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "web.toml").says()


@pytest.fixture
def beside() -> Iterator[Callable[..., Running]]:
    """Start a dry run beside the test."""
    started: list[Running] = []

    def start(one: Operated, *more: str) -> Running:
        words = ("--control", str(one.path), "reload", "--dry-run", *more)
        started.append(Running(*words))
        return started[-1]

    yield start
    for each in started:
        each.end()


def dry_run(one: Operated, *more: str) -> Ended:
    return run("--control", str(one.path), "reload", "--dry-run", *more)


def what_serves(one: Operated) -> dict[str, Any]:
    """All of a status that a dry run must leave as it was."""
    status = one.status()
    kept = ("phase", "route", "workers_wanted", "listeners", "reloads", "reload_wanted", "ready")
    generations = [
        (each["number"], each["phase"], each["path"], [w["pid"] for w in each["workers"]])
        for each in status["generations"]
    ]
    return {**{name: status[name] for name in kept}, "generations": generations}


# -- what it says, and what it leaves ------------------------------------------------------


@EITHER_HANDOFF
def test_a_release_that_would_serve_serves_nobody_and_is_ended(
    operated: Operating, release: Release
) -> None:
    one = operated("--workers", "2", command=(str(release.path),))
    before, old = what_serves(one), {*one.pids(1)}

    with Load(f"127.0.0.1:{one.address[1]}", concurrency=4) as load:
        load.wait_for(lambda now: now.connections > 50)
        said = dry_run(one)
        tried = spawned(one.daemon, 2)
        at = load.snapshot().connections
        load.wait_for(lambda now: now.connections > at + 50)
    assert not load.snapshot().failures

    assert said.status == 0, said.err
    assert said.out == PASSED
    assert len(tried) == 2
    assert {*load.snapshot().pids} <= old
    assert wait_gone(tried) == []
    one.daemon.log.wait_for("event=drained generation=2")
    assert what_serves(one) == before
    tells = one.status()["dry_run"]
    assert (tells["generation"], tells["result"], tells["reason"]) == (2, "passed", "")
    assert "event=route generation=2" not in one.daemon.log.text()
    one.daemon.reload()
    assert one.status()["route"] == 3
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("exits", "exited with status 3"),
        ("is missing", "No such file"),
        ("is never ready", "not ready within"),
    ],
)
@pytest.mark.costly
def test_a_release_that_would_not_serve_is_what_a_failed_reload_is(
    operated: Operating, release: Release, what: str, why: str
) -> None:
    one = operated("--start-timeout", f"{FAIR_START_S}s", command=(str(release.path),))
    before = what_serves(one)
    match what:
        case "exits":
            release.write("#!/bin/sh\nexit 3\n")
        case "is missing":
            release.path.unlink()
        case _:
            release.becomes(*worker("never_ready"))

    said = dry_run(one)

    assert said.status == 3
    last = said.err.splitlines()[-1]
    assert last.startswith("socketprotectorctl: not ready to reload: generation 2 failed: ")
    assert why in said.err
    assert "generation 1 is still serving" in said.err
    assert what_serves(one) == before
    assert one.status()["dry_run"]["result"] == "failed"
    assert one.status()["crashes"] == 0
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_its_question_decides(operated: Operating, asked: Asked) -> None:
    words = ("--ready", "http:/healthz", "--start-timeout", f"{FAIR_START_S}s")
    one = operated(*words, command=(str(asked.release.path),))
    old = get(one.address[1])
    asked.bad()
    said = dry_run(one, "--json")
    assert said.status == 3
    assert json.loads(said.out)["result"] == "failed"
    assert 'GET /healthz: 500, "database gone"' in json.loads(said.out)["reason"]

    asked.good()
    said = dry_run(one, "--json")

    assert said.status == 0
    found = json.loads(said.out)
    assert (found["result"], found["generation"], found["from"]) == ("passed", 3, 1)
    assert get(one.address[1]) == old
    one.daemon.stop()


@pytest.mark.costly
def test_one_that_accepts_and_dies_soon_would_not_serve(
    operated: Operating, asked: Asked, gate: Gate, beside: Callable[..., Running]
) -> None:
    """By default a server is ready once it accepts, and may die of that."""
    one = operated("--handoff", "listener", command=(str(asked.release.path),))
    asked.becomes("--dies", gate.path)
    trying = beside(one)
    one.daemon.log.wait_for("event=worker-ready generation=2 .*by=accept")

    gate.open()

    assert trying.wait() == 3
    assert "exited with status 7" in trying.err.text()
    one.daemon.stop()


@pytest.mark.costly
def test_a_daemon_of_the_original_is_tried_too(
    protector: Starter,
    place: Path,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    port = free_port()
    original = compiled(shared_folder(tmp_path_factory), "original")
    words = ("--control", place, "--handoff", "legacy", f"127.0.0.1:{port}", "--", original)
    one = Operated(protector(*words, str(port)).ready(), place)

    with Load(f"127.0.0.1:{port}", concurrency=2) as load:
        load.wait_for(lambda now: now.connections > 20)
        assert dry_run(one).out == PASSED
        at = load.snapshot().connections
        load.wait_for(lambda now: now.connections > at + 20)
    assert not load.snapshot().failures
    one.daemon.stop()


# -- with a configuration file ---------------------------------------------------------------


@EITHER_HANDOFF
@pytest.mark.costly
def test_the_file_is_tried_with_what_it_adds_and_nothing_of_it_stays(
    operated: Operating,
    protector: Starter,
    place: Path,
    file: File,
    gate: Gate,
    free_port: Callable[[], int],
    beside: Callable[..., Running],
) -> None:
    one = Operated(protector("--control", place, "--config", file.path).ready(), place)
    try:
        before = what_serves(one)
        added = free_port()
        file.listens += [f"127.0.0.1:{added}"]
        file.command = gate.before(*MANY)
        file.says('drain-timeout = "7s"')
        trying = beside(one)
        [new] = spawned(one.daemon, 2)
        with socket.create_connection(("127.0.0.1", added)) as waiting:  # it is bound
            waiting.sendall(b"hello\n")
            gate.open()
            assert trying.wait() == 0, trying.err.text()
            try:
                answered = waiting.recv(100)
            except ConnectionResetError:
                answered = b""
            assert answered == b"", "a client came to what was only tried"

        assert what_serves(one) == before
        assert "event=configured" not in one.daemon.log.text()
        one.daemon.log.wait_for("event=dry-run-configured changes=")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", added))
        assert wait_gone([new]) == []
    finally:
        one.end()


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ("colour = 1", "colour: unknown key"),
        ('reload-order = "stop-first"', "cannot dry-run: with --reload-order stop-first"),
    ],
)
@pytest.mark.costly
def test_a_file_that_cannot_be_tried_is_told(
    protector: Starter, place: Path, file: File, keys: str, why: str
) -> None:
    one = Operated(protector("--control", place, "--config", file.path).ready(), place)
    before = what_serves(one)
    file.says(keys)

    said = dry_run(one)

    assert said.status == 3
    assert why in said.err
    assert what_serves(one) == before
    one.daemon.stop()


@pytest.mark.costly
def test_an_added_socket_that_all_would_accept_from_cannot_be_tried(
    protector: Starter, place: Path, file: File, tmp_path: Path
) -> None:
    words = ("--control", place, "--handoff", "listener", "--config", file.path)
    one = Operated(protector(*words).ready(), place)
    path = shared_path(tmp_path)
    file.listens += [f"unix:{path}"]
    file.says()

    said = dry_run(one)

    assert said.status == 3
    assert "cannot dry-run: unix:" in said.err
    assert not path.exists()
    one.daemon.stop()


# -- where there is none ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--reload-order", "stop-first"), "the old workers end before the new ones start"),
        (("--handoff", "stdio"), "nothing can be probed before"),
        (("--handoff", "listener", "unix:SHARED"), "has one socket for all generations"),
    ],
)
def test_it_is_refused_in_words(
    operated: Operating, tmp_path: Path, words: tuple[str, ...], why: str
) -> None:
    given = [word.replace("SHARED", str(shared_path(tmp_path))) for word in words]
    one = operated(*given)
    before = what_serves(one)

    said = dry_run(one)

    assert (said.status, said.out) == (100, "")
    assert why in said.err
    assert what_serves(one) == before
    assert "event=dry-run" not in one.daemon.log.text()


def test_it_does_not_go_with_drained() -> None:
    said = run("--name", "web", "reload", "--dry-run", "--drained")

    assert said.status == 2
    assert "does not work with --drained" in said.err


# -- beside other things ---------------------------------------------------------------------


class Waiting:
    """A dry run that goes on until the gate is opened."""

    def __init__(self, one: Operated, release: Release, gate: Gate) -> None:
        self.one, self.gate = one, gate
        self.old = pid_in(ask(one.address))
        release.becomes(*gate.before(*MANY))


@pytest.fixture
def waiting(operated: Operating, release: Release, gate: Gate) -> Waiting:
    return Waiting(operated(command=(str(release.path),)), release, gate)


def begun(one: Operated, trying: Running) -> Running:
    [new] = spawned(one.daemon, 2)
    at_rest(one.daemon)  # before that the worker is not written down
    # Until then its shell may not have read the release, which another one may replace.
    eventually(lambda: children_of(new) != [], "it waits at the gate")
    return trying


@EITHER_HANDOFF
@pytest.mark.costly
def test_another_one_and_one_beside_a_reload_are_refused(
    waiting: Waiting, beside: Callable[..., Running]
) -> None:
    one = waiting.one
    trying = begun(one, beside(one))
    assert one.status()["phase"] == "serving"
    assert one.status()["dry_run"]["result"] == "running"
    said = dry_run(one)
    assert said.status == 100
    assert "another dry run is in progress" in said.err
    waiting.gate.open()
    assert trying.wait() == 0
    mark = one.daemon.signal(signal.SIGHUP)
    one.daemon.log.wait_for("event=spawned generation=3", after=mark)

    said = dry_run(one)

    assert said.status == 100
    assert "a start, reload or replacement is in progress" in said.err
    waiting.gate.open()
    one.daemon.log.wait_for("event=reloaded generation=3", after=mark)
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_reload_meanwhile_follows_it(
    waiting: Waiting, beside: Callable[..., Running], release: Release
) -> None:
    one = waiting.one
    trying = begun(one, beside(one))
    release.becomes(*MANY)
    mark = one.daemon.signal(signal.SIGHUP)
    one.until("reload_wanted", True)
    assert pid_in(ask(one.address)) == waiting.old

    waiting.gate.open()

    assert trying.wait() == 0
    one.daemon.log.wait_for("event=reloaded generation=3", after=mark)
    assert pid_in(ask(one.address)) == spawned(one.daemon, 3)[0]
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_stop_ends_it(waiting: Waiting, beside: Callable[..., Running]) -> None:
    one = waiting.one
    trying = begun(one, beside(one))
    tried = spawned(one.daemon, 2)

    one.daemon.stop()

    assert trying.wait() == 3
    said = trying.err.text().splitlines()[-1]
    assert said.endswith(
        "not ready to reload: generation 2 failed: called off: the protector is stopping"
    )
    one.daemon.log.wait_for("event=dry-run-failed generation=2 reason=.called off")
    assert wait_gone(tried) == []


def not_accepted(port: int) -> int:
    """How many connections wait to be accepted at a port, by all of its sockets (proc(5))."""
    lines = [each.split() for each in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]]
    listen = f"{port:04X}", "0A"
    return sum(int(each[4][-8:], 16) for each in lines if (each[1][-4:], each[3]) == listen)


@EITHER_HANDOFF
@pytest.mark.parametrize("good", [True, False], ids=["good", "bad"])
@pytest.mark.costly
def test_another_protector_goes_on_with_it_after_a_kill(
    operated: Operating,
    release: Release,
    gate: Gate,
    beside: Callable[..., Running],
    handoff: str,
    good: bool,
) -> None:
    one = operated("--guard", "--ready", "accept", command=(str(release.path),))
    old = pid_in(ask(one.address))
    release.becomes(*gate.before(*(MANY if good else ("/bin/sh", "-c", "exit 3"))))
    trying = begun(one, beside(one))
    asked = handoff == "listener"
    eventually(lambda: not_accepted(one.address[1]) == asked, "a question waits at its socket")

    revived(one.daemon, kill_protector(one.daemon))
    assert pid_in(ask(one.address)) == old
    assert one.status()["dry_run"]["result"] == "running"
    gate.open()

    assert trying.wait() == (0 if good else 3), trying.err.text()
    one.daemon.log.wait_for("event=drained generation=2")
    assert not_accepted(one.address[1]) == 0, "for a client, another generation would be started"
    assert pid_in(ask(one.address)) == old
    assert one.status()["route"] == 1
    assert one.status()["reloads"] == []
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_an_upgrade_calls_it_off(waiting: Waiting, beside: Callable[..., Running]) -> None:
    """To an older version, which knows of no dry run, it would be a reload."""
    one = waiting.one
    trying = begun(one, beside(one))
    tried = spawned(one.daemon, 2)

    assert "event=resumed" in upgrade(one.daemon)

    assert trying.wait() == 3
    said = trying.err.text().splitlines()[-1]
    assert "generation 2 failed: called off: the protector is being upgraded" in said
    assert wait_gone(tried) == []
    one.daemon.log.wait_for("event=drained generation=2")
    assert not_accepted(one.address[1]) == 0
    assert pid_in(ask(one.address)) == waiting.old
    status = one.status()
    assert (status["route"], status["reloads"]) == (1, [])
    assert status["dry_run"]["result"] == "failed"
    one.daemon.stop()


def test_it_goes_on_when_it_is_not_waited_for(waiting: Waiting) -> None:
    one = waiting.one
    said = dry_run(one, "--no-wait")
    assert said.status == 0
    assert "generation 2 will be tried" in said.out
    [tried] = spawned(one.daemon, 2)

    waiting.gate.open()

    one.daemon.log.wait_for("event=dry-run-passed generation=2")
    one.daemon.log.wait_for("event=drained generation=2")
    assert wait_gone([tried]) == []
    one.daemon.stop()
