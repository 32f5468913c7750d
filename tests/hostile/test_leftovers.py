"""A release against the one that replaces it: processes that it leaves, and that hide.

Such a process has its own session and no environment, and it accepts clients at the socket that it
has inherited.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import needs
from tests.namespaces import any_users_python
from tests.own_folder import let_through
from tests.procfs import children_of, command_line_of, state_of, status_of
from tests.running import Protector, eventually, wait_gone
from tests.scenarios.adopting import (
    Installation,
    at_rest,
    kill_protector,
    protector_pid,
    revived,
    upgrade,
)
from tests.scenarios.managers import Service
from tests.scenarios.tools import Release, worker
from tests.scenarios.users import A, B

Starter = Callable[..., Protector]
MODE = ("--handoff", "listener", "--ready", "notify", "--start-tries", "1")
CLIENTS = 200
GUARD = pytest.mark.parametrize("guard", [(), ("--guard",)], ids=["alone", "guard"])


@pytest.fixture
def release(tmp_path: Path) -> Release:
    made = Release(tmp_path / "daemon")
    made.becomes(*worker("master", "v1"))
    return made


class Left:
    """The processes that releases say they have left; they are killed at the end."""

    def __init__(self) -> None:
        self.daemons: list[Protector] = []

    def of(self, daemon: Protector, count: int = 1) -> int:
        """Return the process that was left last; wait for it."""
        if daemon not in self.daemons:
            self.daemons.append(daemon)
        eventually(lambda: len(self._said(daemon)) >= count, "what is left")
        return self._said(daemon)[-1]

    def _said(self, daemon: Protector) -> list[int]:
        lines = [re.match(r"left=(\d+)", line) for line in list(daemon.log.seen)]
        return [int(found[1]) for found in lines if found]

    def kill(self) -> None:
        for daemon in self.daemons:
            for pid in self._said(daemon):
                if "listener.accept" in command_line_of(pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def left(marked_environment: dict[str, str]) -> Iterator[Left]:
    made = Left()  # what it kills may keep a log relay that has the mark
    yield made
    made.kill()


def address_of(daemon: Protector) -> str | tuple[str, int]:
    line = daemon.log.wait_for(r"event=(start|resumed)\b.* listen=")
    kind, _, address = line.rpartition(" listen=")[2].partition(":")
    if kind == "unix":
        return address.replace("@", "\0", 1)
    return "127.0.0.1", int(address.rpartition(":")[2])


def taken(daemon: Protector, clients: int = CLIENTS) -> int:
    """How many of the clients get no answer of a release that serves."""
    address = address_of(daemon)
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    found = 0
    for _ in range(clients):
        with socket.socket(family) as client:
            client.settimeout(30)
            client.connect(address)
            with suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(b"hello\n")
            try:
                found += not re.match(rb"\[\d+\] v\d", client.recv(100))
            except ConnectionResetError:
                found += 1
    return found


def fail(daemon: Protector, release: Release, *options: str) -> None:
    """Reload with a release that fails its start and leaves a process."""
    release.becomes(*worker("leaves", *options))
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=reload-failed", after=mark)


def replace(daemon: Protector, release: Release, version: str) -> None:
    release.becomes(*worker("master", version))
    daemon.reload()


def zombies(daemon: Protector) -> list[int]:
    return [
        pid
        for parent in {daemon.pid, protector_pid(daemon)}
        for pid in children_of(parent)
        if state_of(pid) == "Z"
    ]


# -- a release that fails its start ----------------------------------------------------------


@GUARD
@pytest.mark.parametrize("address", ["127.0.0.1:0", "unix:@{}"], ids=["tcp", "one unix socket"])
def test_a_release_that_has_failed_takes_no_client_of_a_later_one(
    protector: Starter,
    release: Release,
    left: Left,
    tmp_path: Path,
    address: str,
    guard: tuple[str, ...],
) -> None:
    words = (*guard, *MODE, address.format(f"{tmp_path.name}-{os.getpid()}"))
    daemon = protector(*words, "--", release.path).ready()
    fail(daemon, release)

    assert wait_gone([left.of(daemon)]) == []
    assert taken(daemon) == 0
    for version in ("v2", "v3"):  # over TCP every second generation has the same socket
        replace(daemon, release, version)
        assert taken(daemon) == 0
    daemon.log.wait_for(rf"event=left-behind pid={left.of(daemon)} signal=SIGTERM")
    eventually(lambda: zombies(daemon) == [], "no zombie")
    daemon.stop()


def test_a_process_that_ignores_TERM_is_killed(
    protector: Starter, release: Release, left: Left
) -> None:
    words = ("--kill-timeout", "100ms", *MODE, "127.0.0.1:0")
    daemon = protector(*words, "--", release.path).ready()
    fail(daemon, release, "--stubborn")

    assert wait_gone([left.of(daemon)]) == []
    daemon.log.wait_for(rf"event=left-behind pid={left.of(daemon)} signal=SIGKILL")
    daemon.stop()


def test_a_queue_of_connections_is_given_to_no_process_of_a_failed_release(
    protector: Starter, release: Release, left: Left
) -> None:
    release.becomes(*worker("many"))
    words = ("--ready", "notify", "--start-tries", "1", "127.0.0.1:0")
    daemon = protector(*words, "--", release.path).ready()
    fail(daemon, release, "--quiet")

    assert wait_gone([left.of(daemon)]) == []
    daemon.stop()


@GUARD
def test_a_process_that_holds_no_socket_of_ours_lives_and_is_reported(
    protector: Starter, release: Release, left: Left, guard: tuple[str, ...]
) -> None:
    daemon = protector(*guard, *MODE, "127.0.0.1:0", "--", release.path).ready()
    fail(daemon, release, "--holds", "nothing")
    pid = left.of(daemon)

    daemon.log.wait_for(rf"event=left-behind pid={pid} hint=.*holds no socket")
    replace(daemon, release, "v2")
    at_rest(daemon)
    assert state_of(pid) == "S"
    assert daemon.log.count(rf"event=left-behind pid={pid} ") == 1
    daemon.stop()
    assert state_of(pid) == "S"


def started(
    release: Release, environment: dict[str, str], folder: Path, *options: str
) -> Protector:
    """Start a protector whose workers another user can run."""
    _, path = any_users_python()
    let_through(folder)
    words = (*options, *MODE, "127.0.0.1:0", "--", str(release.path))
    return Protector(words, {**environment, "PYTHONPATH": path}).ready()


@needs.ANOTHER_USER
@GUARD
def test_a_process_of_another_user_takes_no_client_of_a_later_release(
    release: Release,
    left: Left,
    marked_environment: dict[str, str],
    tmp_path: Path,
    guard: tuple[str, ...],
) -> None:
    users = ("--user", A, "--worker-user", B)
    daemon = started(release, marked_environment, tmp_path, *guard, *users)
    try:
        fail(daemon, release)

        assert wait_gone([left.of(daemon)]) == []
        replace(daemon, release, "v2")
        assert taken(daemon) == 0
        daemon.stop()
    finally:
        daemon.end()


@needs.ANOTHER_USER
def test_a_process_whose_descriptors_cannot_be_read_is_reported(
    release: Release, left: Left, marked_environment: dict[str, str], tmp_path: Path
) -> None:
    daemon = started(release, marked_environment, tmp_path, "--user", A)
    try:
        fail(daemon, release, "--hidden")
        pid = left.of(daemon)

        daemon.log.wait_for(rf"event=left-behind pid={pid} hint=.*cannot be read")
        assert state_of(pid) == "S"
        daemon.stop()
    finally:
        daemon.end()


# -- a release that was replaced ---------------------------------------------------------------


@GUARD
def test_what_a_release_has_detached_ends_with_its_last_generation(
    protector: Starter, release: Release, left: Left, guard: tuple[str, ...]
) -> None:
    """Until then it may serve: another release's failure does not end it."""
    release.becomes(*worker("leaves", "--ready"))
    daemon = protector(*guard, *MODE, "127.0.0.1:0", "--", release.path).ready()
    pid = left.of(daemon)
    fail(daemon, release)
    assert wait_gone([left.of(daemon, 2)]) == []
    assert state_of(pid) == "S"

    for version in ("v2", "v3"):
        replace(daemon, release, version)
        assert wait_gone([pid]) == []
        assert taken(daemon) == 0
    eventually(lambda: zombies(daemon) == [], "no zombie")
    daemon.stop()


