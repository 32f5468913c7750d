"""Listeners at link-local addresses, which need their interface: `[fe80::1%eth0]:80`."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests import needs
from tests.namespaces import add_links, at, remove_links, two_links
from tests.running import FAIR_START_S, Client, Protector, ask
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.config_file import File
from tests.scenarios.managers import MANY, Giver, Service
from tests.scenarios.probed import Asked
from tests.scenarios.starting import MINIMAL, Start
from tests.scenarios.tools import EITHER_HANDOFF, Release, pid_in, worker
from tests.unit.ctl.conftest import COMMAND as CTL

Starter = Callable[..., Protector]


@pytest.fixture
def links() -> Iterator[tuple[str, str]]:
    with two_links() as hosts:
        yield hosts


@pytest.fixture
def before_linux_5_7(tmp_path: Path) -> str:
    """A library that is preloaded: only CAP_NET_RAW may bind a socket to an interface."""
    compiler = shutil.which("gcc")
    if compiler is None:
        needs.skip("gcc")
    library = tmp_path / "before_linux_5_7.so"
    source = Path(__file__).with_name("before_linux_5_7.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


def warnings(place: Path) -> list[str]:
    """Return the lines of `status` about missing interfaces."""
    command = [*CTL, "--control", str(place), "status"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [each for each in said.splitlines() if "its interface was removed" in each]


@EITHER_HANDOFF
@pytest.mark.costly
def test_it_is_served_through_reloads_kills_and_upgrades(
    protector: Starter, tmp_path: Path, links: tuple[str, str], handoff: str
) -> None:
    file = File(tmp_path / "file.toml").says()
    server = worker("accepts") if handoff == "listener" else MANY
    file.listens, file.command = [f"[{links[0]}]:0"], server
    file.says()
    daemon = protector("--guard", "--config", file.path).ready()
    port = daemon.port
    assert daemon.addresses == [f"tcp:[{links[0]}]:{port}"]

    def serves(host: str) -> int:
        return pid_in(ask(at(host, port)))

    seen = [serves(links[0])]
    file.listens += [f"[{links[1]}]:{port}"]  # the same address and port, but for the interface
    file.says()
    for change in ("reload", "reload", "kill", "reload", "upgrade", "reload"):
        if change == "kill":
            revived(daemon, kill_protector(daemon))
        elif change == "upgrade":
            assert "event=resumed" in upgrade(daemon)
        else:
            daemon.reload()
            assert serves(links[0]) not in seen
        seen.append(serves(links[0]))
        assert serves(links[1]) == seen[-1]

    file.listens.pop(0)
    file.says()
    daemon.reload()
    with pytest.raises(ConnectionRefusedError):
        ask(at(links[0], port))
    assert serves(links[1])
    assert "level=error" not in daemon.log.text()
    daemon.stop()


@pytest.mark.parametrize("ready", ["accept", "http:/healthz", "check"])
def test_a_release_is_probed_there(
    protector: Starter, asked: Asked, links: tuple[str, str], tmp_path: Path, ready: str
) -> None:
    """By the address itself: from ::1 no packet finds a socket of one interface."""
    if ready == "check":
        path = tmp_path / "check.sh"
        path.write_text("curl --silent --fail http://$SOCKETPROTECTOR_PROBE/healthz", "utf-8")
        ready = f"check:sh {path}"
    health = ("--health", "http:/healthz", "--health-every", "100ms")
    words = ("--handoff", "listener", "--ready", ready, *health, f"[{links[0]}]:0")
    daemon = protector(*words, "--", asked.release.path).ready()
    daemon.reload()

    asked.bad()
    mark = len(daemon.log.seen)
    line = daemon.log.wait_for("event=unhealthy", after=mark)
    assert "database gone" in line

    daemon.stop()


@pytest.mark.costly
def test_a_probe_that_no_worker_accepts_does_not_look_like_a_client(
    protector: Starter, release: Release, links: tuple[str, str]
) -> None:
    release.becomes(*worker("accepts", "--ready", "never"))
    words = ("--handoff", "listener", "--start-timeout", f"{FAIR_START_S}s", f"[{links[0]}]:0")
    daemon = protector(*words, "--", release.path).ready()
    old = ask(at(links[0], daemon.port))

    release.becomes(*worker("never_ready"))
    mark = daemon.signal(signal.SIGHUP)
    line = daemon.log.wait_for("event=reload-failed", after=mark)
    assert f"no worker accepted the probe at {links[0]} port {daemon.port}" in line
    daemon.log.wait_for("event=drained generation=2")

    assert ask(at(links[0], daemon.port)) == old
    assert "event=stranded" not in daemon.log.text()
    daemon.stop()


@pytest.mark.costly
def test_each_connection_is_listed(protector: Starter, place: Path, links: tuple[str, str]) -> None:
    daemon = protector("--control", place, f"[{links[0]}]:0", "--", *MANY).ready()
    with Client(at(links[0], daemon.port)) as client:
        worker_pid = pid_in(client.ask())
        listed = subprocess.run(
            [*CTL, "--control", str(place), "connections"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert str(worker_pid) in listed
        assert f"[fe80::77]:{daemon.port}" in listed
    daemon.stop()


@pytest.mark.costly
def test_a_check_beside_the_running_one_and_a_second_start_know_the_address(
    start: Start, links: tuple[str, str]
) -> None:
    start.up(f"[{links[0]}]:0", "--", *MINIMAL)
    _, _, port = start.addresses[0].rpartition(":")
    listen = f"[{links[0]}]:{port}"

    assert start("--check", listen, "--", *MINIMAL).status == 0
    other = start("--pid-file", start.folder / "other", listen, "--", *MINIMAL)
    assert f"process {start.pid} " in other.err
    assert start("--check", f"[{links[1]}]:{port}", "--", *MINIMAL).status == 0
    absent = start("--pid-file", start.folder / "other", f"[fe80::77%no]:{port}", "--", *MINIMAL)
    without = start("--pid-file", start.folder / "other", "[fe80::77]:0", "--", *MINIMAL)
    assert "needs its interface, as in [fe80::1%eth0]:80" in without.err
    assert "see `ip link` for the interfaces there are" in absent.err
    start.stop()


@pytest.mark.parametrize("ready", ["accept", "notify", ""])
@pytest.mark.costly
def test_a_removed_interface_keeps_no_release_from_other_listeners(
    protector: Starter, place: Path, links: tuple[str, str], ready: str
) -> None:
    """ready: under --handoff listener; "" is the other handoff."""
    options = ("--handoff", "listener", "--ready", ready) if ready else ()
    server = MANY
    if ready:
        server = worker("accepts", *(("--ready", "notify") if ready == "notify" else ()))
    listens = f"[{links[0]}]:0", "127.0.0.1:0"
    daemon = protector("--control", place, *options, *listens, "--", *server).ready()
    there = at(links[0], daemon.port)
    other = ("127.0.0.1", int(daemon.addresses[1].rpartition(":")[2]))
    daemon.reload()
    assert not warnings(place)

    remove_links(links)
    for comes_back in (False, False, True):
        if comes_back:
            add_links(links)  # with another index
            there = (*there[:3], socket.if_nametoindex(links[0].partition("%")[2]))
        before, mark = ask(other), len(daemon.log.seen)
        daemon.reload()
        assert ask(other) != before
        line = daemon.log.wait_for("event=listener-lost", after=mark)
        assert "restart SocketProtector when the interface is back" in line
        assert len(warnings(place)) == 1
    with pytest.raises(ConnectionRefusedError):
        ask(there)

    for other_event in ("socket-replaced", "one-socket-left", "reload-failed"):
        assert f"event={other_event}" not in daemon.log.text()
    daemon.stop()


@pytest.mark.costly
def test_a_restart_serves_an_interface_that_was_removed_and_made_again(
    tmp_path: Path, marked_environment: dict[str, str], links: tuple[str, str]
) -> None:
    made = Service(tmp_path, {**marked_environment, "INVOCATION_ID": "of a unit"})
    with closing(made) as service:
        port = service.start(f"[{links[0]}]:0", "--", *MANY).ready().port
        service.wait_for("READY")
        remove_links(links)
        add_links(links)
        service.main.stop()

        second = service.start(f"[{links[0]}]:{port}", "--", *MANY).ready()
        assert ask(at(links[0], port))
        second.stop()


@pytest.mark.costly
def test_each_generation_has_its_socket_without_the_right_to_choose_the_interface(
    tmp_path: Path,
    marked_environment: dict[str, str],
    links: tuple[str, str],
    before_linux_5_7: str,
) -> None:
    made = Service(tmp_path, {**marked_environment, "LD_PRELOAD": before_linux_5_7})
    with closing(made) as service:
        words = ("--handoff", "listener", "--ready", "accept", f"[{links[0]}]:0")
        daemon = service.start(*words, "--", *worker("accepts")).ready()
        assert "no second socket" not in daemon.log.text()
        before = ask(at(links[0], daemon.port))
        daemon.reload()
        assert ask(at(links[0], daemon.port)) != before
        daemon.stop()


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.costly
def test_after_a_stop_the_stored_socket_still_has_its_interface(
    tmp_path: Path,
    marked_environment: dict[str, str],
    links: tuple[str, str],
    request: pytest.FixtureRequest,
    is_old: bool,
) -> None:
    kernel = {"LD_PRELOAD": request.getfixturevalue("before_linux_5_7")} if is_old else {}
    made = Service(tmp_path, {**marked_environment, **kernel, "INVOCATION_ID": "of a unit"})
    with closing(made) as service:
        port = service.start(f"[{links[0]}]:0", "--", *MANY).ready().port
        service.wait_for("READY")
        service.main.stop()
        assert service.store

        second = service.start(f"[{links[0]}]:{port}", "--", *MANY).ready()
        assert ask(at(links[0], port))
        with pytest.raises(ConnectionRefusedError):
            ask(at(links[1], port))
        assert "event=notice" not in second.log.text()
        second.stop()


@pytest.mark.costly
def test_a_passed_socket_is_taken_by_its_address(
    marked_environment: dict[str, str], links: tuple[str, str]
) -> None:
    with closing(Giver(marked_environment)) as giver:
        for name, host in zip("ab", links, strict=True):
            made = socket.socket(socket.AF_INET6)
            giver.given.append((name, made))
            made.bind(at(host, giver.given[0][1].getsockname()[1]))
            made.listen()
        _, port, *_ = made.getsockname()
        daemon = giver.start(f"[{links[0]}]:{port}", "fd:b", "--", *MANY).ready()

        assert daemon.addresses == [f"tcp:[{host}]:{port}" for host in links]
        daemon.stop()
