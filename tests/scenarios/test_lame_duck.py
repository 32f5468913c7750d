"""A lame duck: told to stop, it serves on until load balancers have seen that it is not ready."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.rolling import WORKERS, Balanced, Clients
from tests import needs
from tests.c.building import compiled, shared_folder
from tests.load import Load
from tests.procfs import listening
from tests.rounds import rounds
from tests.running import Client, Protector, ask, eventually
from tests.scenarios.adopting import kill_protector, revived, served, upgrade
from tests.scenarios.managers import Manager, Service
from tests.scenarios.operating import MANY, Operating
from tests.scenarios.tools import EITHER_HANDOFF, spawned

#: A lame duck that no test waits for the end of.
LONG = ("--lame-duck", "1h")
Starter = Callable[..., Protector]


def here(daemon: Protector) -> tuple[str, int]:
    return "127.0.0.1", daemon.port


def told(daemon: Protector) -> None:
    """Tell it to stop, and wait until it is a lame duck."""
    mark = daemon.signal(signal.SIGTERM)
    daemon.log.wait_for("event=lame-duck ", after=mark)


@EITHER_HANDOFF
def test_clients_are_served_after_term_until_its_time_is_over(operated: Operating) -> None:
    web = operated("--lame-duck", "1h", "--stop-timeout", "1h")
    line = web.line(follows=True)
    address = web.address
    with Load(f"127.0.0.1:{address[1]}", concurrency=8) as load, Client(address, "early") as early:
        served(load)
        early.hear()
        assert line.ask("stop") == {}
        assert "the stop begins in 1h" in line.event("lame-duck")["reason"]

        served(load, 50)
        status = line.status()
        assert (status["phase"], status["lame_duck"], status["route"]) == (
            "stopping",
            "stopping",
            1,
        )
        assert 3500 < status["lame_duck_s"] <= 3600
        for command, arguments in (("reload", {}), ("hold", {"seconds": 1}), ("upgrade", {})):
            assert line.refused(command, **arguments) == ("refused", "a stop is in progress")
        os.kill(spawned(web.daemon)[0], signal.SIGKILL)
        line.event("worker-ready")
        served(load, 50)

        load.stop()
        assert line.ask("stop") == {}, "a second one ends it"
        line.event("stopping")
        assert line.status()["lame_duck"] == "off"
    assert web.daemon.wait() == 0
    assert listening(address[1]) == 0
    # Of those that were open in the worker that was killed.
    assert {each.kind for each in load.snapshot().failures} <= {"reset", "empty"}


@EITHER_HANDOFF
def test_it_ends_by_itself(protector: Starter) -> None:
    daemon = protector("--lame-duck", "300ms", "127.0.0.1:0", "--", *MANY).ready()

    mark = daemon.signal(signal.SIGTERM)

    daemon.log.wait_for("event=lame-duck ", after=mark)
    daemon.log.wait_for("event=stopping", after=mark)
    assert daemon.wait() == 0


def test_it_ends_when_no_client_comes(protector: Starter) -> None:
    words = (*LONG, "--lame-duck-idle", "300ms")
    daemon = protector(*words, "127.0.0.1:0", "--", *MANY).ready()
    with Client(here(daemon), "hello") as kept:
        kept.hear()
        told(daemon)

        daemon.log.wait_for("event=stopping")  # an open connection is no new client
    assert daemon.wait() == 0


@pytest.mark.costly
def test_under_stdio_each_program_is_started_meanwhile(protector: Starter) -> None:
    daemon = protector("--handoff", "stdio", *LONG, "127.0.0.1:0", "--", "/bin/cat").ready()
    told(daemon)

    assert ask(here(daemon)) == "hello"
    daemon.stop()


@pytest.mark.costly
def test_under_legacy_the_daemon_is_handed_connections_meanwhile(
    protector: Starter,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    port = free_port()
    original = compiled(shared_folder(tmp_path_factory), "original")
    words = ("--handoff", "legacy", *LONG, f"127.0.0.1:{port}", "--", original, str(port))
    daemon = protector(*words).ready()
    told(daemon)

    assert ask(here(daemon)).endswith("hello")
    daemon.stop()


def test_int_stops_at_once(protector: Starter) -> None:
    daemon = protector(*LONG, "127.0.0.1:0", "--", *MANY).ready()
    told(daemon)

    daemon.signal(signal.SIGINT)

    assert daemon.wait() == 0


def test_a_hold_ends_with_it(operated: Operating) -> None:
    web = operated(*LONG)
    line = web.line(follows=True)
    line.ask("hold", seconds=3000)
    with Client(web.address, "hello") as client:
        eventually(lambda: web.status()["listeners"][0]["backlog"] == 1, "it waits")

        line.ask("stop")

        line.event("released")
        line.event("lame-duck")
        assert client.hear() == f"[{spawned(web.daemon)[0]}] hello"
    assert line.status()["held_s"] is None
    web.daemon.stop()


def test_on_and_off_over_a_reload(operated: Operating) -> None:
    web = operated()
    line = web.line(follows=True)
    assert line.ask("lame-duck", on=True) == {"lame_duck": "on"}
    line.event("lame-duck-on")

    line.ask("reload")
    line.event("reloaded", generation=2)

    status = line.status()
    assert (status["phase"], status["lame_duck"], status["lame_duck_s"]) == ("serving", "on", None)
    assert ask(web.address).endswith("] hello")
    assert line.ask("lame-duck", on=False) == {"lame_duck": "off"}
    line.event("lame-duck-off")
    line.ask("lame-duck", on=True)
    web.daemon.stop()


# -- another program -------------------------------------------------------------


@EITHER_HANDOFF
@pytest.mark.costly
def test_an_upgrade_and_a_guard_go_on_with_it(operated: Operating) -> None:
    web = operated("--guard", *LONG)
    line = web.line(follows=True)
    address = web.address
    line.ask("stop")
    line.event("lame-duck")

    revived(web.daemon, kill_protector(web.daemon))
    eventually(lambda: web.status()["restarts"] == 1, "the next one")
    assert 0 < web.status()["lame_duck_s"] < 3600
    assert ask(address).endswith("] hello")

    assert "event=resumed" in upgrade(web.daemon)
    eventually(lambda: web.status()["restarts"] == 2, "the one after that")
    status = web.status()
    assert (status["phase"], status["lame_duck"]) == ("stopping", "stopping")
    assert 0 < status["lame_duck_s"] < 3600
    assert ask(address).endswith("] hello")
    web.daemon.stop()
    assert listening(address[1]) == 0


def test_on_outlives_the_program(operated: Operating) -> None:
    web = operated("--guard")
    web.line().ask("lame-duck", on=True)

    revived(web.daemon, kill_protector(web.daemon))

    eventually(lambda: web.status()["restarts"] == 1, "the next one")
    assert web.status()["lame_duck"] == "on"
    web.daemon.stop()


@pytest.mark.costly
def test_a_program_from_the_descriptor_store_goes_on_with_it(service: Service) -> None:
    words = (*LONG, "127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    service.wait_for("READY")
    address = here(first)
    told(first)
    assert service.wait_for("STOPPING")["STATUS"].startswith("stopping: lame duck")
    service.kill()

    second = service.start(*words)
    second.log.wait_for("event=resumed")

    again = service.wait_for("STOPPING")  # nothing else: it is not ready
    assert again["STATUS"].startswith("stopping: lame duck")
    assert ask(address).endswith("] hello")
    second.stop()


# -- what is said ----------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close()


def test_systemd_hears_of_it_with_the_time_of_all_that_is_to_come(
    protector: Starter, manager: Manager
) -> None:
    limits = ("--lame-duck", "1000s", "--stop-timeout", "100s", "--kill-timeout", "10s")
    daemon = protector(*limits, "127.0.0.1:0", "--", *MANY, NOTIFY_SOCKET=manager.address).ready()
    manager.wait_for("READY")

    daemon.signal(signal.SIGTERM)

    first = manager.hear()
    assert first["STOPPING"] == "1"
    assert first["STATUS"] == "stopping: lame duck, accepts clients for up to 16m40s"
    assert int(first["EXTEND_TIMEOUT_USEC"]) > 1_110_000_000

    daemon.signal(signal.SIGTERM)

    second = manager.hear()
    assert (second["STOPPING"], second["STATUS"]) == ("1", "stopping")
    assert 110_000_000 < int(second["EXTEND_TIMEOUT_USEC"]) < 1_000_000_000
    assert daemon.wait() == 0


def test_systemd_hears_of_no_reload_any_more(
    protector: Starter, manager: Manager, tmp_path: Path
) -> None:
    released = tmp_path / "released"
    later = f"[ $SOCKETPROTECTOR_GENERATION = 1 ] || until [ -e {released} ]; do sleep 0.02; done"
    slow = ("/bin/sh", "-c", f'{later}; exec "$@"', "sh", *MANY)
    daemon = protector(*LONG, "127.0.0.1:0", "--", *slow, NOTIFY_SOCKET=manager.address).ready()
    manager.wait_for("READY")
    daemon.signal(signal.SIGHUP)
    manager.wait_for("RELOADING")
    told(daemon)
    assert manager.hear()["STOPPING"] == "1"

    released.touch()
    daemon.log.wait_for("event=reloaded ")
    daemon.signal(signal.SIGTERM)

    assert manager.hear()["STATUS"] == "stopping"
    assert daemon.wait() == 0


# -- behind HAProxy --------------------------------------------------------------


haproxy = needs.programs("haproxy")


@pytest.mark.costly
@haproxy
@pytest.mark.parametrize("handoff", WORKERS)
def test_behind_haproxy_no_request_fails(
    tmp_path_factory: pytest.TempPathFactory, marked_environment: dict[str, str], handoff: str
) -> None:
    folder = tmp_path_factory.mktemp("x")  # short: a control socket's path has 107 bytes
    with Balanced(
        folder, (0.0, 1.0), *LONG, handoff=handoff, environment=marked_environment
    ) as balanced:
        _replaced_in_turn(balanced)


@haproxy
@pytest.mark.costly
def test_behind_haproxy_that_asks_the_agent_no_request_fails(
    tmp_path_factory: pytest.TempPathFactory, marked_environment: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("x")
    with Balanced(
        folder, (0.0, 1.0), *LONG, agent=True, environment=marked_environment
    ) as balanced:
        _replaced_in_turn(balanced)


def _replaced_in_turn(balanced: Balanced) -> None:
    with Clients(balanced.port, per_second=100.0) as clients:
        for server in balanced.servers * rounds(1, 5):
            balanced.tell(server)
            with socket.create_connection(("127.0.0.1", server.port)):
                pass  # it accepts
            balanced.wait_for(server, balanced.out)
            before = clients.answered
            balanced.tell(server)  # a second time: now it may stop
            balanced.start_again(server)
            eventually(lambda: clients.answered > before, "answers")  # noqa: B023 (called here)
        clients.stop()

        assert clients.failures == [], balanced.log
        assert clients.answered > 0
