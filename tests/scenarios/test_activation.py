"""Socket activation: listening sockets that another process has opened and goes on with."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from socketprotector.system import reuseport
from tests import needs
from tests.namespaces import socket_elsewhere
from tests.procfs import descriptors, environment_of, listening
from tests.rounds import rounds
from tests.running import DEADLINE_S, Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import upgrade
from tests.scenarios.managers import Giver
from tests.scenarios.tools import pid_in, spawned, worker
from tests.steady import Steady

MANY = worker("many")


def steady(port: int, pause_s: float = 0.0) -> Steady:
    """Clients that come faster than any pause that is waited for, without one of their own."""

    def hello() -> None:
        reply = ask(("127.0.0.1", port))
        assert reply.endswith("hello"), reply

    return Steady(hello, pause_s)


def served(clients: Steady, more: int) -> None:
    """Wait until so many more have been answered."""
    count = clients.answered + more
    eventually(lambda: clients.answered >= count or bool(clients.failures), "more answers")


@pytest.fixture
def giver(marked_environment: dict[str, str]) -> Iterator[Giver]:
    made = Giver(marked_environment)
    yield made
    made.close()


def still_listens(giver: Giver) -> bool:
    return all(
        each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1 for _, each in giver.given
    )


def test_a_socket_is_taken_by_its_name_and_listens_on_after_our_stop(giver: Giver) -> None:
    port, other = giver.tcp("web"), giver.tcp("the other")
    giver.tcp("twice")
    twice = giver.tcp("twice")
    daemon = giver.start("fd:web", "--", *MANY).ready()

    assert daemon.addresses == [f"tcp:127.0.0.1:{port}"]
    said = f"no worker gets clients of tcp:127.0.0.1:{other}, a passed socket: add 'fd:the other'"
    assert said in daemon.log.text()
    assert f"{twice}, a passed socket: add its address to LISTEN" in daemon.log.text()
    assert pid_in(ask(("127.0.0.1", port))) == spawned(daemon)[0]
    daemon.stop()

    assert still_listens(giver)
    with Client(("127.0.0.1", port), "for the next one") as waiting:
        second = giver.start("fd:web", "--", *MANY).ready()
        assert waiting.hear().endswith("for the next one")
    second.stop()


@pytest.mark.parametrize("mode", ["connection", "listener"])
@pytest.mark.costly
def test_a_stop_under_steady_load_does_not_wait_for_an_end_of_clients(
    giver: Giver, mode: str
) -> None:
    """The listener is another process's, which may be waiting for the clients that come then."""
    port = giver.tcp("web")
    words = ("--handoff", mode, "--ready", "notify", "--stop-timeout", "1h", "fd:web", "--")
    server = MANY if mode == "connection" else worker("accepts")
    daemon = giver.start(*words, *server).ready()

    with steady(port) as clients:
        served(clients, 50)
        daemon.stop()
        assert still_listens(giver)
        second = giver.start(*words, *server).ready()
        served(clients, 50)  # those among them that have waited meanwhile
    second.stop()

    assert daemon.log.count("signal=KILL") == 0
    assert clients.failures == []


@pytest.mark.costly
def test_a_quick_stop_does_not_shut_it_down_either(giver: Giver) -> None:
    giver.tcp("web")
    daemon = giver.start("fd:web", "--", *MANY).ready()
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0
    assert still_listens(giver)


def test_a_socket_is_taken_because_it_has_the_address(giver: Giver) -> None:
    port = giver.tcp("whatever")
    daemon = giver.start(f"127.0.0.1:{port}", "--", *MANY).ready()

    assert pid_in(ask(("127.0.0.1", port))) == spawned(daemon)[0]
    daemon.stop()
    assert still_listens(giver)


@pytest.mark.costly
def test_a_socket_of_both_families_is_what_a_port_alone_means(giver: Giver) -> None:
    port = giver.tcp("both", socket.AF_INET6, both=True)
    daemon = giver.start(str(port), "--", *MANY).ready()

    for host in ("127.0.0.1", "::1"):
        assert pid_in(ask((host, port))) == spawned(daemon)[0]
    daemon.stop()
    assert still_listens(giver)


