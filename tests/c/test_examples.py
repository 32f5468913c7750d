"""The examples in C, Perl and Ruby, under the real protector and without one."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from socketprotector_client import wire

from socketprotector.demo.seen import Snapshot
from tests import needs
from tests.c.building import PLAIN, SANITIZED, Build, working_valgrind
from tests.channel import Channel
from tests.load import Load
from tests.procfs import ports_of
from tests.running import DEADLINE_S, ROOT, Client, Protector, ask, eventually
from tests.scenarios.starting import needs_ipv6
from tests.scenarios.tools import pid_in, spawned

Start = Callable[..., Protector]

SCRIPTS = {"echo.pl": "perl", "echo.rb": "ruby"}
IN_C = ["echo_epoll", "echo_blocking"]


@pytest.fixture
def program(request: pytest.FixtureRequest, build: Build) -> tuple[str, ...]:
    """The command of an example."""
    name: str = request.param
    if name in SCRIPTS:
        interpreter = shutil.which(SCRIPTS[name])
        if interpreter is None:
            needs.skip(SCRIPTS[name])
        return interpreter, str(ROOT / "client_lib" / "examples" / name)
    return (str(build(name, *SANITIZED)),)


in_every_language = pytest.mark.parametrize("program", [*IN_C, *SCRIPTS], indirect=True)
in_c = pytest.mark.parametrize("program", IN_C, indirect=True)


@pytest.fixture
def protect(protector: Start) -> Iterator[Start]:
    """Start a protector; at the end all workers must have ended by themselves, without a fault."""
    started: list[Protector] = []

    def start(*arguments: str | Path) -> Protector:
        started.append(protector(*arguments).ready())
        return started[-1]

    yield start
    for each in started:
        each.stop()
        ended = [line for line in each.log.seen if "event=exited" in line]
        assert len(ended) == len(spawned(each))
        assert [line for line in ended if 'how="exited with status 0"' not in line] == []
        assert each.log.count(r" (warning|error) |cannot") == 0, each.log.text()


@in_every_language
@pytest.mark.costly
def test_reloads_under_load_fail_nothing(protect: Start, program: tuple[str, ...]) -> None:
    daemon = protect("--workers", "2", "127.0.0.1:0", "--", *program)

    with Load(f"127.0.0.1:{daemon.port}", concurrency=8, until_eof=True) as load:
        for _ in range(3):
            daemon.reload()
            new = set(spawned(daemon)[-2:])
            load.wait_for(partial(answered_by, new))

    assert load.snapshot().failures == ()


@in_every_language
def test_ready_is_heard_though_there_was_no_room_for_it(
    channel: Channel, program: tuple[str, ...]
) -> None:
    worker = channel.starts_unread(*program)

    assert sorted(worker.ready_lines) == sorted(["READY=1", wire.RETIRES_ON_RETURN])


def answered_by(pids: set[int], now: Snapshot) -> bool:
    return bool(pids & set(now.pids))


@pytest.mark.costly
@in_every_language
def test_a_conversation_goes_on_while_its_worker_drains(
    protect: Start, program: tuple[str, ...]
) -> None:
    daemon = protect("127.0.0.1:0", "--", *program)
    address = ("127.0.0.1", daemon.port)
    with Client(address) as client:
        old = pid_in(client.ask())
        mark = len(daemon.log.seen)
        daemon.reload()

        assert pid_in(ask(address)) != old
        assert client.ask("again") == f"[{old}] again"
        client.say("quit")
        assert client.hear() == ""

    daemon.log.wait_for("event=exited .*worker=1 .*status 0", after=mark)


@in_every_language
def test_a_worker_too_many_leaves_when_its_line_ends(
    protect: Start, program: tuple[str, ...]
) -> None:
    daemon = protect("--workers", "2", "127.0.0.1:0", "--", *program)

    mark = daemon.signal(signal.SIGTTOU)

    daemon.log.wait_for("event=exited .*status 0", after=mark)
    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")


def test_being_drained_can_be_told_from_being_retired(protect: Start, build: Build) -> None:
    daemon = protect("--workers", "2", "127.0.0.1:0", "--", build("probe", *SANITIZED))

    daemon.signal(signal.SIGTTOU)
    daemon.out.wait_for("retired 1")
    assert daemon.out.count("drained") == 0
    daemon.stop()

    daemon.out.join()
    assert daemon.out.count("drained 1") == 1
    assert daemon.out.count("left -3 0") == 2


@in_every_language
def test_sigterm_ends_it_though_a_client_stays(protector: Start, program: tuple[str, ...]) -> None:
    daemon = protector("--drain-timeout", "10ms", "127.0.0.1:0", "--", *program).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        client.ask()
        mark = len(daemon.log.seen)
        daemon.reload()

        daemon.log.wait_for("event=exited generation=1 .*status 0", after=mark)
        assert client.hear() == ""


def test_out_of_descriptors_none_is_lost(protect: Start, build: Build) -> None:
    daemon = protect("--limit", "nofile=64", "127.0.0.1:0", "--", build("echo_epoll", *SANITIZED))
    clients = {}
    poll = select.epoll()
    try:
        for number in range(300):
            client = socket.create_connection(("127.0.0.1", daemon.port), DEADLINE_S)
            clients[client.fileno()] = client, b"line %d\n" % number
            client.sendall(b"line %d\n" % number)
            poll.register(client, select.EPOLLIN)

        while clients:
            found = poll.poll(DEADLINE_S)
            assert found, f"{len(clients)} were not answered"
            for fd, _ in found:
                client, line = clients.pop(fd)
                with client:
                    poll.unregister(fd)
                    assert client.recv(4096).endswith(b"] " + line)
    finally:
        poll.close()
        for client, _ in clients.values():
            client.close()

    assert status(daemon)["lost"] == 0


def told(daemon: Protector, command: str) -> Any:
    """What socketprotectorctl says; other instances may run on this machine."""
    ctl = [sys.executable, "-m", "socketprotector.ctl", "--name", str(daemon.port)]
    return json.loads(
        subprocess.run([*ctl, command, "--json"], check=True, capture_output=True).stdout
    )


def status(daemon: Protector) -> dict[str, Any]:
    """What is known of the serving generation."""
    found: dict[str, Any] = told(daemon, "status")
    found = found.get("result", found)
    [serving] = [each for each in found["generations"] if each["phase"] == "serving"]
    assert isinstance(serving, dict)
    return serving


def counts(daemon: Protector) -> tuple[int | None, ...]:
    found = status(daemon)
    return tuple(found[name] for name in ("accepted", "active", "finished", "errors"))


@pytest.mark.costly
def test_it_counts_what_it_does(protect: Start, build: Build) -> None:
    daemon = protect("127.0.0.1:0", "--", build("echo_epoll", *SANITIZED))
    address = ("127.0.0.1", daemon.port)
    assert counts(daemon) == (0, 0, 0, 0)

    clients = [Client(address) for _ in range(4)]
    for client in clients:
        client.ask()
    assert counts(daemon) == (4, 4, 0, 0)
    waits = status(daemon)["wait_us"]
    assert waits["count"] == sum(waits["buckets"]) == 4
    assert len(connections(daemon)) == 4

    clients[0].reset()
    clients[1].say("quit")
    assert clients[1].hear() == ""
    clients[1].close()
    eventually(lambda: counts(daemon) == (4, 2, 2, 1), "two are open, one has failed")
    for client in clients[2:]:
        client.close()
    eventually(lambda: counts(daemon) == (4, 0, 4, 1), "none is open")


def test_a_health_probe_is_served_but_not_counted(protect: Start, build: Build) -> None:
    health = ("--health", "accept", "--health-every", "100ms")
    daemon = protect(*health, "127.0.0.1:0", "--", build("echo_epoll", *SANITIZED))
    daemon.log.wait_for("event=healthy")  # a probe was taken

    with Client(("127.0.0.1", daemon.port)) as client:
        client.ask()
        found = status(daemon)

    assert (found["accepted"], found["wait_us"]["count"]) == (1, 1)


def connections(daemon: Protector) -> list[dict[str, Any]]:
    found = told(daemon, "connections")
    result: list[dict[str, Any]] = found["connections"] if isinstance(found, dict) else found
    return result


@pytest.mark.costly
def test_nothing_is_read_or_written_out_of_place(protect: Start, build: Build) -> None:
    valgrind = working_valgrind()
    watched = (valgrind, "-q", "--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=all")
    daemon = protect("127.0.0.1:0", "--", *watched, build("echo_epoll", *PLAIN))
    with Load(f"127.0.0.1:{daemon.port}", concurrency=8, until_eof=True) as load:
        load.wait_for(lambda now: now.connections > 50)
        daemon.reload()
        new = spawned(daemon)[-1]
        load.wait_for(lambda now: new in now.pids)

    assert load.snapshot().failures == ()
    assert daemon.log.count("==[0-9]+==") == 0


@in_c
@pytest.mark.costly
def test_it_says_watchdog_through_a_long_conversation(
    channel: Channel, program: tuple[str, ...]
) -> None:
    worker = channel.start(*program, env={"WATCHDOG_USEC": "20000"})
    client = channel.connect()
    assert client.ask("one") == f"[{worker.pid}] one"

    channel.notify.settimeout(DEADLINE_S)
    said = [channel.notify.recv(4096) for _ in range(10)]
    assert said[-5:] == [b"WATCHDOG=1"] * 5

    channel.end_channel()
    client.close()
    assert worker.wait() == 0


class Alone:
    """A program without a protector."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, stderr=subprocess.PIPE
        )

    def ports(self) -> list[int]:
        """Where it listens, as soon as it does."""
        eventually(lambda: bool(ports_of(self.process.pid)), "it listens")
        return list(ports_of(self.process.pid))

    def end(self) -> tuple[int, str]:
        """Ask it to end; return its status and what it said."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, said.decode()


@pytest.fixture
def alone(marked_environment: dict[str, str]) -> Iterator[Callable[..., Alone]]:
    started: list[Alone] = []

    def start(*command: str | Path, **environment: str) -> Alone:
        words = tuple(str(each) for each in command)
        started.append(Alone(words, {**marked_environment, **environment}))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


@in_c
@pytest.mark.parametrize(
    ("address", "ways"),
    [
        ("127.0.0.1:0", 1),
        pytest.param("tcp:[::1]:0", 1, marks=needs_ipv6),
        pytest.param("0", 2, marks=needs_ipv6),
        ("localhost:0", 0),
    ],
)
def test_without_a_protector_it_listens_itself(
    alone: Callable[..., Alone], program: tuple[str, ...], address: str, ways: int
) -> None:
    server = alone(*program, address)

    first, *others = server.ports()
    if ways == 2:
        eventually(lambda: ports_of(server.process.pid) == [first, first], "it listens twice")
    with Client(("::1" if "::1" in address else "127.0.0.1", first)) as client:
        assert client.ask() == f"[{server.process.pid}] hello"
        client.say("quit")
        assert client.hear() == ""
    assert set(others) <= {first}

    assert server.end() == (0, "")


@pytest.mark.parametrize("program", list(SCRIPTS), indirect=True)
def test_a_script_without_a_protector_listens_itself(
    alone: Callable[..., Alone], program: tuple[str, ...]
) -> None:
    server = alone(*program, "0", "127.0.0.1")

    [port] = server.ports()
    assert ask(("127.0.0.1", port)) == f"[{server.process.pid}] hello"

    assert server.end() == (0, "")


@in_c
def test_a_unix_socket_of_its_own_replaces_a_stale_one_and_no_living_one(
    alone: Callable[..., Alone], program: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    server = alone(*program, f"unix:{path}")
    eventually(lambda: path.exists() and answers(path), "it listens")
    assert alone(*program, f"unix:{path}").wait() == (
        111,
        "cannot start: Address already in use\n",
    )
    assert answers(path)

    assert server.end() == (0, "")
    assert not path.exists()


@in_c
def test_a_unix_path_that_another_program_has_bound_since_is_not_removed(
    alone: Callable[..., Alone], program: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "x.sock"
    server = alone(*program, f"unix:{path}")
    eventually(lambda: path.exists() and answers(path), "it listens")
    path.unlink()

    with socket.create_server(str(path), family=socket.AF_UNIX):
        assert server.end() == (0, "")

    assert path.exists()


def answers(path: Path) -> bool:
    try:
        return ask(str(path)).endswith("] hello")
    except ConnectionRefusedError:
        return False


@in_c
@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("", "Invalid argument"),
        ("x", "Invalid argument"),
        ("65536", "Invalid argument"),
        (":4321", "Invalid argument"),
        ("127.0.0.1:", "Invalid argument"),
        ("unix:", "Invalid argument"),
        ("unix:/" + "x" * 200, "File name too long"),
        ("unix:/nowhere/x.sock", "No such file or directory"),
        ("a..b:4321", "Cannot assign requested address"),
        ("192.0.2.1:4321", "Cannot assign requested address"),
        ("x" * 300 + ":1", "Invalid argument"),
    ],
)
def test_what_is_no_address_is_an_error(
    alone: Callable[..., Alone], program: tuple[str, ...], address: str, why: str
) -> None:
    assert alone(*program, address).wait() == (111, f"cannot start: {why}\n")


@in_c
def test_a_variable_without_its_descriptor_is_an_error(
    alone: Callable[..., Alone], program: tuple[str, ...]
) -> None:
    server = alone(*program, "127.0.0.1:0", SOCKETPROTECTOR_CHANNEL="99")

    assert server.wait() == (111, "cannot start: Bad file descriptor\n")
