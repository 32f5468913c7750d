"""`--handoff listener`: a worker that does its worst to the listening socket that it was handed.

Each attack is a function in tests/workers/hostile_listener.py.  After it releases that behave are
loaded, and all clients are served by them.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from tests import needs
from tests.boundary.listening import ignore_clients
from tests.procfs import wake_ups
from tests.running import FAIR_START_S, Protector, ask, eventually, shared_path, wait_gone
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.managers import Giver, Service
from tests.scenarios.tools import Gate, Release, pid_in, spawned, worker
from tests.scenarios.users import A, Command

Starter = Callable[..., Protector]
MODE = ("--handoff", "listener", "--ready", "notify")
QUICK = ("--drain-timeout", "0.1s", "--stop-timeout", "0.1s", "--kill-timeout", "0.1s")
GOOD = worker("accepts")
SHUT = ("shuts_it_down", "shuts_it_down_for_reading")
ATTACKS = (
    *SHUT,
    "shuts_it_down_again_and_again",
    "listens_again",
    "leaves_it_half_shut",
    "drops_clients_in_the_kernel",
    "drops_them_and_locks_that",
    "steers_clients_astray",
    "turns_every_switch",
)
#: On one socket for all generations: a filter that is locked stays, and what was shut down in the
#: last moment listens again a tenth of a second later.
LASTING = ("drops_them_and_locks_that", "shuts_it_down_again_and_again")
IN_TIME_S = 5.0


def served(address: tuple[str, int] | str) -> int:
    """Ask until a worker answers, and return its pid; each try has its time."""
    found: list[int] = []

    def answers() -> bool:
        try:
            reply = ask(address, timeout_s=IN_TIME_S)
        except OSError:
            return False
        if reply:
            found.append(pid_in(reply))
        return bool(reply)

    eventually(answers, "an answer", deadline_s=60)
    return found[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "listen"),
    [
        *((attack, listen) for attack in ATTACKS for listen in ("127.0.0.1:0", "[::1]:0", "0")),
        *((attack, "127.0.0.1:0?defer_accept=1") for attack in ATTACKS if attack not in LASTING),
    ],
)
def test_what_it_does_to_its_listener_harms_no_generation_after_it(
    protector: Starter, tmp_path: Path, attack: str, listen: str
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*worker("hostile_listener", attack))
    daemon = protector(*MODE, *QUICK, listen, "--", release.path).ready()
    daemon.log.wait_for("^done$")
    host = "::1" if "::1" in listen else "127.0.0.1"
    address = (host, daemon.port)

    release.becomes(*GOOD)
    for _ in range(4):  # each side has its turn twice
        before = spawned(daemon)
        daemon.reload()
        assert wait_gone(before) == []
        answers = {pid_in(ask(address, timeout_s=IN_TIME_S)) for _ in range(20)}
        # Mostly of one: what it does on its way out may make yet another one necessary.
        assert answers <= set(spawned(daemon)) - set(before)
    assert daemon.log.count("event=stranded|event=not-accepted") == 0
    daemon.stop()


@pytest.mark.parametrize("attack", SHUT)
def test_a_listener_that_it_shuts_down_listens_again_for_its_own_generation(
    protector: Starter, attack: str
) -> None:
    daemon = protector(
        *MODE, *QUICK, "127.0.0.1:0", "--", *worker("hostile_listener", attack)
    ).ready()
    daemon.log.wait_for("event=listens-again")

    assert served(("127.0.0.1", daemon.port)) == spawned(daemon)[0]
    assert daemon.log.count("event=spawned") == 1
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0


def _between_repairs(lines: Sequence[str]) -> list[float]:
    """The seconds between two repairs of one socket; its first two repairs are immediate."""
    sockets: list[list[datetime]] = [[]]
    for line in lines:
        if "event=socket-replaced" in line:
            sockets.append([])
        elif "event=listens-again" in line:
            sockets[-1].append(datetime.fromisoformat(line.partition(" ")[0]))
    pairs = [pair for times in sockets for pair in pairwise(times[1:])]
    return [(later - one).total_seconds() for one, later in pairs]


def test_one_that_does_it_without_end_does_not_keep_the_protector_busy(protector: Starter) -> None:
    attack = worker("hostile_listener", "shuts_it_down_again_and_again")
    daemon = protector(*MODE, *QUICK, "127.0.0.1:0", "--", *attack).ready()
    daemon.log.wait_for("event=listens-again")
    before, begins = wake_ups(daemon.pid), len(daemon.log.seen)
    # A socket that fails to listen again is replaced, so the first one may have few repairs.
    while not (apart := _between_repairs(daemon.log.seen)):
        daemon.log.wait_for("event=listens-again", after=len(daemon.log.seen))
    woken = wake_ups(daemon.pid) - before

    again = [line for line in daemon.log.seen[begins:] if "event=listens-again" in line]
    assert woken <= 5 * (len(again) + 1)
    assert min(apart) > 0.09, apart
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0


@pytest.mark.parametrize("attack", SHUT)
@pytest.mark.costly
def test_a_unix_socket_that_it_shuts_down_is_bound_anew_and_another_generation_serves(
    protector: Starter, tmp_path: Path, attack: str
) -> None:
    path, release, gate = tmp_path / "s", Release(tmp_path / "daemon"), Gate(tmp_path / "gate")
    release.becomes(*worker("hostile_listener", attack, gate.path))
    daemon = protector(*MODE, *QUICK, f"unix:{path}?mode=0640", "--", release.path).ready()
    release.becomes(*GOOD)  # the same file is executed by the next one
    gate.open()
    daemon.log.wait_for("event=socket-replaced")
    daemon.log.wait_for("event=recovered generation=2")

    assert pid_in(ask(str(path))) == spawned(daemon, 2)[0]
    assert path.stat().st_mode & 0o777 == 0o640
    assert wait_gone(spawned(daemon, 1)) == []
    assert "event=resumed" in upgrade(daemon)
    daemon.reload()
    assert wait_gone(spawned(daemon, 2)) == []
    assert pid_in(ask(str(path))) == spawned(daemon, 3)[0]
    daemon.stop()
    assert not path.exists()


@pytest.mark.costly
def test_one_that_is_bound_anew_is_there_for_the_protector_that_a_guard_starts(
    protector: Starter, tmp_path: Path
) -> None:
    path, release, gate = tmp_path / "s", Release(tmp_path / "daemon"), Gate(tmp_path / "gate")
    release.becomes(*worker("hostile_listener", "shuts_it_down", gate.path))
    daemon = protector("--guard", *MODE, *QUICK, f"unix:{path}", "--", release.path).ready()
    release.becomes(*GOOD)
    gate.open()
    daemon.log.wait_for("event=recovered generation=2")
    revived(daemon, kill_protector(daemon))

    assert pid_in(ask(str(path))) == spawned(daemon, 2)[0]
    daemon.reload()
    assert wait_gone(spawned(daemon, 2)) == []
    assert pid_in(ask(str(path))) == spawned(daemon, 3)[0]
    daemon.stop()
    assert not path.exists()


@pytest.mark.costly
def test_a_release_that_shuts_a_unix_socket_down_and_hangs_is_given_up_at_once(
    protector: Starter, tmp_path: Path
) -> None:
    """All generations share it, so clients wait until another one has the socket in its place."""
    path, release, gate = (
        shared_path(tmp_path),
        Release(tmp_path / "daemon"),
        Gate(tmp_path / "gate"),
    )
    release.becomes(*GOOD)
    words = ("--start-timeout", "300s", *MODE, *QUICK, f"unix:{path}", "--", release.path)
    daemon = protector(*words).ready()
    release.becomes(*worker("breaks_its_socket", gate.path))
    daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("^waits$")
    release.becomes(*GOOD)  # the same file is executed by the next one
    gate.open()
    daemon.log.wait_for("event=reload-failed generation=2 .*listening socket")
    daemon.log.wait_for("event=recovered generation=3")

    assert pid_in(ask(str(path), timeout_s=IN_TIME_S)) == spawned(daemon, 3)[0]
    daemon.stop()


@pytest.mark.costly
def test_a_socket_that_a_failed_release_has_connected_is_bound_anew(
    protector: Starter, tmp_path: Path
) -> None:
    """It is common to all generations, and does not hang up: nothing wakes the protector."""
    release, gate = Release(tmp_path / "daemon"), Gate(tmp_path / "gate")
    release.becomes(*GOOD)
    listen = "127.0.0.1:0?defer_accept=1"
    daemon = protector(*MODE, *QUICK, listen, "--", release.path).ready()
    release.becomes(*worker("connects_its_socket", gate.path))
    daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("^waits$")
    release.becomes(*GOOD)  # the same file is executed by the next one
    gate.open()
    daemon.log.wait_for("event=reload-failed generation=2 ")

    assert served(("127.0.0.1", daemon.port)) in spawned(daemon)
    daemon.stop()


@pytest.mark.parametrize("upgraded", [False, True])
@pytest.mark.costly
def test_a_release_on_a_device_that_is_gone_fails_and_is_not_taken_for_ready(
    protector: Starter, tmp_path: Path, upgraded: bool
) -> None:
    """No client reaches it, so it cannot be asked, least of all by a program that comes later."""
    release = Release(tmp_path / "daemon")
    release.becomes(*GOOD)
    daemon = protector(*MODE, *QUICK, "127.0.0.1:0", "--", release.path).ready()
    release.becomes(*worker("breaks_its_socket", "stays"))
    daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("^waits$")
    if upgraded:
        daemon.signal(signal.SIGUSR2)
    daemon.log.wait_for("event=reload-failed generation=2 .*broke its listening socket")

    assert served(("127.0.0.1", daemon.port)) in spawned(daemon)
    daemon.stop()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "upgraded", "killed"])
@pytest.mark.costly
def test_time_alone_does_not_make_a_release_ready_whose_clients_would_have_to_sign(
    protector: Starter, tmp_path: Path, how: str
) -> None:
    """No question reaches it, and no client would; nor does one of a program that comes later."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        ignore_clients(one)  # else there is no such option
    release = Release(tmp_path / "daemon")
    release.becomes(*GOOD)
    words = ("--guard", "--handoff", "listener", *QUICK, "--start-timeout", f"{FAIR_START_S}s")
    daemon = protector(*words, "127.0.0.1:0", "--", release.path).ready()
    release.becomes(*worker("breaks_its_socket", "signed"))
    daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("^waits$")
    if how == "upgraded":
        upgrade(daemon)
    elif how == "killed":
        revived(daemon, kill_protector(daemon))
    daemon.log.wait_for("event=(reload-failed|reloaded) generation=2")

    assert daemon.log.count("event=reload-failed") == 1
    assert served(("127.0.0.1", daemon.port)) in spawned(daemon)
    daemon.stop()


