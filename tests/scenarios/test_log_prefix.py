"""--log-prefix: whose line it is, whatever becomes of the protector, the relay or the reader."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.procfs import GONE, descriptors, environment_of, running
from tests.running import MARK, Client, Protector, eventually, marked, wait_gone
from tests.scenarios.adopting import at_rest, kill_protector, revived, upgrade
from tests.scenarios.output import Syslog
from tests.scenarios.starting import Start, start_of
from tests.scenarios.tools import Release, hold, kinds_at_rest, spawned, worker
from tests.scenarios.users import A, B, Command

Starter = Callable[..., Protector]
#: Prints what it is told to, one line for each line.
TALKS = worker("talks")


def relay_of(environment: str) -> int:
    return next(iter(running("log_relay.py", marked(environment))), 0)


@pytest.fixture
def talking(protector: Starter) -> Starter:
    def start(*options: str | Path) -> Protector:
        return protector("--log-prefix", *options, "127.0.0.1:0", "--", *TALKS).ready()

    return start


def client_of(daemon: Protector, line: str) -> Client:
    return Client(("127.0.0.1", daemon.port), line)


def test_each_line_says_whose_it_is(talking: Starter) -> None:
    daemon = talking()
    with client_of(daemon, "one") as client:
        assert client.hear() == "one"
        (pid,) = spawned(daemon, 1)
        daemon.log.wait_for(rf"^\[1 {pid}\] one$")
        daemon.reload()
        (new,) = spawned(daemon, 2)
        with client_of(daemon, "two"):
            daemon.log.wait_for(rf"^\[2 {new}\] two$")
        # The old one is still serving a client.
        client.say("three")
        daemon.log.wait_for(rf"^\[1 {pid}\] three$")
    daemon.stop()

    assert all(re.match(r"\[\d \d+\] |\d{4}-", line) for line in daemon.log.seen)


def test_a_line_without_an_end_and_a_very_long_one_are_logged(
    protector: Starter, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    words = " ".join(worker("minimal"))
    release.write(f"#!/bin/sh\nhead -c 20000 /dev/zero | tr '\\0' x\necho\nexec {words}\n")
    daemon = protector("--log-prefix", "127.0.0.1:0", "--", release.path).ready()
    (pid,) = spawned(daemon, 1)
    eventually(lambda: sum(line.count("x") for line in daemon.log.seen) >= 20000, "all of it")
    release.write("#!/bin/sh\nprintf 'no end'\nexit 1\n")
    daemon.signal(signal.SIGHUP)
    daemon.log.wait_for(r"^\[2 \d+\] no end$")
    daemon.stop()

    long = [line for line in daemon.log.seen if "xxx" in line]
    assert all(line.startswith(f"[1 {pid}] x") for line in long)


def test_last_words_are_those_of_the_one_that_failed(protector: Starter, tmp_path: Path) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*worker("talks"))
    daemon = protector("--log-prefix", "--workers", "2", "127.0.0.1:0", "--", release.path).ready()
    release.write("#!/bin/sh\necho the reason >&2\nexit 1\n")
    mark = daemon.signal(signal.SIGHUP)
    failed = daemon.log.wait_for("event=reload-failed", after=mark)

    # Of the one that failed first, whatever the others have said meanwhile.
    assert 'last_words="the reason"' in failed
    daemon.stop()


@pytest.mark.costly
def test_an_upgrade_and_its_own_death_under_a_guard_harm_no_workers_output(
    talking: Starter,
) -> None:
    daemon = talking("--guard")
    with client_of(daemon, "one") as client:
        client.hear()
        (pid,) = spawned(daemon, 1)
        daemon.log.wait_for(rf"^\[1 {pid}\] one$")
        for number, act in enumerate(["upgrade", "kill", "upgrade", "kill"]):
            if act == "kill":
                revived(daemon, kill_protector(daemon))
            else:
                assert "event=resumed" in upgrade(daemon)
            client.say(f"after {act} {number}")
            daemon.log.wait_for(rf"^\[1 {pid}\] after {act} {number}$")
        daemon.reload()
        with client_of(daemon, "new"):
            daemon.log.wait_for(rf"^\[2 {spawned(daemon, 2)[0]}\] new$")
    daemon.stop()


@pytest.mark.costly
def test_without_a_guard_the_relay_lives_as_long_as_its_last_writer(
    talking: Starter, marked_environment: dict[str, str]
) -> None:
    daemon = talking()
    with client_of(daemon, "one") as client:
        client.hear()
        (pid,) = spawned(daemon, 1)
        relay = relay_of(marked_environment[MARK])
        daemon.process.kill()
        daemon.process.wait()

        client.say("two")
        daemon.log.wait_for(rf"^\[1 {pid}\] two$")
        assert relay_of(marked_environment[MARK]) == relay
    assert wait_gone([relay, pid]) == []


@pytest.mark.costly
def test_a_relay_that_is_killed_costs_no_worker_its_life_and_no_line(
    talking: Starter, marked_environment: dict[str, str]
) -> None:
    daemon = talking("--workers", "3")
    pids = spawned(daemon)
    clients = [client_of(daemon, "hello") for _ in range(6)]
    for each in clients:
        each.hear()
    for round_ in range(2):
        relay = relay_of(marked_environment[MARK])
        mark = len(daemon.log.seen)
        os.kill(relay, signal.SIGKILL)
        assert wait_gone([relay]) == []
        for number, each in enumerate(clients):
            assert each.ask(f"round {round_} client {number}") == f"round {round_} client {number}"
        daemon.log.wait_for("event=relay-ended", after=mark)
        for number in range(6):
            daemon.log.wait_for(rf"^\[1 \d+\] round {round_} client {number}$", after=mark)
    for each in clients:
        each.close()

    assert daemon.log.count("event=exited") == 0
    assert sorted(daemon.worker_pids()) == sorted(pids)
    daemon.reload()
    daemon.stop()


@pytest.mark.costly
def test_the_log_file_is_followed_after_a_rotation(start: Start) -> None:
    start.up("--log-prefix", "unix:s", "--", *TALKS)
    with Client(f"{start.folder}/s", "one") as client:
        start.wait_for(r"(?m)^\[1 \d+\] one$")
        rotated = start.folder / "log.1.sh"
        start.log_file.rename(rotated)
        start.send(signal.SIGUSR1)
        start.wait_for("event=reopened")
        # Running workers, too: it is the relay that writes.
        client.say("two")
        start.wait_for(r"(?m)^\[1 \d+\] two$")
    start.stop()

    assert "two" not in rotated.read_text()
    assert [left for left in start.left() if "process" in left] == []


def test_to_syslog_the_priority_stays_in_front(start: Start, syslog: Syslog) -> None:
    ended = start("--log-prefix", "unix:s", "--", *TALKS, before=syslog.before)
    if ended.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    with Client(f"{start.folder}/s", "<4>a warning") as client:
        assert syslog.wait_for(r"\[1 \d+\] a warning$").startswith("<28>")
        relay = relay_of(start.environment[MARK])
        os.kill(relay, signal.SIGKILL)
        client.say("in between")
        syslog.wait_for(r"\[1 \d+\] in between$")
    assert "[1 " not in syslog.wait_for("event=ready")
    start.stop()
    syslog.wait_for("event=stopped")


@pytest.mark.parametrize("make", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
@pytest.mark.costly
def test_a_reader_that_stands_still_holds_up_neither_protector_nor_silent_workers(
    start: Start, make: Callable[[], tuple[int, int]]
) -> None:
    receive, send = make()
    arguments = ("-f", "--log-prefix", "unix:s", "--", *TALKS)
    with start_of(start, *arguments, stdout=send, stderr=send) as process:
        os.close(send)
        eventually(lambda: 1 in generations(start.environment[MARK]), "a worker")
        loud = Client(f"{start.folder}/s")
        loud.socket.setblocking(False)
        try:
            while True:  # until relay, pipe and worker are stuck
                loud.socket.send(b"x" * 1000 + b"\n")
        except BlockingIOError:
            pass
        # What has nothing to do with that goes on: a new generation, and workers that say nothing.
        process.send_signal(signal.SIGHUP)
        eventually(lambda: 2 in generations(start.environment[MARK]), "generation 2")
        with Client(f"{start.folder}/s") as silent:
            silent.socket.shutdown(socket.SHUT_WR)
            assert silent.hear() == ""
        os.close(receive)
        loud.close()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
    assert start.left() == []


def generations(mark: str) -> set[int]:
    """Of the processes that live."""
    found = set()
    for pid in marked(mark):
        try:
            environment = environment_of(pid)
        except GONE:
            continue
        if "SOCKETPROTECTOR_GENERATION" in environment:
            found.add(int(environment["SOCKETPROTECTOR_GENERATION"]))
    return found


@pytest.mark.costly
def test_nothing_is_left_of_workers_that_are_gone(
    talking: Starter, marked_environment: dict[str, str]
) -> None:
    daemon = talking("--guard")
    relay = relay_of(marked_environment[MARK])

    def open_pipes(pid: int) -> int:
        return sum(target.startswith("pipe:") for target in descriptors(pid).values())

    with client_of(daemon, "one"):
        daemon.log.wait_for(r"^\[1 \d+\] one$")  # else the relay may not have the pipe yet
    at_rest(daemon)
    before = kinds_at_rest(daemon), open_pipes(relay)
    for _ in range(5):
        daemon.reload()
    eventually(lambda: open_pipes(relay) == before[1], "the pipes of those that are gone closed")
    eventually(lambda: kinds_at_rest(daemon) == before[0], "the guard's descriptors")
    daemon.stop()


def test_a_child_that_a_worker_leaves_behind_still_writes(
    protector: Starter, tmp_path: Path, marked_environment: dict[str, str]
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    release = Release(tmp_path / "daemon")
    words = " ".join(TALKS)
    release.write(f"#!/bin/sh\n(cat {gate}; echo late) &\nexec {words}\n")
    daemon = protector("--log-prefix", "127.0.0.1:0", "--", release.path).ready()
    (pid,) = spawned(daemon, 1)
    release.becomes(*TALKS)
    daemon.reload()
    daemon.log.wait_for("event=exited generation=1")
    relay = relay_of(marked_environment[MARK])
    os.kill(relay, signal.SIGKILL)

    os.close(os.open(gate, os.O_WRONLY))
    daemon.log.wait_for(rf"^\[1 {pid}\] late$")
    daemon.log.wait_for("event=drained generation=1")
    daemon.stop()


def test_a_relay_that_stands_still_delays_no_start(
    talking: Starter, marked_environment: dict[str, str]
) -> None:
    daemon = talking()
    relay = relay_of(marked_environment[MARK])
    hold(relay)
    daemon.reload()
    with client_of(daemon, "two") as client:
        assert client.hear() == "two"
        os.kill(relay, signal.SIGCONT)
        daemon.log.wait_for(r"^\[2 \d+\] two$")
    daemon.stop()


@needs.ANOTHER_USER
@pytest.mark.costly
def test_workers_of_another_user_write_through_it_too(command: Command) -> None:
    start = command.start
    users = ("--user", A, "--worker-user", B)
    command.up("--log-prefix", "--guard", *users, "unix:s", "--", *command.worker("talks"))
    with Client(command.address, "one") as client:
        start.wait_for(r"(?m)^\[1 \d+\] one$")
        os.kill(command.protector, signal.SIGKILL)
        start.wait_for("event=resumed")
        start.log_file.rename(start.folder / "log.1.sh")
        start.send(signal.SIGUSR1)
        start.wait_for("event=reopened")
        client.say("two")
        start.wait_for(r"(?m)^\[1 \d+\] two$")
    start.stop()
    assert [left for left in start.left() if "process" in left] == []
