"""What the system refuses: a connection that was taken waits, and is served."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.channel import Channel
from tests.procfs import watched_by
from tests.running import Client, Protector, eventually
from tests.scenarios.tools import Release
from tests.stdio.pools import COUNTS, PROGRAMS, TALKS, pool, refusing

Start = Callable[..., Protector]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.ETXTBSY, errno.EMFILE])
def test_a_connection_waits_until_its_program_can_be_started(
    number: int, channel: Channel, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.touch()
    channel.start(*refusing(full, number, 4, "cat"))
    clients = [channel.connect() for _ in range(3)]
    eventually(lambda: full.read_text().count("\n") >= 3, "tries")
    assert channel.queued() == 2  # no other client is taken meanwhile

    full.unlink()

    assert [client.ask("hello") for client in clients] == ["hello"] * 3
    said = channel.log.read_text()
    assert said.count("cannot start") == 1
    assert said.count("again") == 2  # that it will be tried, and that it is done


def test_a_program_that_ends_makes_room_for_the_one_that_waits(
    channel: Channel, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    channel.start(*refusing(full, errno.EAGAIN, 4, "cat"), env={"WAIT_S": "1000"})
    first = channel.connect()
    assert first.ask("hello") == "hello"
    full.touch()
    second = channel.connect()
    eventually(lambda: full.read_text().count("\n") >= 1, "a try")
    full.unlink()

    first.close()

    assert second.ask("hello") == "hello"


def test_a_program_that_a_deploy_took_away_is_waited_for(protector: Start, tmp_path: Path) -> None:
    program = Release(tmp_path / "program")
    program.write("#!/bin/sh\nexec cat\n")
    daemon = protector("127.0.0.1:0", "--", *pool(4, program.path)).ready()
    program.path.rename(tmp_path / "aside")

    with Client(("127.0.0.1", daemon.port)) as client:
        client.say("hello")
        daemon.log.wait_for(f"cannot start {program.path}: No such file or directory")
        (tmp_path / "aside").rename(program.path)

        assert client.hear() == "hello"
    daemon.log.wait_for(f"can start {program.path} again")
    assert daemon.log.count("cannot start") == 1
    daemon.stop()


def test_as_many_programs_run_as_there_are_descriptors_for(channel: Channel) -> None:
    """MSG_CTRUNC would mean that a connection was lost."""
    worker = channel.start(*pool(30, TALKS, shell=True), nofile=20)
    clients = [channel.connect() for _ in range(30)]
    eventually(lambda: "no descriptor left" in channel.log.read_text(), "the limit")
    assert channel.queued() > 0
    eventually(lambda: channel.reader.fileno() not in watched_by(worker.pid), "not to listen")

    for client in clients:
        assert client.hear()
        client.close()

    assert channel.log.read_text().count("no descriptor left") == 1
    assert "was lost" not in channel.log.read_text()


def test_the_end_of_a_program_without_a_pidfd_is_seen(channel: Channel) -> None:
    worker = channel.start(
        sys.executable, PROGRAMS / "no_pidfd.py", *pool(1, COUNTS, shell=True)[4:]
    )
    clients = [channel.connect() for _ in range(3)]

    for client in clients:
        assert client.hear() == "1"  # at once
        client.close()

    channel.end_channel()
    assert worker.wait() == 0


def test_what_is_no_connection_is_closed_and_reported(channel: Channel) -> None:
    channel.start(*pool(1, "cat"))
    other = channel.connect_only()
    channel.hand_off(version=9)
    kind = channel.connect_only()
    channel.hand_off(kind=2)
    with Path("/dev/null").open() as file:
        channel.send(file.fileno())
    client = channel.connect()

    assert client.ask("hello") == "hello"
    assert other.hear() == ""
    assert kind.hear() == ""
    said = channel.log.read_text()
    assert "version 9, kind 1" in said
    assert "version 1, kind 2" in said


def test_an_unknown_listener_is_no_reason_not_to_serve(channel: Channel) -> None:
    channel.start(*pool(1, "cat"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel.send(theirs.fileno(), 7)
        theirs.close()
        ours.sendall(b"hello\n")

        ours.settimeout(30)
        assert ours.recv(100) == b"hello\n"


def test_a_pool_whose_places_are_taken_does_not_listen(channel: Channel) -> None:
    """It would not sleep while connections wait."""
    worker = channel.start(*pool(1, TALKS, shell=True))
    first, second = channel.connect(), channel.connect()
    assert first.hear()

    eventually(lambda: channel.reader.fileno() not in watched_by(worker.pid), "not to listen")

    assert channel.queued() == 1
    first.close()
    assert second.hear()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "no COMMAND after --"),
        (("--at-once", "4"), "no COMMAND after --"),
        (("--at-once", "4", "--"), "no COMMAND after --"),
        (("--at-once", "none", "--", "cat"), "--at-once none: a number from 1 on"),
        (("--at-once", "0", "--", "cat"), "--at-once 0: a number from 1 on"),
        (("--", "cat"), "--at-once 0: a number from 1 on"),
        (("--at-once", "--", "cat"), "no value: --at-once"),
        (("--at-once", "2", "--of", "3", "--", "cat"), "each pool needs a place"),
        (("--at-once", "2", "--max", "3", "--", "cat"), "unknown option, or no value: --max"),
        (("--at-once", "2", "--shell", "--", "echo", "a"), "put it in quotes"),
    ],
)
def test_a_wrong_call_is_answered_in_a_line(
    options: tuple[str, ...], said: str, channel: Channel
) -> None:
    worker = channel.spawn(sys.executable, "-I", "-m", "socketprotector.programs.stdio", *options)

    assert worker.wait() == 2
    text = channel.log.read_text()
    assert said in text
    assert text.count("\n") == 1


def test_by_hand_it_says_what_is_to_start_it(channel: Channel) -> None:
    worker = channel.spawn(*pool(4, "cat"), alone=True)

    assert worker.wait() == 2
    assert "SocketProtector --handoff stdio" in channel.log.read_text()


def test_a_missing_command_is_answered_in_a_line(channel: Channel) -> None:
    worker = channel.spawn(*pool(4, "not-there"))

    assert worker.wait() == 111
    text = channel.log.read_text()
    assert text == "socketprotector-stdio: cannot start not-there: not found in PATH\n"


def test_an_interrupt_ends_it_without_a_trace(channel: Channel) -> None:
    worker = channel.start(*pool(4, "cat"))

    os.kill(worker.pid, signal.SIGINT)

    assert worker.wait() == -signal.SIGINT
    assert channel.log.read_text() == ""


def test_a_generation_stays_with_the_file_it_began_with(channel: Channel, tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        Release(tmp_path / name / "program").write(f"#!/bin/sh\necho {name} $0\n")
    (tmp_path / "current").symlink_to("1")
    found = str(tmp_path / "1" / "program")
    command = pool(1, tmp_path / "current" / "program")

    for options in ((), ("--file", found)):
        channel.start(*command[:4], *options, *command[4:])
        (tmp_path / "current").unlink()
        (tmp_path / "current").symlink_to("2")

        assert channel.connect().hear() == f"1 {found}"


def test_a_file_that_is_gone_is_not_looked_for_elsewhere(channel: Channel, tmp_path: Path) -> None:
    command = pool(1, "cat")

    worker = channel.spawn(*command[:4], "--file", tmp_path / "cat", *command[4:])

    assert worker.wait() == 111
    assert f"cannot start {tmp_path}/cat: No such file" in channel.log.read_text()