@needs.ANOTHER_USER
@pytest.mark.costly
def test_releases_that_break_a_socket_which_cannot_be_bound_again_keep_no_client_out(
    command: Command,
) -> None:
    """Until there is neither a second socket nor a spare; then a supervisor has to act."""
    release = Release(command.start.folder / "daemon")
    release.becomes(*command.worker("accepts"))
    command.up("--user", A, *MODE, *QUICK, "127.0.0.1:0", "--", release.path)
    address, protector = command.start.address, command.start.pid

    def breaks(times: int) -> None:
        release.becomes(*command.worker("breaks_its_socket"))
        command.start.send(signal.SIGHUP)
        failed = "event=reload-failed"
        eventually(lambda: command.start.log.count(failed) == times, "its end")
        release.becomes(*command.worker("accepts"))

    for times, event in ((1, "drained"), (2, "socket-replaced")):
        breaks(times)
        command.start.wait_for(f"event={event}")
        assert pid_in(ask(address, timeout_s=IN_TIME_S)) == command.worker_pid_of(1)
    command.start.reload()
    command.start.wait_for("event=one-socket-left")
    command.start.wait_for("event=drained generation=1")  # until then it accepts there, too
    assert pid_in(ask(address, timeout_s=IN_TIME_S)) == command.worker_pid_of(4)
    assert "event=listener-lost" not in command.start.log

    breaks(3)
    assert wait_gone([protector]) == []
    assert "event=listener-lost" in command.start.log
    assert command.start.left() == [str(release.path)]