def test_a_unix_socket_is_taken_and_its_file_stays(giver: Giver, tmp_path: Path) -> None:
    """Also if its folder is named by a link: systemd binds /run/x for ListenStream=/var/run/x."""
    path = giver.unix("local", tmp_path / "socket")
    linked = giver.unix("linked", tmp_path / "other")
    (tmp_path / "link").symlink_to(tmp_path)
    daemon = giver.start(f"unix:{path}", f"unix:{tmp_path}/link/other", "--", *MANY).ready()

    assert pid_in(ask(path)) == pid_in(ask(linked)) == spawned(daemon)[0]
    daemon.stop()
    assert still_listens(giver)
    assert Path(path).exists()
    assert Path(linked).exists()


@pytest.mark.costly
def test_several_sockets_of_one_name_are_all_taken(giver: Giver) -> None:
    ports = {giver.tcp("web"), giver.tcp("web")}
    daemon = giver.start("fd:web", "--", *MANY).ready()

    assert {int(each.rpartition(":")[2]) for each in daemon.addresses} == ports
    for port in ports:
        assert pid_in(ask(("127.0.0.1", port))) == spawned(daemon)[0]
    daemon.stop()


@pytest.mark.costly
def test_several_sockets_of_one_name_cannot_be_told_apart_and_check_says_so(giver: Giver) -> None:
    for _ in range(2):
        giver.tcp("web")
    words = ("--handoff", "listener", "fd:web", "--", *MANY, "{fd:web}")

    said = []
    for options in (("--check",), ()):
        daemon = giver.start(*options, *words)
        assert daemon.wait() == 2
        said.append(daemon.log.seen)

    assert said[0] == said[1]
    assert "{fd:web}: web stands for 2 listeners (tcp:127.0.0.1:" in said[0][0]
    assert still_listens(giver)


@pytest.mark.parametrize("check", [("--check",), ()], ids=["check", "start"])
def test_one_socket_is_not_two_listeners(giver: Giver, check: tuple[str, ...]) -> None:
    """A reload of such a file would refuse it."""
    address = f"127.0.0.1:{giver.tcp('web')}"
    daemon = giver.start(*check, "fd:web", address, "--", *MANY)

    assert daemon.wait() == 2
    said = f"cannot listen on {address} beside fd:web: both are the passed socket of tcp:{address};"
    assert said in daemon.log.text()
    assert still_listens(giver)


@pytest.mark.parametrize(
    "share", [("--canary", "5%"), ("--reload-order", "rolling", "--drain-timeout", "9s")]
)
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.costly
def test_a_socket_without_a_second_is_refused_for_a_share_and_check_says_so(
    giver: Giver, tmp_path: Path, kind: str, share: tuple[str, ...]
) -> None:
    if kind == "tcp":
        giver.tcp("web")
    else:
        giver.unix("web", tmp_path / "socket")
    for options in (("--check",), ()):
        daemon = giver.start(*options, *share, *SHARED)
        assert daemon.wait() == 2
        assert "all new clients of fd:web (passed in" in (daemon.log.text())
    assert still_listens(giver)


@pytest.mark.parametrize("share", [(), ("--canary", "5%")])
def test_check_accepts_a_passed_socket_that_may_have_a_second(
    giver: Giver, share: tuple[str, ...]
) -> None:
    giver.tcp("web", reuse=bool(share))
    daemon = giver.start("--check", *share, *SHARED)
    assert daemon.wait() == 0, daemon.log.text()
    assert still_listens(giver)


@pytest.mark.costly
def test_what_was_given_survives_an_upgrade_and_still_is_not_ours(giver: Giver) -> None:
    port = giver.tcp("web")
    daemon = giver.start("fd:web", "--", *MANY).ready()
    assert "event=resumed" in upgrade(daemon)
    assert pid_in(ask(("127.0.0.1", port))) == spawned(daemon)[0]
    daemon.stop()
    assert still_listens(giver)


