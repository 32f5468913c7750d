"""A program for each connection: what it has, how many there are, when the next one is started."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from socketprotector_client import wire

from socketprotector.ctl import client as control
from tests.channel import Channel
from tests.running import Client, Protector, eventually
from tests.stdio.pools import COUNTS, TALKS, pool, told

Start = Callable[..., Protector]
#: The masks of signals that are blocked and ignored.
SIGNALS = "grep -E 'Sig(Blk|Ign)' /proc/self/status"


@pytest.mark.costly
def test_cat_is_an_echo_server(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *pool(4, "cat")).ready()

    with Client(("127.0.0.1", daemon.port)) as client:
        assert client.ask("hello") == "hello"
        assert client.rest() == []  # the end of file came as soon as the program had ended
    daemon.stop()


def test_more_than_so_many_never_run_at_once(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *pool(3, COUNTS, shell=True)).ready()
    clients = [Client(("127.0.0.1", daemon.port)) for _ in range(12)]

    seen = []
    for client in clients:
        seen.append(int(client.hear()))
        client.close()

    assert max(seen) == 3
    daemon.stop()


def test_a_waiting_client_is_served_the_moment_a_program_ends(channel: Channel) -> None:
    channel.start(*pool(2, TALKS, shell=True))
    first, second = channel.connect(), channel.connect()
    assert first.hear()
    assert second.hear()
    third = channel.connect()
    assert channel.queued() == 1

    second.close()

    assert third.hear()
    assert first.ask("still there") == "still there"


@pytest.mark.parametrize(("at_once", "of"), [(5, 2), (4, 4), (3, 2)])
def test_the_pools_of_a_generation_share_the_places(
    at_once: int, of: int, protector: Start
) -> None:
    command = pool(at_once, "echo $PPID; read line", of=of, shell=True)
    daemon = protector("--workers", str(of), "127.0.0.1:0", "--", *command).ready()
    clients = [Client(("127.0.0.1", daemon.port)) for _ in range(at_once)]

    owners = [client.hear() for client in clients]  # all have one, at the same time

    counts = sorted(owners.count(owner) for owner in set(owners))
    assert counts == sorted(at_once // of + (slot < at_once % of) for slot in range(of))
    for client in clients:
        client.close()
    daemon.stop()


def test_a_pool_that_is_added_brings_a_place(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *pool(1, TALKS, shell=True)).ready()
    with Client(("127.0.0.1", daemon.port)) as first:
        assert first.hear()
        mark = daemon.signal(signal.SIGTTIN)
        daemon.log.wait_for("event=worker-ready", after=mark)

        with Client(("127.0.0.1", daemon.port)) as second:
            assert second.hear()
    daemon.stop()


def test_the_replacement_of_a_pool_has_as_many_places(protector: Start, tmp_path: Path) -> None:
    place = tmp_path / "control"
    words = ("--control", place, "127.0.0.1:0", "--", *pool(3, TALKS, shell=True))
    daemon = protector(*words).ready()
    with Client(("127.0.0.1", daemon.port)) as first:
        assert first.hear()  # its program keeps the old pool, which keeps its slot
        with control.Client(str(place)) as line:
            line.request("replace", pid=daemon.worker_pids()[0])
        daemon.log.wait_for("event=retired worker=1")

        clients = [Client(("127.0.0.1", daemon.port)) for _ in range(3)]

        for client in clients:
            assert client.hear()
        for client in clients:
            client.close()
    daemon.stop()


def test_a_program_has_three_descriptors_and_nothing_else(protector: Start) -> None:
    # Not the one that it needs for looking.
    shown = (
        "import os; d = '/proc/self/fd/'; "
        "print(*[n + ' ' + os.readlink(d + n) for n in os.listdir(d) if os.path.exists(d + n)],"
        " sep='\\n')"
    )
    daemon = protector("127.0.0.1:0", "--", *pool(4, sys.executable, "-S", "-c", shown)).ready()

    with Client(("127.0.0.1", daemon.port)) as client:
        lines = [line.split() for line in client.rest()]

    assert [number for number, _ in lines] == ["0", "1", "2"]
    assert lines[0][1] == lines[1][1]
    assert lines[0][1].startswith("socket:")
    assert not lines[2][1].startswith("socket:")
    daemon.stop()


def test_what_a_program_says_on_stderr_is_in_the_log(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *pool(4, "echo careful >&2", shell=True)).ready()

    with Client(("127.0.0.1", daemon.port)) as client:
        assert client.rest() == []

    daemon.log.wait_for("^careful$")
    daemon.stop()


def test_a_program_begins_with_no_signal_blocked_or_ignored(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *pool(4, SIGNALS, shell=True)).ready()

    with Client(("127.0.0.1", daemon.port)) as client:
        blocked, ignored = (int(line.split()[1], 16) for line in client.rest())

    assert blocked == 0
    # 32 and 33 are the C library's own: its posix_spawn ignores them, its threads set them.
    assert ignored & ~(1 << 31 | 1 << 32) == 0
    daemon.stop()


def test_its_connection_blocks(protector: Start) -> None:
    flags = "import fcntl, os; print(fcntl.fcntl(0, fcntl.F_GETFL) & os.O_NONBLOCK)"
    daemon = protector("127.0.0.1:0", "--", *pool(4, sys.executable, "-S", "-c", flags)).ready()

    with Client(("127.0.0.1", daemon.port)) as client:
        assert client.rest() == ["0"]
    daemon.stop()


@pytest.mark.parametrize(("host", "proto"), [("127.0.0.1", "TCP"), ("::1", "TCP6")])
def test_the_environment_has_the_client(host: str, proto: str, protector: Start) -> None:
    listen = f"[{host}]:0" if ":" in host else f"{host}:0"
    daemon = protector(
        listen,
        "--",
        *pool(4, "env"),
        TCPREMOTEHOST="somebody.else",
        REMOTE_HOST="somebody.else",
        KEPT="this",
    ).ready()

    with Client((host, daemon.port)) as client:
        port = str(client.socket.getsockname()[1])
        found = told(client.rest())

    common = {"PROTO": proto, "REMOTE_ADDR": host, "REMOTE_PORT": port}
    for prefix in ("TCP", "TCP6") if proto == "TCP6" else ("TCP",):
        common |= {
            f"{prefix}LOCALIP": host,
            f"{prefix}LOCALPORT": str(daemon.port),
            f"{prefix}REMOTEIP": host,
            f"{prefix}REMOTEPORT": port,
        }
    of_connection = ("PROTO", "TCP", "REMOTE_", "UNIX")
    assert {name: v for name, v in found.items() if name.startswith(of_connection)} == common
    private = ("SOCKETPROTECTOR_", "NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_")
    assert not [name for name in found if name.startswith(private)]
    assert found["KEPT"] == "this"
    daemon.stop()


def test_the_address_that_the_client_used_is_given_where_all_are_listened_on(
    protector: Start,
) -> None:
    daemon = protector("0.0.0.0:0", "--", *pool(4, "env")).ready()

    with Client(("127.0.0.2", daemon.port)) as client:
        found = told(client.rest())

    assert found["TCPLOCALIP"] == "127.0.0.2"
    daemon.stop()


@pytest.mark.parametrize("bound", ["", "/client", "@client"])
def test_the_environment_has_the_client_of_a_unix_socket(
    bound: str, protector: Start, tmp_path: Path
) -> None:
    path = tmp_path / "a b%.sock"
    daemon = protector(f"unix:{path}", "--", *pool(4, "env")).ready()
    source = {"/": f"{tmp_path}/client", "@": f"\0{tmp_path}"}.get(bound[:1])

    with Client(str(path), source=source) as client:
        found = told(client.rest())

    expected = {
        "PROTO": "UNIX",
        "UNIXLOCALPATH": str(path),
        "UNIXLOCALUID": str(os.getuid()),
        "UNIXLOCALGID": str(os.getgid()),
        "UNIXREMOTEEUID": str(os.getuid()),
        "UNIXREMOTEEGID": str(os.getgid()),
        "UNIXREMOTEPID": str(os.getpid()),
    }
    if source is not None:
        name = source.replace("\0", "@")
        expected |= {"UNIXREMOTEPATH": name, "REMOTE_ADDR": name}
    of_connection = ("PROTO", "TCP", "REMOTE_", "UNIX")
    assert {name: v for name, v in found.items() if name.startswith(of_connection)} == expected
    daemon.stop()


@pytest.mark.costly
def test_a_command_of_the_shell_is_run_by_it(protector: Start) -> None:
    command = "read a b; echo $((a + b)) | tr 0-9 a-j"
    daemon = protector("127.0.0.1:0", "--", *pool(4, command, shell=True)).ready()

    with Client(("127.0.0.1", daemon.port)) as client:
        assert client.ask("20 5") == "cf"
    daemon.stop()


def test_a_client_that_has_gone_before_its_turn_costs_no_program(
    channel: Channel, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    channel.start(*pool(1, f"echo >>{begun}; {TALKS}", shell=True))
    first = channel.connect()
    assert first.hear()
    gone, late = channel.connect(), channel.connect()
    gone.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gone.close()  # by a reset

    first.close()

    assert late.hear()
    assert begun.read_text().count("\n") == 2


def test_status_counts_programs_as_connections(protector: Start, tmp_path: Path) -> None:
    place = tmp_path / "control"
    command = pool(4, "read status; exit $status", shell=True)
    daemon = protector("--control", place, "127.0.0.1:0", "--", *command).ready()

    with Client(("127.0.0.1", daemon.port)), Client(("127.0.0.1", daemon.port)) as failing:
        failing.say("3")
        assert failing.hear() == ""

        def counted() -> bool:
            with control.Client(str(place)) as line:
                (generation,) = line.request("status")["generations"]
            (worker,) = generation["workers"]
            return (worker["accepted"], worker["active"], worker["errors"]) == (2, 1, 1)

        eventually(counted, "one that runs, one that has failed")
    daemon.stop()


def test_a_health_probe_is_not_counted(protector: Start, tmp_path: Path) -> None:
    place = tmp_path / "control"
    health = ("--health", "accept", "--health-every", "100ms")
    modes = ("--handoff", "stdio", "--workers", "1")
    daemon = protector("--control", place, *health, *modes, "127.0.0.1:0", "--", "cat").ready()
    daemon.log.wait_for("event=healthy")  # a probe was taken

    with Client(("127.0.0.1", daemon.port)) as client:
        assert client.ask("hello") == "hello"
        with control.Client(str(place)) as line:
            (generation,) = line.request("status")["generations"]

    assert (generation["accepted"], generation["wait_us"]["count"]) == (1, 1)
    daemon.stop()


def test_it_says_how_many_run(channel: Channel) -> None:
    worker = channel.start(*pool(4, TALKS, shell=True))
    with_answer = channel.connect()
    assert with_answer.hear()

    def said() -> bool:
        return b"STATUS=1 of 4 programs run" in channel.notify.recv(4096)

    channel.notify.settimeout(30)
    eventually(said, "its status")
    channel.end_channel()
    with_answer.close()
    assert worker.wait() == 0


def test_ready_is_heard_though_there_was_no_room_for_it(channel: Channel) -> None:
    worker = channel.starts_unread(*pool(1, "cat"))

    assert worker.ready_lines == ["READY=1", wire.RETIRES_ON_RETURN]


@pytest.mark.parametrize("days", [60, 11_574])
def test_it_says_that_it_is_alive_however_seldom_it_is_asked(channel: Channel, days: int) -> None:
    """epoll_wait(2) takes 24.8 days at most."""
    worker = channel.start(
        *pool(4, TALKS, shell=True), env={"WATCHDOG_USEC": str(days * 86_400_000_000)}
    )
    client = channel.connect()
    assert client.hear()
    channel.end_channel()

    client.close()
    assert worker.wait() == 0


def test_it_says_that_it_is_alive_if_asked(channel: Channel) -> None:
    worker = channel.start(*pool(4, TALKS, shell=True), env={"WATCHDOG_USEC": "20000"})
    client = channel.connect()
    assert client.hear()
    channel.end_channel()  # also while it only waits for its programs
    channel.notify.settimeout(30)

    heard = 0
    while heard < 3:
        heard += channel.notify.recv(4096) == b"WATCHDOG=1"

    client.close()
    assert worker.wait() == 0
