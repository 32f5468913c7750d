"""Daemons that were built for the original, under the real protector."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from socketprotector.demo.seen import Snapshot
from tests import needs
from tests.legacy.conftest import padded
from tests.load import Load
from tests.procfs import parent_of
from tests.running import FAIR_START_S, ROOT, Client, Protector, ask, eventually, wait_gone
from tests.scenarios.managers import Giver
from tests.scenarios.tools import Gate, Release, pid_in, spawned

Start = Callable[..., Protector]
#: Sent to the daemon and not read by it.
MOST_UNREAD = 2


@pytest.fixture
def giver(marked_environment: dict[str, str]) -> Iterator[Giver]:
    made = Giver(marked_environment)
    yield made
    made.close()


class Service:
    """A protector with the original's daemon; its port is known beforehand, as the daemon's is."""

    def __init__(self, giver: Giver, program: Path) -> None:
        self.giver = giver
        self.program = str(program)
        self.port = giver.tcp("web")
        self.address = ("127.0.0.1", self.port)

    def start(
        self,
        *options: str,
        command: tuple[str, ...] = (),
        adapter: tuple[str, ...] = (),
    ) -> Protector:
        """adapter: in the place of the one that --handoff legacy starts."""
        command = command or (self.program, str(self.port))
        mode = () if adapter else ("--handoff", "legacy")
        return self.giver.start(*mode, *options, "fd:web", "--", *adapter, *command).ready()


@pytest.fixture
def service(giver: Giver, original: Path) -> Service:
    return Service(giver, original)


@pytest.mark.costly
def test_it_is_asked_while_it_serves(service: Service) -> None:
    """By a connection, and by HTTP, which that daemon does not speak."""
    daemon = service.start("--health", "accept", "--health-every", "100ms")
    daemon.log.wait_for("event=healthy generation=1")
    daemon.stop()
    daemon = service.start("--health", "http:/", "--health-every", "100ms")
    daemon.log.wait_for("event=unhealthy generation=1 reason=.*no HTTP")
    daemon.stop()


def test_a_reload_under_load_fails_nothing(service: Service) -> None:
    daemon = service.start("--workers", "2")

    with Load(f"127.0.0.1:{service.port}", concurrency=8, until_eof=True) as load:
        for _ in range(3):
            before = set(connected(daemon))
            daemon.reload()
            load.wait_for(partial(answered_by_others, before))

    assert load.snapshot().failures == ()
    daemon.stop()
    ended = [line for line in daemon.log.seen if "event=exited" in line]
    assert len(ended) == len(spawned(daemon)) == 8
    assert not [line for line in ended if "exited with status 0" not in line]
    assert daemon.log.count(r" (warning|error) |socketprotector\.legacy:") == 0


def connected(daemon: Protector) -> list[int]:
    """The daemons that have connected, in order; what they print may come a little later."""
    ready = daemon.log.count("event=worker-ready")
    eventually(lambda: daemon.out.count(r"^connected \d") >= ready, "they have said so")
    return [
        int(found[1])
        for line in list(daemon.out.seen)
        if (found := re.match(r"connected (\d+)", line))
    ]


def answered_by_others(pids: set[int], now: Snapshot) -> bool:
    return bool(set(now.pids) - pids)


def test_at_a_reload_the_old_answers_what_it_was_sent_and_the_new_the_rest(
    service: Service,
) -> None:
    daemon = service.start()
    with Client(service.address) as first:
        old = pid_in(first.ask())
        waiting = [Client(service.address, "hello") for _ in range(10)]
        eventually(lambda: in_backlog_of(service.giver) == 0, "all are accepted")
        daemon.reload()
        assert pid_in(first.ask()) == old

    answers = []
    for each in waiting:
        answers.append(pid_in(each.hear()))
        each.close()
    kept = answers.count(old)
    assert kept <= MOST_UNREAD
    assert answers == [old] * kept + [connected(daemon)[-1]] * (10 - kept)
    daemon.log.wait_for("event=drained generation=1")


def in_backlog_of(giver: Giver) -> int:
    """How many connections are not accepted yet (tcpi_unacked of a listener, tcp(7))."""
    info = giver.given[0][1].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
    return int.from_bytes(info[24:28], "little")


def test_a_daemon_that_is_killed_loses_what_it_was_sent_and_no_more(service: Service) -> None:
    daemon = service.start()
    with Client(service.address) as first:
        old = pid_in(first.ask())
        waiting = [Client(service.address, "hello") for _ in range(10)]
        eventually(lambda: in_backlog_of(service.giver) == 0, "all are accepted")

        mark = len(daemon.log.seen)
        os.kill(old, signal.SIGKILL)

        answers = []
        for each in waiting:
            try:
                answers.append(each.hear())
            except ConnectionResetError:
                answers.append("")
            each.close()

    assert answers.count("") <= MOST_UNREAD
    # It serves as soon as it has connected, which may be reported later.
    daemon.log.wait_for("event=worker-ready generation=1 worker=2", after=mark)
    new = connected(daemon)[-1]
    assert [each for each in answers if each] == [f"[{new}] hello"] * (10 - answers.count(""))
    daemon.log.wait_for("event=exited generation=1 worker=1 how=.*killed by SIGKILL")


def test_a_daemon_that_ends_before_it_connects_fails_the_reload_alone(
    service: Service, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(service.program, str(service.port))
    daemon = service.start(command=(str(release.path),))
    old = pid_in(ask(service.address))

    release.becomes(service.program, str(service.port), "exit=7")
    mark = daemon.signal(signal.SIGHUP)

    line = daemon.log.wait_for("event=reload-failed", after=mark)
    assert f"{release.path} exited with status 7 before it was ready" in line
    daemon.log.wait_for(
        f"{release.path} ended before it connected to sock_srv_{service.port}", after=mark
    )
    assert pid_in(ask(service.address)) == old


@pytest.mark.costly
def test_a_daemon_that_never_connects_fails_the_reload_and_is_ended(
    service: Service, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(service.program, str(service.port))
    daemon = service.start("--start-timeout", f"{FAIR_START_S}s", command=(str(release.path),))
    old = pid_in(ask(service.address))

    release.becomes(service.program, str(service.port), "never")
    mark = daemon.signal(signal.SIGHUP)

    daemon.log.wait_for(
        rf"event=reload-failed .*not ready within {FAIR_START_S}s \(--start-timeout\); "
        ".* sock_srv_PORT",
        after=mark,
    )
    daemon.log.wait_for("event=exited generation=2", after=mark)
    # On a machine that is busy enough it may not have got so far.
    never = [int(line.split()[1]) for line in daemon.out.seen if line.startswith("started")][1:]
    assert wait_gone(never) == []
    assert pid_in(ask(service.address)) == old
    release.becomes(service.program, str(service.port))
    daemon.reload()
    assert pid_in(ask(service.address)) not in (old, *never)


def test_one_that_hears_nothing_is_killed_with_its_worker(service: Service) -> None:
    deaf = (service.program, str(service.port), "deaf", "stuck")
    daemon = service.start("--stop-timeout", "10ms", "--kill-timeout", "100ms", command=deaf)
    child = connected(daemon)[-1]
    assert parent_of(child) == spawned(daemon)[-1]

    daemon.stop()

    assert wait_gone([child]) == []


@pytest.mark.costly
def test_a_worker_that_dies_is_replaced_while_another_generation_starts(
    service: Service, tmp_path: Path
) -> None:
    """Two that start at once: the second one is started when the first has the stream."""
    release = Release(tmp_path / "daemon")
    release.becomes(service.program, str(service.port))
    daemon = service.start(command=(str(release.path),))
    old = connected(daemon)[-1]
    gate = Gate(tmp_path / "gate")
    release.write(f'#!/bin/sh\nread go < {gate.path}\nexec "{service.program}" {service.port}\n')
    daemon.signal(signal.SIGHUP)
    held = os.open(gate.path, os.O_WRONLY)  # waits for its child: so it has the name

    mark = len(daemon.log.seen)
    os.kill(old, signal.SIGTERM)
    daemon.log.wait_for("event=spawned generation=1 ", after=mark)
    os.close(held)

    def reloaded() -> bool:
        gate.let_through()  # the replacement's child may come, too, or be called off before
        return daemon.log.count("event=reloaded generation=2") > 0

    eventually(reloaded, "the new generation serves")
    assert parent_of(pid_in(ask(service.address))) == spawned(daemon, 2)[0]


@pytest.fixture
def for_any_user(original: Path) -> Iterator[Path]:
    """The daemon where another user can execute it."""
    with tempfile.TemporaryDirectory(prefix="sp-") as folder:
        os.chmod(folder, 0o755)
        yield Path(shutil.copy(original, folder))


@needs.ANOTHER_USER
def test_it_works_as_another_user(giver: Giver, for_any_user: Path) -> None:
    service = Service(giver, for_any_user)
    path = [str(ROOT), str(ROOT / "client_lib")]
    code = f"import sys; sys.path[:0] = {path}; "
    code += "from socketprotector.programs.legacy.adapter import main; main()"
    adapter = (sys.executable, "-I", "-c", code, "--")
    daemon = service.start("--user", "nobody", adapter=adapter)

    child = pid_in(ask(service.address))

    assert os.stat(f"/proc/{child}").st_uid == pwd.getpwnam("nobody").pw_uid
    daemon.reload()
    assert pid_in(ask(service.address)) != child


def test_a_stranger_cannot_take_connections_from_the_one_that_serves(service: Service) -> None:
    service.start()
    with socket.socket(socket.AF_UNIX) as other, pytest.raises(ConnectionRefusedError):
        other.connect(padded(service.port))