@pytest.fixture
def _called_systemd() -> Iterator[None]:
    name = Path(f"/proc/{os.getpid()}/comm")
    before = name.read_text(encoding="utf-8")
    name.write_text("systemd", encoding="utf-8")
    yield
    name.write_text(before, encoding="utf-8")


@pytest.mark.usefixtures("_called_systemd")
def test_of_an_address_within_the_passed_one_the_error_names_systemd(giver: Giver) -> None:
    port = giver.tcp("web", socket.AF_INET6, both=True)
    daemon = giver.start(f"127.0.0.1:{port}", "--", *MANY)

    assert daemon.wait() == 111
    assert f"process {os.getpid()} (systemd) has it for a unit: if that" in daemon.log.text()


@pytest.mark.usefixtures("_called_systemd")
@pytest.mark.parametrize("unix", [False, True])
def test_of_an_address_of_another_service_s_unit_the_error_says_more(
    giver: Giver, tmp_path: Path, unix: bool
) -> None:
    if unix:
        address = f"unix:{giver.unix('web', tmp_path / 's')}?mode=0600"
    else:
        address = f"127.0.0.1:{giver.tcp('web')}"
    started = Protector((address, "--", *MANY), giver.environment)
    giver.started.append(started)

    assert started.wait() == 111
    assert "; otherwise stop the unit, or choose another address" in started.log.text()


def test_a_name_that_nothing_was_passed_under_is_refused_in_one_line(giver: Giver) -> None:
    giver.tcp("web")
    daemon = giver.start("fd:wbe", "--", *MANY)

    assert daemon.wait() == 2
    [line] = [line for line in daemon.log.seen if "fd:wbe" in line]
    assert line.endswith("fd:wbe: no listening socket was passed under this name; there is: web"), (
        line
    )
    assert still_listens(giver)


def test_workers_get_none_of_what_was_passed(giver: Giver) -> None:
    ports = {giver.tcp("web"), giver.tcp("web")}
    giver.tcp("other")
    daemon = giver.start("fd:web", "--", *MANY).ready()
    assert {int(each.rpartition(":")[2]) for each in daemon.addresses} == ports
    [pid] = spawned(daemon)

    theirs, ours = descriptors(pid), descriptors(os.getpid())
    assert theirs.keys() >= {3, 4}
    assert not {*theirs.values()} & {ours[each.fileno()] for _, each in giver.given}
    assert not [name for name in environment_of(pid) if name.startswith("LISTEN_")]
    daemon.stop()


@needs.programs("systemd-socket-activate")
def test_systemd_socket_activate_starts_it_with_the_first_client(
    marked_environment: dict[str, str],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    through = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "--fdname=web"]
    through += [f"--setenv={name}={value}" for name, value in marked_environment.items()]
    through += [f"--setenv=PATH={os.environ['PATH']}"]
    daemon = Protector(["fd:web", "--", *MANY], marked_environment, through=through)
    try:
        daemon.log.wait_for("Listening on")
        assert pid_in(ask(("127.0.0.1", port))) == spawned(daemon)[0]
        daemon.process.terminate()
        assert daemon.process.wait(DEADLINE_S) == 0
    finally:
        daemon.end()
        print(daemon.log.text())


@pytest.mark.costly
def test_a_listener_that_workers_accept_from_is_common_to_two_generations(giver: Giver) -> None:
    """Unless the process that has opened it lets others have its address."""
    port = giver.tcp("http")
    words = ("--handoff", "listener", "--ready", "notify", "fd:http", "--", *worker("accepts"))
    daemon = giver.start(*words).ready()

    daemon.reload()
    assert wait_gone(spawned(daemon, 1)) == []

    assert listening(port) == 1
    assert pid_in(ask(("127.0.0.1", port))) == spawned(daemon, 2)[0]
    assert "no second socket (it was passed in without ReusePort=yes)" in daemon.log.text()
    daemon.stop()