@pytest.fixture
def giver(marked_environment: dict[str, str]) -> Iterator[Giver]:
    made = Giver(marked_environment)
    yield made
    made.close()


@pytest.fixture
def service(tmp_path: Path, marked_environment: dict[str, str]) -> Iterator[Service]:
    made = Service(tmp_path, marked_environment)
    yield made
    made.close()


def told_and_ended(daemon: Protector, service: Service, address: str) -> None:
    """It ends as failed, so that its supervisor can act, and has logged why."""
    assert daemon.wait() == 111
    [line] = [line for line in daemon.log.seen if "event=listener-lost" in line]
    assert address in line
    eventually(lambda: service.said[-1:] == [{"EXIT_STATUS": "111"}], "its last word")
    said = [fields.get("STATUS", "") for fields in service.said]
    assert f"{address} no longer accepts connections; restart SocketProtector" in said
    assert "stopping: no listener is left" in said


@pytest.mark.costly
def test_an_abstract_socket_that_it_shuts_down_ends_the_service_as_failed(
    protector: Starter, service: Service
) -> None:
    """Its name is taken as long as any process has it: a start after that binds it again."""
    name = f"unix:@sp-test-{os.getpid()}-{time.monotonic_ns()}"
    words = (*MODE, *QUICK, name, "--")
    attack = worker("hostile_listener", "shuts_it_down")
    daemon = protector(*words, *attack, NOTIFY_SOCKET=service.address).ready()

    told_and_ended(daemon, service, name)
    again = protector(*words, *GOOD).ready()
    again.stop()


