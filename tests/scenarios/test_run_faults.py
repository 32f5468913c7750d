"""Workers that die, hang, hold still or break what they share; clients that go away.

Run one way is what is about the channel: its order, its sharing, its end (for a listener's end see
test_handoff_hostile.py), and that what comes out of it is what was accepted.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.load import Load
from tests.procfs import in_backlog, kinds_of
from tests.rounds import rounds
from tests.running import Client, Protector, ask, eventually
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    Gate,
    Release,
    hold,
    library_worker,
    pid_in,
    spawned,
    worker,
)

Start = Callable[..., Protector]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def connections_of(pid: int, handoff: str) -> int:
    """How many connections a worker holds: its sockets but for channel and RETURN line."""
    others = 2 if handoff == "connection" else 1  # its listener
    return kinds_of(pid).get("socket", 0) - others


def the_worker(daemon: Protector) -> int:
    """The one worker that lives."""
    (pid,) = daemon.worker_pids()
    return pid


@pytest.mark.slow
@EITHER_HANDOFF
@pytest.mark.costly
def test_a_worker_killed_again_and_again_under_load_loses_only_what_it_had_taken(
    protector: Start, handoff: str
) -> None:
    daemon = protector("--workers", "4", "127.0.0.1:0", "--", *worker("many")).ready()
    load = Load(f"127.0.0.1:{daemon.port}", concurrency=16, lines=3, pause_s=0.002).start()
    victims: list[int] = []
    held = 0
    generation = 1
    while len(victims) < (rounds(9, 100) if handoff == "connection" else rounds(9, 50)):
        if len(victims) % 8 == 7:
            daemon.reload()  # or else the back-off for quick deaths would begin
            generation += 1
        before = load.snapshot().connections
        load.wait_for(lambda now, least=before + 5: now.connections > least)  # type: ignore[misc]
        victim = next(pid for pid in spawned(daemon, generation) if pid not in victims)
        hold(victim)
        held += connections_of(victim, handoff)
        os.kill(victim, signal.SIGKILL)
        victims.append(victim)
        eventually(
            lambda: daemon.log.count("how=.was killed by SIGKILL") == len(victims), "its end"
        )

    seen = load.stop()

    assert len(seen.failures) <= held
    assert {failure.kind for failure in seen.failures} <= {"reset", "empty"}
    assert {failure.pid for failure in seen.failures} <= {None, *victims}
    daemon.stop()


@EITHER_HANDOFF
def test_what_a_killed_worker_had_not_taken_waits_for_its_replacement(
    protector: Start, handoff: str
) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    pid = the_worker(daemon)
    taken = Client(("127.0.0.1", daemon.port))
    taken.ask()
    hold(pid)
    queued = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(60)]
    if handoff == "connection":
        eventually(lambda: in_backlog(daemon.port) == 0, "all of them in the queue")

    os.kill(pid, signal.SIGKILL)

    assert taken.hear() == ""
    for number, client in enumerate(queued):
        reply = client.hear()
        assert reply.endswith(f" line {number}")
        assert pid_in(reply) == spawned(daemon)[-1]
        client.close()
    taken.close()
    daemon.stop()


@EITHER_HANDOFF
def test_all_workers_killed_at_once_with_a_full_queue_lose_nothing_of_it(
    protector: Start, handoff: str
) -> None:
    daemon = protector(
        "--workers", "3", "--queue", "64", "127.0.0.1:0", "--", *worker("many")
    ).ready()
    pids = spawned(daemon)
    for pid in pids:
        hold(pid)
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(200)]
    if handoff == "connection":
        eventually(lambda: 0 < in_backlog(daemon.port) < 200, "a full queue")

    for pid in pids:
        os.kill(pid, signal.SIGKILL)

    for number, client in enumerate(clients):
        assert client.hear().endswith(f" line {number}")
        client.close()
    daemon.stop()


@EITHER_HANDOFF
def test_what_arrives_while_the_first_worker_starts_is_answered(
    protector: Start, gate: Gate
) -> None:
    daemon = protector("127.0.0.1:0", "--", *gate.before(*worker("many")))
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(100)]
    eventually(lambda: in_backlog(daemon.port) == 100, "the queue")

    gate.open()

    for number, client in enumerate(clients):
        assert client.hear().endswith(f" line {number}")
        client.close()
    daemon.stop()


@pytest.mark.costly
def test_a_queue_filled_to_the_brim_by_stopped_workers_is_answered_in_order(
    protector: Start,
) -> None:
    daemon = protector("--queue", "32", "127.0.0.1:0", "--", *worker("in_order")).ready()
    pid = the_worker(daemon)
    hold(pid)
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(150)]
    eventually(lambda: 0 < in_backlog(daemon.port) < 150, "a queue filled to the brim")

    os.kill(pid, signal.SIGCONT)

    answers = [client.hear() for client in clients]
    assert answers == [f"[{pid}] line {n}, number {n + 1}" for n in range(150)]
    for client in clients:
        client.close()
    daemon.stop()


@pytest.mark.parametrize("how", ["read", "both"])
@pytest.mark.parametrize("then", ["stays", "exit"])
def test_a_worker_that_shuts_its_channel_down_costs_no_connection(
    how: str, then: str, protector: Start, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*worker("closes_channel", how, then))
    daemon = protector("127.0.0.1:0", "--", release.path).ready()
    release.becomes(*worker("many"))

    first = Client(("127.0.0.1", daemon.port), "the first")
    others = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(20)]

    assert pid_in(first.hear()) == spawned(daemon, 1)[0]
    first.close()
    daemon.log.wait_for("event=channel-broken")
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=(reloaded|ready)", after=mark)
    for number, client in enumerate(others):
        assert client.hear().endswith(f" line {number}")
        client.close()
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.wait() == 0


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_worker_with_64_descriptors_loses_none_of_500_connections(protector: Start) -> None:
    limit = ("--limit", "nofile=64")
    daemon = protector(*limit, "127.0.0.1:0", "--", *library_worker("echo")).ready()

    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(500)]

    for number, client in enumerate(clients):
        assert client.hear().endswith(f" line {number}")
        client.close()
    assert len(spawned(daemon)) == 1
    daemon.stop()


@pytest.mark.costly
def test_asyncio_workers_share_a_queue(protector: Start, gate: Gate) -> None:
    """asyncio calls accept until it fails: without our Listener one would take all 60."""
    command = library_worker("asyncio_server", str(gate.path))
    daemon = protector("--workers", "4", "127.0.0.1:0", "--", *command).ready()
    for pid in spawned(daemon):
        hold(pid)
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(60)]
    eventually(lambda: in_backlog(daemon.port) == 0, "all of them in the queue")

    for pid in spawned(daemon):
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: daemon.log.count("^waiting$") == 4, "each has something to serve")

    opened = os.open(gate.path, os.O_WRONLY)
    takers = {pid_in(client.hear()) for client in clients}
    os.close(opened)
    assert takers == set(spawned(daemon))
    for client in clients:
        client.close()
    daemon.stop()


def test_a_client_that_resets_before_it_is_accepted_does_no_harm(
    protector: Start, gate: Gate
) -> None:
    daemon = protector("127.0.0.1:0", "--", *gate.before(*worker("many")))
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(20)]
    for client in clients[::2]:
        client.reset()

    gate.open()

    for number, client in enumerate(clients):
        if number % 2:
            assert client.hear().endswith(f" line {number}")
            client.close()
    assert len(spawned(daemon)) == 1
    daemon.stop()


@EITHER_HANDOFF
def test_a_client_that_resets_while_queued_does_no_harm(protector: Start, handoff: str) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    pid = the_worker(daemon)
    hold(pid)
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(20)]
    if handoff == "connection":
        eventually(lambda: in_backlog(daemon.port) == 0, "all of them in the queue")
    for client in clients[::2]:
        client.reset()

    daemon.reload()  # so that they are taken back and sent on, too
    os.kill(pid, signal.SIGCONT)

    for number, client in enumerate(clients):
        if number % 2:
            assert client.hear().endswith(f" line {number}")
            client.close()
    assert len(spawned(daemon)) == 2
    daemon.stop()


def test_a_connection_knows_its_listener(protector: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    addresses = ("127.0.0.1:0", "[::1]:0", f"unix:{path}", "unix:@sp-" + tmp_path.name)
    daemon = protector(*addresses, "--", *worker("names_listener")).ready()
    ports = [int(each.rpartition(":")[2]) for each in daemon.addresses[:2]]

    answers = [
        ask(("127.0.0.1", ports[0])),
        ask(("::1", ports[1])),
        ask(path),
        ask("\0sp-" + tmp_path.name),
    ]

    assert answers == [
        f"0 tcp:127.0.0.1:{ports[0]} hello",
        f"1 tcp:[::1]:{ports[1]} hello",
        f"2 unix:{path} hello",
        f"3 unix:@sp-{tmp_path.name} hello",
    ]
    daemon.stop()
    assert not os.path.lexists(path)


@pytest.mark.parametrize("kind", ["tcp6", "unix", "abstract"])
@EITHER_HANDOFF
def test_reloads_lose_nothing_on_any_kind_of_listener(
    kind: str, protector: Start, tmp_path: Path, handoff: str
) -> None:
    wanted = {
        "tcp6": "[::1]:0",
        "unix": f"unix:{tmp_path}/socket",
        "abstract": f"unix:@sp-{tmp_path.name}",
    }
    daemon = protector(wanted[kind], "--", *worker("many")).ready()
    load = Load(daemon.addresses[0], concurrency=4).start()

    for _ in range(rounds(3, 5) if handoff == "connection" else rounds(2, 5)):
        daemon.reload()

    load.wait_for(lambda now: now.connections > 0)
    assert load.stop().failures == ()
    daemon.stop()


@pytest.mark.costly
def test_a_worker_sees_the_peers_own_address(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("names_listener")).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        host, port = client.socket.getsockname()

        assert client.ask("peer") == f"{host} {port}"
    daemon.stop()


def test_the_client_sees_the_end_that_the_worker_makes(protector: Start) -> None:
    """No process keeps a copy of a connection that was handed over."""
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        client.ask()
        client.socket.shutdown(socket.SHUT_WR)
        assert client.hear() == ""
    daemon.stop()