SHARED = ("--handoff", "listener", "--ready", "notify", "fd:web", "--", *worker("accepts"))


@needs.root_with("unshare")
def test_so_is_one_that_was_opened_in_another_network_namespace(giver: Giver) -> None:
    """No client would come to a second socket, which would be of our own namespace."""
    with socket_elsewhere() as given:
        giver.given.append(("web", given))
        daemon = giver.start(*SHARED).ready()

        said = "no second socket (it was opened in another network namespace)"
        assert said in daemon.log.text()
        daemon.stop()


@pytest.mark.parametrize("reloads", [0, 1, 2])
def test_with_reuseport_each_generation_has_a_socket_and_the_owner_gets_all_back(
    giver: Giver, reloads: int
) -> None:
    """Whichever of the two clients came to before the stop."""
    port = giver.tcp("web", reuse=True)
    daemon = giver.start(*SHARED).ready()
    assert listening(port) == 2

    with steady(port, rounds(10, 0) / 1000) as clients:
        for _ in range(reloads):
            served(clients, 20)
            daemon.reload()
        served(clients, 20)
        daemon.stop()
        assert still_listens(giver)
        assert listening(port) == 1
        second = giver.start(*SHARED).ready()
        served(clients, 20)  # those among them that have waited meanwhile
        assert listening(port) == 2
    second.stop()

    assert "no second socket" not in daemon.log.text() + second.log.text()
    assert clients.failures == []


@pytest.mark.parametrize("reloads", [0, 1])
@pytest.mark.costly
def test_a_quick_stop_counts_clients_at_our_socket_and_leaves_the_others_to_the_owner(
    giver: Giver, tmp_path: Path, reloads: int
) -> None:
    port, gate = giver.tcp("web", reuse=True), tmp_path / "gate"
    os.mkfifo(gate)
    daemon = giver.start(*SHARED).ready()
    for _ in range(reloads):
        daemon.reload()
    with Client(("127.0.0.1", port), f"wait {gate}") as held:
        writes = os.open(gate, os.O_WRONLY)  # waits until the worker has accepted
        waiting = [Client(("127.0.0.1", port), f"waits {number}") for number in range(2)]
        mark = daemon.signal(signal.SIGINT)
        daemon.log.wait_for(f"event=signalled worker={reloads + 1} ", after=mark)
        os.close(writes)
        assert held.hear()
    assert daemon.wait() == 0

    lost = f"event=clients-lost address=tcp:127.0.0.1:{port} lost=2"
    assert daemon.log.count(lost) == daemon.log.count("event=clients-lost") == reloads
    second = giver.start(*SHARED).ready()
    for number, each in enumerate(waiting):
        with each, pytest.raises(ConnectionResetError) if reloads else nullcontext():
            assert each.hear().endswith(f" waits {number}")
    second.stop()


@pytest.mark.costly
def test_a_second_socket_is_not_made_beside_one_that_an_earlier_protector_has_left(
    giver: Giver,
) -> None:
    port = giver.tcp("web", reuse=True)
    with socket.socket() as left:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        left.bind(("127.0.0.1", port))
        left.listen()
        reuseport.steer(left, 1)  # as it was when that one was killed

        daemon = giver.start(*SHARED).ready()

        assert listening(port) == 2
        assert pid_in(ask(("127.0.0.1", port))) == spawned(daemon)[0]
        assert "no second socket (another program listens at that address)" in daemon.log.text()
        daemon.stop()


@needs.ANOTHER_USER
@pytest.mark.costly
def test_a_second_socket_needs_the_user_that_has_opened_the_first(giver: Giver) -> None:
    os.seteuid(65534)
    try:
        port = giver.tcp("web", reuse=True)
    finally:
        os.seteuid(0)

    daemon = giver.start(*SHARED).ready()

    assert listening(port) == 1
    assert "no second socket (Address already in use)" in daemon.log.text()
    daemon.stop()