@pytest.mark.parametrize("mode", ["listener", "connection"])
def test_a_passed_unix_socket_that_is_shut_down_ends_the_service_as_failed(
    giver: Giver, service: Service, tmp_path: Path, mode: str
) -> None:
    path = giver.unix("local", tmp_path / "socket")
    server = worker("hostile_listener", "shuts_it_down") if mode == "listener" else worker("many")
    words = ("--handoff", mode, *QUICK, f"unix:{path}", "--", *server)
    giver.environment["NOTIFY_SOCKET"] = service.address
    daemon = giver.start(*words).ready()
    if mode == "connection":
        giver.given[0][1].shutdown(socket.SHUT_RDWR)

    told_and_ended(daemon, service, f"unix:{path}")


@pytest.mark.parametrize("mode", ["listener", "connection"])
def test_a_passed_tcp_socket_that_is_shut_down_listens_again(giver: Giver, mode: str) -> None:
    port = giver.tcp("web", bound_by_number=True)
    server = worker("hostile_listener", "shuts_it_down") if mode == "listener" else worker("many")
    daemon = giver.start("--handoff", mode, *QUICK, "fd:web", "--", *server).ready()
    if mode == "connection":
        giver.given[0][1].shutdown(socket.SHUT_RDWR)
    daemon.log.wait_for("event=listens-again")

    assert served(("127.0.0.1", port)) == spawned(daemon)[0]
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0


def test_the_service_goes_on_by_its_other_listeners(
    protector: Starter, tmp_path: Path, service: Service
) -> None:
    """The first one is shut down, and cannot be had anew; the second one is another's, too."""
    name = f"unix:@sp-test-{os.getpid()}-{time.monotonic_ns()}"
    attack = worker("hostile_listener", "shuts_it_down")
    daemon = protector(
        *(*MODE, *QUICK, name, "127.0.0.1:0", "--", *attack), NOTIFY_SOCKET=service.address
    ).ready()
    daemon.log.wait_for("event=listener-lost")
    eventually(lambda: any(name in each.get("STATUS", "") for each in service.said), "its word")

    daemon.reload()
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0
