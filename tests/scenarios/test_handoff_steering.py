"""`--handoff listener`: of two generations each has a socket of its own for each address.

A worker that is stopped (SIGSTOP) stands for one that has not come to accept yet.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.procfs import listening, state_of
from tests.rounds import rounds
from tests.running import FAIR_START_S, Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import at_rest, kill_protector, revived, upgrade
from tests.scenarios.starting import Start
from tests.scenarios.tools import Gate, Release, pid_in, spawned, worker

Starter = Callable[..., Protector]
MODE = ("--handoff", "listener", "--ready", "notify")
SERVER = worker("accepts")


@pytest.fixture
def served_by(protector: Starter) -> Callable[..., Protector]:
    """Start one that serves: served_by(*options, command=..., listen=...)."""

    def start(
        *options: str | Path, command: tuple[str, ...] = SERVER, listen: str = "127.0.0.1:0"
    ) -> Protector:
        return protector(*MODE, *options, listen, "--", *command).ready()

    return start


def here(daemon: Protector) -> tuple[str, int]:
    return "127.0.0.1", daemon.port


def stopped(pid: int) -> None:
    """Have a process stand still."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state_of(pid) == "T", "a process that stands still")


@contextmanager
def waiting(daemon: Protector, count: int) -> Iterator[list[Client]]:
    """Clients that have connected and asked."""
    clients = [Client(here(daemon), f"hello {n}") for n in range(count)]
    try:
        yield clients
    finally:
        for each in clients:
            each.close()


def answered(clients: list[Client]) -> set[int]:
    """Who has answered them; each one gets its own answer."""
    heard = [client.hear() for client in clients]
    assert [each.partition(" ")[2] for each in heard] == [f"hello {n}" for n in range(len(heard))]
    return {pid_in(each) for each in heard}


def test_clients_that_connect_after_a_reload_get_to_the_new_one_alone(served_by: Starter) -> None:
    daemon = served_by(listen="0")

    asks = rounds(10, 30)
    for generation in range(2, rounds(4, 6)):
        daemon.reload()
        new = spawned(daemon, generation)[-1]
        if generation > 2:  # its socket was theirs, who may accept for a moment after their signal
            daemon.log.wait_for(f"event=drained generation={generation - 2}")
        assert {pid_in(ask(here(daemon))) for _ in range(asks)} == {new}
        assert {pid_in(ask(("::1", daemon.port))) for _ in range(asks)} == {new}


def test_clients_that_connected_before_are_served_by_the_old_one(served_by: Starter) -> None:
    daemon = served_by()
    old = spawned(daemon, 1)[0]
    stopped(old)
    with waiting(daemon, 20) as clients:
        daemon.reload()
        new = spawned(daemon, 2)[0]
        assert {pid_in(ask(here(daemon))) for _ in range(30)} == {new}

        os.kill(old, signal.SIGCONT)
        assert answered(clients) == {old}

    assert wait_gone([old]) == []
    assert daemon.log.count("event=stranded|event=not-accepted") == 0


#: A server that ends at once when it is told to, with all that it has not answered.  Each second
#: connection, from the first on, it reads when the test opens the FIFO, if it is given one.
DROPS = (
    "import itertools, os, signal, socket, sys, threading\n"
    "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n"
    "def serve(client, number):\n"
    "    if sys.argv[1:] and number % 2:\n"
    "        open(sys.argv[1]).close()\n"
    "    line = client.recv(100)\n"
    "    client.sendall(b'[%d] ' % os.getpid() + line)\n"
    "    client.close()\n"
    "with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:\n"
    "    notify.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'].replace('@', '\\0', 1))\n"
    "listener = socket.socket(fileno=3)\n"
    "for number in itertools.count(1):\n"
    "    serving = listener.accept()[0], number\n"
    "    threading.Thread(target=serve, args=serving, daemon=True).start()\n"
)


