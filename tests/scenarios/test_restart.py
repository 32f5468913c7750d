"""`systemctl restart` refuses no client: listeners stay in systemd's store over a stop in order.

systemd's part is played by the test (test_store.py); with the real one: `make test-vm`.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.load import Load, Snapshot
from tests.procfs import listening
from tests.rounds import rounds
from tests.running import DEADLINE_S, Address, Client, ask, eventually
from tests.scenarios.adopting import at_rest
from tests.scenarios.managers import MANY, OWN, Service, of_generation, wait_stored
from tests.scenarios.operating import Line
from tests.scenarios.tools import EITHER_HANDOFF, hold, pid_in, spawned, worker

ROUNDS = rounds(3, 100)
LISTENER = ("--handoff", "listener", "--ready", "notify")
ACCEPTS = worker("accepts")


@pytest.fixture
def service(tmp_path: Path, marked_environment: dict[str, str]) -> Iterator[Service]:
    made = Service(tmp_path, {**marked_environment, "INVOCATION_ID": "of a unit"})
    yield made
    made.close()


def words_of(handoff: str, *listens: str | Path) -> tuple[str | Path, ...]:
    """The same daemon either way."""
    if handoff == "listener":
        return (*LISTENER, *listens, "--", *ACCEPTS)
    return (*listens, "--", *MANY)


def serves(service: Service) -> None:
    service.wait_for("READY")


def refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def fill(sock: socket.socket, address: str) -> None:
    """Send there until not one message more has room."""
    try:
        while True:
            sock.sendto(b"X_FULL=1", address)
    except BlockingIOError:
        pass


def _more_than(count: int, now: Snapshot) -> bool:
    return now.connections > count


@pytest.mark.costly
@EITHER_HANDOFF
def test_restarts_under_load_refuse_and_reset_no_client(
    service: Service, handoff: str, free_port: Callable[[], int]
) -> None:
    port = free_port()
    words = words_of(handoff, f"127.0.0.1:{port}")
    service.start(*words)
    serves(service)
    with Load(f"127.0.0.1:{port}", concurrency=4, timeout_s=4 * DEADLINE_S) as load:
        for _ in range(ROUNDS):
            finished = load.snapshot().connections
            load.wait_for(partial(_more_than, finished + 5), 4 * DEADLINE_S)
            service.restart(*words)
            serves(service)
    seen = load.snapshot()
    service.stop()

    print(f"{seen.connections} connections over {len(service.started) - 1} restarts")
    assert seen.failures == ()
    assert refused(port)
    assert not service.store


def test_clients_from_before_the_stop_are_served_by_the_old_and_later_ones_by_the_next(
    service: Service, free_port: Callable[[], int]
) -> None:
    port = free_port()
    words = words_of("connection", f"127.0.0.1:{port}")
    first = service.start(*words)
    serves(service)
    [old] = spawned(first)
    hold(old)  # so that clients that connect now are still in the queue at the stop
    before = [Client(("127.0.0.1", port), f"before {number}") for number in range(3)]
    first.signal(signal.SIGTERM)
    eventually(
        lambda: "sp.channel.1.write" not in service.store, "that no client is accepted any more"
    )
    later = [Client(("127.0.0.1", port), f"later {number}") for number in range(3)]
    os.kill(old, signal.SIGCONT)

    for number, client in enumerate(before):
        assert client.hear() == f"[{old}] before {number}"
        client.close()
    assert first.wait() == 0
    service.said.clear()
    second = service.start(*words)
    serves(service)
    [new] = spawned(second)
    for number, client in enumerate(later):
        assert client.hear() == f"[{new}] later {number}"
        client.close()
    service.stop()


@pytest.mark.costly
def test_a_stop_leaves_the_listeners_alone_and_a_start_says_nothing_of_them(
    service: Service, free_port: Callable[[], int]
) -> None:
    words = words_of("connection", f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
    first = service.start(*words)
    serves(service)
    first.stop()
    wait_stored(service, {"sp.listener.0", "sp.listener.1"})
    second = service.start(*words)
    serves(service)
    wait_stored(service, OWN | {"sp.listener.1"} | of_generation(1, 1))
    assert second.log.count("event=resumed|event=notice") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.costly
def test_a_quick_stop_leaves_them_too(
    service: Service, free_port: Callable[[], int], number: signal.Signals
) -> None:
    port = free_port()
    words = words_of("connection", f"127.0.0.1:{port}")
    first = service.start(*words)
    serves(service)
    with Client(("127.0.0.1", port)) as held:
        held.ask()
        first.signal(number)
        service.wait_for("STOPPING")
        # Before that it accepts those that have connected.
        eventually(lambda: "sp.channel.1.write" not in service.store, "the end of accepting")
        later = Client(("127.0.0.1", port), "later")
        if number is signal.SIGTERM:
            first.signal(number)  # the second one is a quick one
        assert first.wait() == 0
    wait_stored(service, {"sp.listener.0"})
    second = service.start(*words)
    with later:
        assert pid_in(later.hear()) == spawned(second)[0]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.costly
def test_clients_that_a_quick_stop_cuts_off_are_counted_and_later_ones_wait(
    service: Service, free_port: Callable[[], int], tmp_path: Path, kind: str
) -> None:
    path, gate = tmp_path / "socket", tmp_path / "gate"
    os.mkfifo(gate)
    to: Address = ("127.0.0.1", free_port()) if kind == "tcp" else str(path)
    words = words_of("listener", f"127.0.0.1:{to[1]}" if kind == "tcp" else f"unix:{path}")
    first = service.start(*words)
    serves(service)
    with Client(to, f"wait {gate}") as held:
        writes = os.open(gate, os.O_WRONLY)  # waits until the worker has accepted
        early = [Client(to, f"early {number}") for number in range(2)]
        first.log.wait_for("event=stopping", after=first.signal(signal.SIGTERM))
        at_rest(first)  # from now on, clients come to the other socket
        late = Client(to, "late")
        mark = first.signal(signal.SIGTERM)
        first.log.wait_for("event=signalled worker=1", after=mark)
        os.close(writes)
        assert held.hear()
    assert first.wait() == 0
    for each in early:
        with each, pytest.raises(ConnectionResetError):
            each.hear()
    assert first.log.count(f"event=clients-lost address={kind}:.* lost=2") == 1
    service.start(*words)
    with late:
        assert late.hear().endswith(" late")


@EITHER_HANDOFF
@pytest.mark.costly
def test_what_is_no_longer_wanted_is_free_and_what_is_has_the_place_of_its_argument(
    service: Service, handoff: str, free_port: Callable[[], int]
) -> None:
    one, two, three = free_port(), free_port(), free_port()
    service.start(*words_of(handoff, f"127.0.0.1:{one}", f"127.0.0.1:{two}"))
    serves(service)
    service.main.stop()
    with Client(("127.0.0.1", two), "two") as waiting:
        words = words_of(handoff, f"127.0.0.1:{two}", f"127.0.0.1:{three}")
        second = service.start(*words)
        serves(service)
        [worker_pid] = spawned(second)
        assert waiting.hear() == f"[{worker_pid}] two"
    assert refused(one)
    assert pid_in(ask(("127.0.0.1", three))) == worker_pid

    service.kill()  # the store has them under the names that go with the state
    third = service.start(*words)
    third.log.wait_for("event=resumed")
    for port in (two, three):
        assert pid_in(ask(("127.0.0.1", port))) == worker_pid
    service.stop()
    assert [refused(port) for port in (one, two, three)] == [True] * 3


@pytest.mark.costly
def test_the_way_in_which_connections_are_handed_over_may_change(
    service: Service, free_port: Callable[[], int]
) -> None:
    port = free_port()
    service.start(*words_of("connection", f"127.0.0.1:{port}"))
    serves(service)
    for handoff in ("listener", "connection"):
        service.main.stop()
        with Client(("127.0.0.1", port), "waits") as waiting:
            service.start(*words_of(handoff, f"127.0.0.1:{port}"))
            assert pid_in(waiting.hear()) == spawned(service.main, 1)[0]
        serves(service)
        service.main.reload()
        assert pid_in(ask(("127.0.0.1", port))) == spawned(service.main, 2)[0]
        assert listening(port) == (2 if handoff == "listener" else 1)
    service.stop()
    assert refused(port)


def settings_of(pid: int) -> bytes:
    """The settings that a protector has written down for the next one."""
    files = Path(f"/proc/{pid}/fd").iterdir()
    return next(each.read_bytes() for each in files if "sp.settings" in os.readlink(each))


@pytest.mark.costly
@EITHER_HANDOFF
def test_a_path_keeps_its_file_and_clients_that_connect_meanwhile_wait(
    service: Service, handoff: str, tmp_path: Path
) -> None:
    path, control = tmp_path / "socket", tmp_path / "control"
    service.start("--control", control, *words_of(handoff, f"unix:{path}?mode=600"))
    serves(service)
    with Line(control) as line:
        line.ask("hold", seconds=3600)  # it leads to a third socket, which the next start then gets
    service.main.stop()
    found = path.stat()
    with Client(str(path), "waits") as waiting:
        service.start(*words_of(handoff, f"unix:{path}?mode=640"))
        assert pid_in(waiting.hear()) == spawned(service.main, 1)[0]
    serves(service)
    # By that an older program, which knows one socket for a path, refuses to go on.
    assert (b'"beside"' in settings_of(service.main.pid)) is (handoff == "listener")
    assert path.stat().st_ino == found.st_ino
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    service.stop()
    with pytest.raises(ConnectionRefusedError):
        ask(str(path))
    service.start(*words_of(handoff, f"unix:{path}"))  # no process listens there: it is replaced
    serves(service)
    assert pid_in(ask(str(path))) == spawned(service.main)[0]


@pytest.mark.costly
def test_settings_are_those_of_the_new_start(
    service: Service, free_port: Callable[[], int]
) -> None:
    port = free_port()
    words = (f"127.0.0.1:{port}", "--", *MANY)
    service.start("--name", "one", "--workers", "1", *words)
    serves(service)
    service.restart("--name", "two", "--workers", "2", *words)
    serves(service)
    assert "name=two" in service.main.log.wait_for("event=start")
    assert len(spawned(service.main)) == 2


def test_one_that_is_killed_is_gone_on_with_and_not_started_afresh(
    service: Service, free_port: Callable[[], int]
) -> None:
    """What a kill leaves and what a stop leaves are told apart by the settings in the store."""
    port = free_port()
    words = words_of("connection", f"127.0.0.1:{port}")
    first = service.start(*words)
    serves(service)
    wait_stored(service, OWN | of_generation(1, 1))
    service.kill()
    second = service.start("--workers", "3", *words)
    second.log.wait_for("event=resumed")
    assert pid_in(ask(("127.0.0.1", port))) == spawned(first)[0]
    third = service.restart("--workers", "3", *words)
    serves(service)
    assert len(spawned(third)) == 3


@pytest.mark.parametrize("words_left", [4, 100])
@pytest.mark.costly
def test_one_that_is_killed_amid_its_last_words_has_left_its_listeners(
    service: Service, tmp_path: Path, free_port: Callable[[], int], words_left: int
) -> None:
    port = free_port()
    words = words_of("connection", f"127.0.0.1:{port}")
    service.start(*words)
    serves(service)
    wait_stored(service, OWN | of_generation(1, 1))
    os.link(service.pid_file, tmp_path / "kept")
    before = {name: os.dup(fd) for name, fd in service.store.items()}
    service.main.stop()
    service.hear()
    # As if it had come no further: some of what it had removed is there still.
    said = [each["FDNAME"] for each in service.said if "FDSTOREREMOVE" in each]
    last = said[said.index("sp.settings") + 1 :]
    assert {"sp.state", "sp.pidfile"} <= set(last), "it is known at once that none is to resume"
    unsaid = last[-words_left:]
    for name, fd in before.items():
        if name in unsaid:
            service.store[name] = fd
        else:
            os.close(fd)
    if words_left > len(last):  # then it has not come to the removal of its pid file
        (tmp_path / "kept").rename(service.pid_file)
    with Client(("127.0.0.1", port), "waits") as waiting:
        second = service.start(*words)
        assert pid_in(waiting.hear()) == spawned(second)[0]
    serves(service)
    wait_stored(service, OWN | of_generation(1, 1))
    assert second.log.count("event=resumed") == 0


@pytest.mark.costly
def test_one_whose_last_words_are_not_read_in_time_has_left_its_listeners(
    service: Service, free_port: Callable[[], int]
) -> None:
    port = free_port()
    words = words_of("connection", f"127.0.0.1:{port}")
    first = service.start(*words)
    serves(service)
    wait_stored(service, OWN | of_generation(1, 1))
    with service.lock, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        fill(other, service.address)
        first.stop()
    service.hear()
    assert "sp.settings" in service.store, "what was said at the end was heard"
    with Client(("127.0.0.1", port), "waits") as waiting:
        second = service.start(*words)
        assert pid_in(waiting.hear()) == spawned(second)[0]
    serves(service)
    wait_stored(service, OWN | of_generation(1, 1))
    assert second.log.count("event=resumed") == 0
    service.stop()


@pytest.mark.costly
def test_a_stop_that_is_killed_midway_is_gone_on_with_and_leaves_them(
    service: Service, free_port: Callable[[], int]
) -> None:
    port = free_port()
    words = words_of("connection", f"127.0.0.1:{port}")
    first = service.start(*words)
    serves(service)
    with Client(("127.0.0.1", port)) as held:
        held.ask()
        first.signal(signal.SIGTERM)
        service.wait_for("STOPPING")
        # Before that it accepts those that have connected; and so does one that resumes the stop.
        eventually(lambda: "sp.channel.1.write" not in service.store, "the end of accepting")
        later = Client(("127.0.0.1", port), "later")
        service.kill()
        second = service.start(*words)
        second.log.wait_for("event=resumed")
        held.ask()
    assert second.wait() == 0
    wait_stored(service, {"sp.listener.0"})
    # After READY=1, systemd would take the exit for the end of the service, and start nothing.
    said = {name for each in service.said for name in each}
    assert "STOPPING" in said
    assert "READY" not in said
    third = service.start(*words)
    with later:
        assert pid_in(later.hear()) == spawned(third)[0]


@pytest.mark.costly
def test_a_start_that_fails_leaves_them_to_the_next_try(
    service: Service, free_port: Callable[[], int]
) -> None:
    """systemd keeps them as long as it tries again, and drops them when it gives up."""
    port = free_port()
    words = words_of("connection", f"127.0.0.1:{port}")
    service.start(*words)
    serves(service)
    service.main.stop()
    with Client(("127.0.0.1", port), "waits") as waiting:
        for status, start in (
            (2, ("--no-such-option", *words)),
            (3, ("--start-tries", "1", f"127.0.0.1:{port}", "--", "/bin/false")),
        ):
            assert service.start(*start).wait() == status
            wait_stored(service, {"sp.listener.0"})
        last = service.start(*words)
        assert pid_in(waiting.hear()) == spawned(last)[0]


@pytest.mark.costly
def test_a_socket_that_systemd_passes_itself_is_not_left_beside(
    service: Service, free_port: Callable[[], int]
) -> None:
    port = free_port()
    with socket.socket() as passed:
        passed.bind(("127.0.0.1", 0))
        passed.listen()
        service.sockets["web"] = os.dup(passed.fileno())
        words = words_of("connection", "fd:web", f"127.0.0.1:{port}")
        service.start(*words)
        serves(service)
        service.main.stop()
        wait_stored(service, {"sp.listener.1"})
        with (
            Client(passed.getsockname(), "web") as one,
            Client(("127.0.0.1", port), "own") as other,
        ):
            service.start(*words)
            assert pid_in(one.hear()) == pid_in(other.hear()) == spawned(service.main)[0]
        service.stop()
        assert passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@pytest.mark.costly
def test_a_manager_that_keeps_nothing_over_a_stop_is_not_relied_on(
    service: Service, free_port: Callable[[], int]
) -> None:
    """Others than systemd listen to sd_notify(), too; and a store can be full."""
    port = free_port()
    words = words_of("connection", f"127.0.0.1:{port}")
    for environment in ({"INVOCATION_ID": ""}, {"FDSTORE": "0"}):
        before = dict(service.environment)
        service.environment.update(environment)
        first = service.start(*words)
        serves(service)
        with Client(("127.0.0.1", port)) as held:
            held.ask()
            first.signal(signal.SIGTERM)
            service.wait_for("STOPPING")
            eventually(lambda: refused(port), "no new client is let in")
            held.ask()
        assert first.wait() == 0
        wait_stored(service, set())
        service.environment = before


def test_under_a_guard_the_port_is_free_after_a_stop(
    service: Service, free_port: Callable[[], int]
) -> None:
    port = free_port()
    service.start("--guard", *words_of("connection", f"127.0.0.1:{port}"))
    serves(service)
    service.main.stop()
    assert refused(port)
    wait_stored(service, set())