def test_what_a_release_has_detached_lives_on_with_the_closed_queue_of_its_generation(
    protector: Starter, release: Release, left: Left
) -> None:
    detaches = 'setsid sleep 1000 & echo left=$! >&2; exec "$@"'
    release.becomes("/bin/sh", "-c", detaches, "sh", *worker("many"))
    daemon = protector("--no-log-relay", "127.0.0.1:0", "--", release.path).ready()
    pid = left.of(daemon)
    try:
        release.becomes(*worker("many"))
        daemon.reload()
        daemon.log.wait_for("event=drained generation=1")
        daemon.reload()
        daemon.log.wait_for("event=drained generation=2")
        at_rest(daemon)

        assert state_of(pid) == "S"
    finally:
        os.kill(pid, signal.SIGKILL)
    daemon.stop()
    assert daemon.log.count("event=left-behind") == 0


# -- after a kill of the protector ---------------------------------------------------------------


def test_after_a_kill_the_next_protector_finds_what_was_left_before(
    protector: Starter, release: Release, left: Left
) -> None:
    release.becomes(*worker("leaves", "--ready"))
    daemon = protector("--guard", *MODE, "127.0.0.1:0", "--", release.path).ready()
    pid = left.of(daemon)
    revived(daemon, kill_protector(daemon))
    at_rest(daemon)
    fail(daemon, release)
    assert wait_gone([left.of(daemon, 2)]) == []
    assert state_of(pid) == "S"

    for version in ("v2", "v3"):
        replace(daemon, release, version)
        assert wait_gone([pid]) == []
        assert taken(daemon) == 0
    eventually(lambda: zombies(daemon) == [], "no zombie")
    daemon.stop()