@pytest.mark.costly
def test_a_connection_that_was_accepted_has_time_to_say_what_it_wants(served_by: Starter) -> None:
    daemon, other = served_by(command=(sys.executable, "-c", DROPS)), served_by()
    old, soon_gone = spawned(daemon)[0], spawned(other)[0]
    with Client(here(daemon)) as client:
        assert pid_in(ask(here(daemon))) == old  # so it has accepted the one before

        daemon.reload()
        other.reload()
        assert wait_gone([soon_gone]) == []  # no client has come to that one

        assert pid_in(client.ask()) == old


@pytest.mark.costly
def test_what_was_accepted_is_read_before_the_old_one_is_told_to_finish(
    served_by: Starter, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    daemon = served_by(command=(sys.executable, "-c", DROPS, str(gate.path)))
    other = served_by()
    old, soon_gone = spawned(daemon)[0], spawned(other)[0]
    with Client(here(daemon), "hello") as client:
        assert pid_in(ask(here(daemon))) == old

        daemon.reload()
        other.reload()
        assert wait_gone([soon_gone]) == []
        gate.open()

        assert pid_in(client.hear()) == old


@pytest.mark.costly
def test_a_reload_meanwhile_waits_for_the_old_one_s_socket(served_by: Starter) -> None:
    daemon = served_by()
    old = spawned(daemon)[0]
    stopped(old)
    with waiting(daemon, 5) as clients:
        daemon.reload()
        mark = daemon.signal(signal.SIGHUP)
        daemon.log.wait_for("event=reloading", after=mark)
        assert daemon.log.count("event=spawned generation=3") == 0

        os.kill(old, signal.SIGCONT)
        assert answered(clients) == {old}
    daemon.log.wait_for("event=reloaded generation=3", after=mark)

    assert pid_in(ask(here(daemon))) == spawned(daemon, 3)[0]


def test_what_an_old_one_leaves_that_was_killed_is_served_by_another(served_by: Starter) -> None:
    daemon = served_by()
    old = spawned(daemon)[0]
    stopped(old)
    with waiting(daemon, 20) as clients:
        daemon.reload()
        os.kill(old, signal.SIGKILL)

        assert answered(clients) == {spawned(daemon, 3)[0]}

    assert daemon.log.count("event=stranded") == 1
    daemon.log.wait_for("event=recovered generation=3")
    assert wait_gone(spawned(daemon, 2)) == []
    assert pid_in(ask(here(daemon))) == spawned(daemon, 3)[0]


@pytest.mark.costly
def test_that_one_is_of_the_same_version_not_of_a_newer_one(
    served_by: Starter, tmp_path: Path
) -> None:
    variables = tmp_path / "variables"
    variables.write_text("VERSION=good\n")
    daemon = served_by("--env-file", variables)
    old = spawned(daemon)[0]
    stopped(old)
    with waiting(daemon, 3) as clients:
        daemon.reload()
        variables.write_text("VERSION=not asked for yet\n")
        os.kill(old, signal.SIGKILL)
        assert answered(clients) == {spawned(daemon, 3)[0]}
    daemon.log.wait_for("event=recovered generation=3")

    assert ask(here(daemon), "env VERSION") == "good"


@pytest.mark.slow
def test_one_that_never_accepts_is_told_to_finish_and_others_serve_waiting_clients(
    served_by: Starter,
) -> None:
    daemon = served_by()
    old = spawned(daemon)[0]
    stopped(old)
    with waiting(daemon, 20) as clients:
        mark = daemon.signal(signal.SIGHUP)
        daemon.log.wait_for("event=not-accepted generation=1", after=mark)
        daemon.log.wait_for("event=signalled worker=1 signal=TERM", after=mark)
        daemon.log.wait_for("event=stranded", after=mark)

        assert answered(clients) == {spawned(daemon, 3)[0]}
    os.kill(old, signal.SIGCONT)

    assert wait_gone([old]) == []


@pytest.mark.costly
def test_clients_of_one_that_is_rolled_back_are_served(served_by: Starter, tmp_path: Path) -> None:
    release = Release(tmp_path / "server")
    release.becomes(*SERVER)
    daemon = served_by("--settle", "1h", command=(str(release.path),))
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    new = spawned(daemon, 2)[0]
    stopped(new)
    with waiting(daemon, 20) as clients:
        os.kill(new, signal.SIGKILL)
        daemon.log.wait_for("event=reload-failed generation=2", after=mark)
        # Generation 1, or by now the one that is started for clients of generation 2.
        assert pid_in(ask(here(daemon))) != new

        assert answered(clients) == {spawned(daemon, 3)[0]}


def test_one_that_is_rolled_back_serves_its_clients(served_by: Starter, tmp_path: Path) -> None:
    daemon = served_by("--settle", "1h", "--workers", "2")
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    one, other = spawned(daemon, 2)
    stopped(one)
    stopped(other)
    with waiting(daemon, 20) as clients:
        os.kill(one, signal.SIGKILL)
        daemon.log.wait_for("event=reload-failed generation=2", after=mark)
        os.kill(other, signal.SIGCONT)

        assert answered(clients) == {other}

    assert wait_gone([other]) == []


@pytest.mark.costly
def test_a_release_that_never_serves_gets_no_client(served_by: Starter, tmp_path: Path) -> None:
    """It accepts from the moment at which it runs, but no client is sent there."""
    release = Release(tmp_path / "server")
    release.becomes(*SERVER)
    daemon = served_by("--start-timeout", f"{FAIR_START_S}s", command=(str(release.path),))
    release.becomes(*SERVER, "--ready", "never")
    mark = daemon.signal(signal.SIGHUP)
    spawned(daemon, 2)
    pids = set()
    # Within that time, so that asking does not take a whole processor.
    while not daemon.log.look_for("event=reload-failed", after=mark, within_s=0.01):
        pids.add(pid_in(ask(here(daemon))))

    assert pids == {spawned(daemon, 1)[0]}
    release.becomes(*SERVER)
    daemon.reload()
    assert pid_in(ask(here(daemon))) == spawned(daemon, 3)[0]


@pytest.mark.parametrize("how", ["kill", "upgrade"])
@pytest.mark.costly
def test_another_protector_resumes_with_one_that_quiesces(protector: Starter, how: str) -> None:
    guard = ("--guard",) if how == "kill" else ()
    daemon = protector(*guard, *MODE, "127.0.0.1:0", "--", *SERVER).ready()
    old = spawned(daemon)[0]
    stopped(old)
    with waiting(daemon, 20) as clients:
        daemon.reload()
        if how == "kill":
            revived(daemon, kill_protector(daemon))
        else:
            upgrade(daemon)
        new = spawned(daemon, 2)[0]
        assert {pid_in(ask(here(daemon))) for _ in range(30)} == {new}

        os.kill(old, signal.SIGCONT)
        assert answered(clients) == {old}

    assert wait_gone([old]) == []
    daemon.stop()


@pytest.mark.costly
def test_clients_of_a_listener_that_a_reload_adds_get_to_the_first_that_knows_it(
    protector: Starter, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Also when the protector is replaced meanwhile."""
    gate, config, port = Gate(tmp_path / "gate"), tmp_path / "web.toml", free_port()

    def write(listen: str, command: tuple[str, ...]) -> None:
        words = ", ".join(f"'{word}'" for word in command)
        new = tmp_path / "new"
        new.write_text(
            f'handoff = "listener"\nready = "notify"\nlisten = [{listen}]\ncommand = [{words}]\n'
        )
        new.rename(config)

    write('"127.0.0.1:0"', SERVER)
    daemon = protector("--config", config).ready()
    write(f'"127.0.0.1:0", "127.0.0.1:{port}"', (*SERVER, "--gate", str(gate.path)))
    mark = daemon.signal(signal.SIGHUP)
    new = spawned(daemon, 2)[0]
    with Client(("127.0.0.1", port), "hello") as early:
        assert "resumed" in upgrade(daemon)
        at_rest(daemon)
        with Client(("127.0.0.1", port), "hello") as late:
            gate.open()
            assert [pid_in(each.hear()) for each in (early, late)] == [new, new]
    daemon.log.wait_for("event=reloaded", after=mark)
    assert pid_in(ask(("127.0.0.1", port))) == new
    assert wait_gone(spawned(daemon, 1)) == []
    assert daemon.log.count("event=stranded|event=not-accepted") == 0


@pytest.mark.costly
def test_each_client_that_connects_to_a_listener_before_it_is_removed_is_served(
    protector: Starter, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    config, port = tmp_path / "web.toml", free_port()
    command = ", ".join(f"'{word}'" for word in SERVER)

    def write(listen: str) -> None:
        new = tmp_path / "new"
        new.write_text(
            f'handoff = "listener"\nready = "notify"\nsettle = "1s"\nlisten = [{listen}]\n'
            f"command = [{command}]\n"
        )
        new.rename(config)

    write(f'"127.0.0.1:0", "127.0.0.1:{port}"')
    daemon = protector("--config", config).ready()
    (old,) = spawned(daemon, 1)
    write('"127.0.0.1:0"')
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    served = 0
    while True:
        try:
            client = Client(("127.0.0.1", port), "hello")
        except ConnectionRefusedError:
            break
        with client:
            assert pid_in(client.hear()) == old
        served += 1
    assert served
    daemon.log.wait_for("event=reloaded", after=mark)


@pytest.mark.costly
def test_clients_of_a_listener_that_a_reload_removes_stay_with_the_generation_that_knows_it(
    protector: Starter, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """While the new one settles, also over an upgrade; it is asked at a listener that it knows."""
    config, port, kept = tmp_path / "web.toml", free_port(), free_port()
    command = ", ".join(f"'{word}'" for word in SERVER)

    def write(listen: str) -> None:
        new = tmp_path / "new"
        new.write_text(
            f'handoff = "listener"\nready = "accept"\nsettle = "1h"\nlisten = [{listen}]\n'
            f"command = [{command}]\n"
        )
        new.rename(config)

    def by_old(clients: int = 3) -> bool:
        found = [Client(("127.0.0.1", port), "hello") for _ in range(clients)]
        pids = {pid_in(each.hear()) for each in found}
        for each in found:
            each.close()
        return pids == {old}

    write(f'"127.0.0.1:{port}", "127.0.0.1:{kept}"')
    daemon = protector("--config", config).ready()
    (old,) = spawned(daemon, 1)
    write(f'"127.0.0.1:{kept}"')
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    (new,) = spawned(daemon, 2)

    assert by_old()
    assert pid_in(ask(("127.0.0.1", kept))) == new
    assert "resumed" in upgrade(daemon)
    at_rest(daemon)
    assert by_old()
    assert pid_in(ask(("127.0.0.1", kept))) == new
    os.kill(new, signal.SIGKILL)
    daemon.log.wait_for("event=reload-failed", after=mark)
    assert by_old()
    assert pid_in(ask(("127.0.0.1", kept))) == old
    assert daemon.log.count("event=stranded|event=not-accepted") == 0


def test_a_stop_meanwhile_serves_clients_that_wait_for_either(served_by: Starter) -> None:
    daemon = served_by()
    old = spawned(daemon)[0]
    stopped(old)
    with waiting(daemon, 20) as before:
        daemon.reload()
        new = spawned(daemon, 2)[0]
        stopped(new)
        with waiting(daemon, 20) as after:
            mark = daemon.signal(signal.SIGTERM)
            daemon.log.wait_for("event=stopping", after=mark)
            os.kill(new, signal.SIGCONT)
            os.kill(old, signal.SIGCONT)

            assert answered(before) == {old}
            assert answered(after) == {new}

    assert daemon.wait() == 0


@pytest.mark.costly
def test_under_stop_first_the_next_one_serves_waiting_clients(served_by: Starter) -> None:
    daemon = served_by("--reload-order", "stop-first")

    for generation in (2, 3):
        daemon.reload()
        assert pid_in(ask(here(daemon))) == spawned(daemon, generation)[0]


@pytest.mark.costly
def test_a_port_that_is_taken_is_refused_as_ever(served_by: Starter, start: Start) -> None:
    daemon = served_by()
    assert listening(daemon.port) == 2

    ended = start(*MODE, "--check", f"127.0.0.1:{daemon.port}", "--", *SERVER)

    assert ended.status == 111
    assert f"cannot listen on 127.0.0.1:{daemon.port}" in ended.err
