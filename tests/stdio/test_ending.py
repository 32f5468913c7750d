"""Reload, stop, retire, TERM: programs finish, and new clients are served."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.channel import Channel, Worker
from tests.load import Load
from tests.procfs import parent_of, watched_by
from tests.rounds import rounds
from tests.running import Client, Protector, eventually, wait_gone
from tests.scenarios.tools import Release
from tests.stdio.pools import ANSWERS, PROGRAMS, TALKS, pool, refusing

Start = Callable[..., Protector]
#: Does not end when it is asked to; ends with its client.
STUBBORN = "trap '' TERM; echo $$; while read line; do echo $line; done"


@pytest.fixture
def program(tmp_path: Path) -> Release:
    """What a deploy replaces."""
    made = Release(tmp_path / "program")
    made.write("#!/bin/sh\necho old; exec cat\n")
    return made


@pytest.mark.costly
def test_a_reload_lets_running_programs_finish(protector: Start, program: Release) -> None:
    daemon = protector("127.0.0.1:0", "--", *pool(2, program.path)).ready()
    with Client(("127.0.0.1", daemon.port)) as before:
        assert before.hear() == "old"
        program.write("#!/bin/sh\necho new; exec cat\n")

        daemon.reload()

        with Client(("127.0.0.1", daemon.port)) as after:
            assert after.hear() == "new"
        assert before.ask("still there") == "still there"
    daemon.log.wait_for("event=drained generation=1")
    daemon.stop()


def test_reloads_under_load_fail_no_client(protector: Start) -> None:
    command = pool(6, ANSWERS, of=2, shell=True)
    daemon = protector("--workers", "2", "127.0.0.1:0", "--", *command).ready()
    load = Load(f"127.0.0.1:{daemon.port}", concurrency=8).start()

    for _ in range(rounds(2, 5)):
        wanted = load.snapshot().connections + 20
        load.wait_for(lambda now: now.connections >= wanted)  # noqa: B023 (waited for here)
        daemon.reload()

    seen = load.stop()
    assert seen.failures == ()
    assert seen.connections == seen.begun
    daemon.stop()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", "No such file or directory"),
        ("not executable", "not executable"),
        ("of no known format", "neither a program nor a script"),
        ("without its interpreter", "the interpreter in its first line is missing"),
    ],
)
def test_a_reload_to_a_command_that_cannot_be_started_changes_nothing(
    fault: str, reason: str, protector: Start, program: Release
) -> None:
    daemon = protector("127.0.0.1:0", "--", *pool(2, program.path)).ready()
    program.path.unlink()
    if fault == "not executable":
        program.write("#!/bin/sh\n", 0o644)
    elif fault == "of no known format":
        program.write("echo new\n")
    elif fault == "without its interpreter":
        program.write("#!/not/there -x\n")
    with Client(("127.0.0.1", daemon.port)) as waiting:
        daemon.signal(signal.SIGHUP)
        daemon.log.wait_for(f"cannot start .*{program.path}: .*{reason}")
        daemon.log.wait_for("event=reload-failed .*exited with status 111")

        program.path.unlink(missing_ok=True)
        program.write("#!/bin/sh\necho old; exec cat\n")
        assert waiting.hear() == "old"  # by the generation that never stopped serving
    daemon.stop()


def test_stop_lets_programs_finish_and_serves_waiting_clients(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *pool(1, TALKS, shell=True)).ready()
    with Client(("127.0.0.1", daemon.port)) as first, Client(("127.0.0.1", daemon.port)) as second:
        assert first.hear()
        mark = daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("event=stopping", after=mark)

        assert first.ask("still there") == "still there"
        first.close()
        assert second.hear()
        assert second.ask("me too") == "me too"
    assert daemon.wait() == 0


def test_a_stop_that_takes_too_long_ends_programs_by_term(protector: Start) -> None:
    command = pool(2, "sleep 100 & echo $$; wait", shell=True)
    daemon = protector("--stop-timeout", "0.2s", "127.0.0.1:0", "--", *command).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        pid = int(client.hear())

        daemon.signal(signal.SIGTERM)

        # Of the child of the program, too, which holds the connection.
        assert client.hear() == ""
    assert daemon.wait() == 0
    assert wait_gone([pid]) == []
    assert daemon.log.count("signal=KILL") == 0


def test_what_does_not_heed_term_is_killed_with_its_pool(protector: Start) -> None:
    times = ("--stop-timeout", "0.1s", "--kill-timeout", "0.3s")
    daemon = protector(*times, "127.0.0.1:0", "--", *pool(2, STUBBORN, shell=True)).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        pid = int(client.hear())

        daemon.signal(signal.SIGTERM)

        assert client.hear() == ""
    daemon.wait()
    assert wait_gone([pid]) == []
    assert daemon.log.count("signal=KILL") == 1


def test_a_pool_that_retires_takes_no_more_and_finishes(channel: Channel) -> None:
    worker = channel.start(*pool(4, TALKS, shell=True))
    queue = channel.reader.fileno()
    client = channel.connect()
    assert client.hear()
    eventually(lambda: queue in watched_by(worker.pid), "it listening for the next one")

    worker.retire()

    eventually(lambda: queue not in watched_by(worker.pid), "its retiring")
    assert client.ask("still there") == "still there"
    late = channel.connect()
    client.close()
    assert worker.wait() == 0
    assert channel.queued() == 1  # for the others
    channel.start(*pool(1, TALKS, shell=True))
    assert late.hear()


def test_a_retiring_pool_leaves_no_client_waiting_beside_one_that_has_places(
    channel: Channel, tmp_path: Path
) -> None:
    """One of them is woken for a connection; it may be the one that leaves."""
    held = tmp_path / "held"
    late = str(PROGRAMS / "late.py")
    first = channel.start(sys.executable, late, held, *pool(1, TALKS, shell=True)[4:])
    queue = channel.reader.fileno()
    eventually(lambda: queue in watched_by(first.pid), "to listen")
    channel.start(*pool(1, TALKS, shell=True))
    held.touch()
    while True:  # until it is the first one that is woken, not the other
        client = channel.connect()
        came = client.has_answer
        eventually(lambda: held.read_text() == "woken" or came(), "a wake-up")  # noqa: B023
        if held.read_text() == "woken":
            break
        client.close()
    first.retire()

    held.unlink()

    assert client.hear()
    client.close()
    assert first.wait() == 0


def test_a_pool_that_is_killed_is_replaced_and_its_programs_go_on(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *pool(1, TALKS, shell=True)).ready()
    with Client(("127.0.0.1", daemon.port)) as before:
        pid = int(before.hear())
        with Client(("127.0.0.1", daemon.port)) as waiting:  # in the queue
            os.kill(parent_of(pid), signal.SIGKILL)

            assert waiting.hear()
            assert before.ask("still there") == "still there"
    assert wait_gone([pid]) == []
    daemon.stop()


def test_the_programs_of_a_killed_pool_end_at_the_limits_of_others(protector: Start) -> None:
    daemon = protector(
        *("--handoff", "stdio", "--shell", "--workers", "1", "--kill-timeout", "300ms"),
        *("--stop-timeout", "300ms", "127.0.0.1:0", "--", STUBBORN),
    ).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        pid = int(client.hear())
        group = parent_of(pid)
        os.kill(group, signal.SIGKILL)
        daemon.log.wait_for(rf"event=orphans generation=1 worker=1 group={group} ")
        assert client.ask("still there") == "still there"
        assert daemon.log.count("event=signalled") == 0  # they are not told to finish

        daemon.stop()

    assert wait_gone([pid], 0) == []
    signs = [each.rpartition("=")[2] for each in daemon.log.seen if "worker=1 group=" in each]
    assert [each for each in signs if each.isupper()] == ["TERM", "KILL"]


def test_a_program_that_is_killed_frees_its_place(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *pool(1, TALKS, shell=True)).ready()
    with Client(("127.0.0.1", daemon.port)) as first, Client(("127.0.0.1", daemon.port)) as second:
        os.kill(int(first.hear()), signal.SIGKILL)

        assert first.hear() == ""
        assert second.hear()
    daemon.stop()


def test_what_goes_to_the_background_frees_its_place_and_keeps_its_connection(
    protector: Start, tmp_path: Path
) -> None:
    command = "exec 3<&0; sh -c 'echo $$; exec cat' <&3 & exit 0"
    daemon = protector("127.0.0.1:0", "--", *pool(1, command, shell=True)).ready()
    with Client(("127.0.0.1", daemon.port)) as first, Client(("127.0.0.1", daemon.port)) as second:
        pids = [int(first.hear()), int(second.hear())]

        assert first.ask("still there") == "still there"
        assert second.ask("me too") == "me too"
    assert wait_gone(pids) == []
    daemon.stop()


def without_its_program(
    channel: Channel, tmp_path: Path, number: int, wait_s: float = 0.01
) -> tuple[Worker, Client, Path]:
    """Return a pool, its client whose program cannot be started, and the file that prevents it.

    number: the errno.  wait_s: how long the pool waits before its second try.
    """
    full = tmp_path / "full"
    full.touch()
    command = refusing(full, number, 1, "cat")
    worker, client = channel.start(*command, env={"WAIT_S": str(wait_s)}), channel.connect()
    eventually(lambda: full.read_text() != "", "a try")
    return worker, client, full


def test_term_is_heeded_while_a_connection_waits_for_its_program(
    channel: Channel, tmp_path: Path
) -> None:
    worker, client, _ = without_its_program(channel, tmp_path, errno.EAGAIN)

    worker.term()

    assert worker.wait() == 0
    assert client.hear() == ""
    assert "a connection was closed" in channel.log.read_text()


def test_a_drain_closes_the_connection_whose_program_is_gone(
    channel: Channel, program: Release
) -> None:
    worker = channel.start(*pool(1, program.path))
    program.path.unlink()
    client = channel.connect()
    eventually(lambda: "cannot start" in channel.log.read_text(), "a try")

    channel.end_channel()

    assert client.hear() == ""
    assert worker.wait() == 0
    reason = f"a connection was closed: cannot start {program.path}: No such file or directory"
    assert reason in channel.log.read_text()


def test_at_the_end_of_the_channel_queued_clients_wait_for_the_program(
    channel: Channel, tmp_path: Path
) -> None:
    """As at a stop: nobody else would serve them."""
    worker, client, full = without_its_program(channel, tmp_path, errno.ENOENT)
    queued = channel.connect()
    channel.end_channel()
    tries = full.read_text().count("\n")
    eventually(lambda: full.read_text().count("\n") >= tries + 2, "two more tries")

    full.unlink()

    for each in (client, queued):
        assert each.ask("hello") == "hello"
        each.close()
    assert worker.wait() == 0


def test_a_pool_that_retires_tries_once_more(channel: Channel, tmp_path: Path) -> None:
    worker, client, full = without_its_program(channel, tmp_path, errno.ENOENT, wait_s=1000)
    full.unlink()

    worker.retire()

    assert client.ask("hello") == "hello"
    client.close()
    assert worker.wait() == 0


def test_a_drain_waits_for_the_connection_in_hand(channel: Channel, tmp_path: Path) -> None:
    worker, client, full = without_its_program(channel, tmp_path, errno.ENOMEM)

    channel.end_channel()
    full.unlink()

    assert client.ask("hello") == "hello"
    client.close()
    assert worker.wait() == 0