def test_after_a_restart_by_the_service_manager_what_was_left_before_is_found(
    tmp_path: Path, marked_environment: dict[str, str], release: Release, left: Left
) -> None:
    """The manager, or the first process, has got the processes by then."""
    service = Service(tmp_path, marked_environment)
    try:
        release.becomes(*worker("leaves", "--ready"))
        words = (*MODE, "127.0.0.1:0", "--", release.path)
        service.start(*words).ready()
        service.wait_for("READY")
        pid = left.of(service.main)
        service.kill()
        daemon = service.start(*words)
        daemon.log.wait_for("event=resumed")
        at_rest(daemon)
        assert state_of(pid) == "S"
        if int(status_of(pid)["PPid"]) not in (1, os.getpid()):
            needs.skip("tests that run below no sub-reaper")
        fail(daemon, release)
        assert wait_gone([left.of(daemon)]) == []
        assert state_of(pid) == "S"

        for version in ("v2", "v3"):
            replace(daemon, release, version)
            assert wait_gone([pid]) == []
            assert taken(daemon) == 0
        service.stop()
    finally:
        service.close()


def test_after_an_upgrade_from_a_program_that_was_no_subreaper_leftovers_are_found(
    tmp_path: Path, marked_environment: dict[str, str], release: Release, left: Left
) -> None:
    installation = Installation(tmp_path, marked_environment)
    try:
        installation.change("one", "launch/start", r"    privileges\.become_subreaper\(\).*\n", "")
        installation.add("two")
        daemon = installation.start(*MODE, "127.0.0.1:0", "--", release.path).ready()
        installation.switch("two")
        assert "event=resumed" in upgrade(daemon)
        at_rest(daemon)
        fail(daemon, release)

        assert wait_gone([left.of(daemon)]) == []
        for version in ("v2", "v3"):
            replace(daemon, release, version)
            assert taken(daemon) == 0
        daemon.stop()
    finally:
        installation.end()
