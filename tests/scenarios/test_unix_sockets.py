"""--handoff listener at a UNIX path: each generation has a socket of its own, as over TCP."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from socketprotector.ctl.api import why_not_ready
from tests import needs
from tests.load import Load
from tests.rounds import rounds
from tests.running import DEADLINE_S, Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import kill_protector, revived, served, upgrade
from tests.scenarios.operating import Operated
from tests.scenarios.probed import Asked
from tests.scenarios.tools import NOBODY, Gate, Release, pid_in, spawned, worker
from tests.scenarios.users import Command
from tests.unanswered import Unanswered
from tests.unit.ctl.conftest import run

Starter = Callable[..., Protector]
MODE = ("--handoff", "listener")
#: Says nothing: only a probe tells that it accepts.
SERVER = worker("accepts", "--ready", "never")
#: Keeps connections.
KEEPS = worker("asyncio_accepts")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder / "web.sock"


@pytest.fixture
def one(protector: Starter, path: Path, place: Path, release: Release) -> Iterator[Operated]:
    release.becomes(*SERVER)
    words = (*MODE, "--guard", "--control", place, f"unix:{path}", "--", release.path)
    found = Operated(protector(*words).ready(), place)
    yield found
    found.daemon.stop()
    assert list(path.parent.iterdir()) == []


def get(path: Path, what: str) -> str:
    """Return the status line and body of an answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(str(path))
        client.sendall(f"GET {what} HTTP/1.0\r\n\r\n".encode())
        with client.makefile("rb") as stream:
            return stream.read().decode()


def own_files(path: Path) -> list[str]:
    return [each.name for each in path.parent.iterdir() if each != path]


def test_reloads_upgrades_and_kills_lose_no_client(one: Operated, path: Path) -> None:
    with Load(f"unix:{path}") as load:
        for _ in range(rounds(1, 3)):
            one.daemon.reload()
            served(load)
        assert "event=resumed" in upgrade(one.daemon)
        one.daemon.reload()
        served(load)
        revived(one.daemon, kill_protector(one.daemon))
        one.daemon.reload()
        served(load)

    assert load.snapshot().failures == ()
    assert path.is_socket()
    assert len(own_files(path)) == 2


@pytest.mark.costly
def test_each_generation_has_its_own_socket(one: Operated, path: Path, release: Release) -> None:
    release.becomes(*KEEPS)
    one.daemon.reload()
    first = path.stat().st_ino
    with Client(str(path), "waits") as kept:
        assert pid_in(kept.hear()) == spawned(one.daemon, 2)[0]
        one.daemon.reload()
        second = path.stat().st_ino
        assert pid_in(ask(str(path))) == spawned(one.daemon, 3)[0]
        assert pid_in(kept.ask()) == spawned(one.daemon, 2)[0]
    assert wait_gone(spawned(one.daemon, 2)) == []
    one.daemon.reload()

    assert len({first, second, path.stat().st_ino}) == 3


@pytest.mark.costly
def test_a_release_answers_a_probe_before_its_first_client(
    protector: Starter, path: Path, place: Path, asked: Asked
) -> None:
    words = (*MODE, "--control", place, "--ready", "http:/healthz", "--start-timeout", "2s")
    one = Operated(protector(*words, f"unix:{path}", "--", asked.release.path).ready(), place)
    before = path.stat().st_ino
    asked.bad()
    mark = one.daemon.signal(signal.SIGHUP)
    said = one.daemon.log.wait_for("event=reload-failed generation=2", after=mark)

    assert "500" in said
    assert path.stat().st_ino == before
    assert str(spawned(one.daemon, 1)[0]) in get(path, "/")
    refused = run("--control", str(place), "reload", "--dry-run")
    asked.good()
    passed = run("--control", str(place), "reload", "--dry-run")
    assert (refused.status, passed.status) == (3, 0)
    assert path.stat().st_ino == before
    one.daemon.reload()
    assert str(spawned(one.daemon)[-1]) in get(path, "/")
    one.daemon.stop()


@pytest.mark.costly
def test_a_bad_answer_while_it_settles_gives_the_clients_back(
    protector: Starter, path: Path, asked: Asked
) -> None:
    words = (*MODE, "--ready", "accept", "--settle", "1h", "--settle-check", "http:/healthz")
    daemon = protector(*words, f"unix:{path}", "--", asked.release.path).ready()
    before = path.stat().st_ino
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    assert path.stat().st_ino != before
    asked.bad()
    daemon.log.wait_for("event=reload-failed generation=2", after=mark)

    assert path.stat().st_ino == before
    assert str(spawned(daemon, 1)[0]) in get(path, "/")
    daemon.stop()


@pytest.mark.costly
def test_counts_are_each_generation_s_own(one: Operated, path: Path, release: Release) -> None:
    release.becomes(*KEEPS)
    one.daemon.reload()
    with Client(str(path), "first") as first, Client(str(path), "second") as second:
        for each in (first, second):
            each.hear()
        one.daemon.reload()
        with Client(str(path), "third") as third:
            third.hear()
            one.until_generation(2, active=2)
            one.until_generation(3, active=1)
    one.until_generation(3, active=0)


#: In a mount namespace of its own: bind every name below a folder that any user can read, and
#: accept a client there whose bytes nobody reads.
NAMESAKES = """
import socket, sys
folder, kept = sys.argv[1], []
with open("/proc/net/unix") as table:
    names = {line.split()[7] for line in table if f" {folder}/" in line}
for name in names:
    server, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    server.bind(name)
    server.listen()
    client.connect(name)
    client.sendall(b"unread")
    kept += [server, client, server.accept()[0]]
print(len(names), flush=True)
sys.stdin.read()
"""


@needs.root_with("unshare", "mount")
def test_sockets_of_the_same_name_in_another_mount_namespace_count_for_no_generation(
    one: Operated, path: Path, release: Release
) -> None:
    release.becomes(*KEEPS)
    one.daemon.reload()
    script = 'mount -t tmpfs none "$1" && exec "$2" -c "$3" "$1"'
    words = ("unshare", "--mount", "sh", "-c", script, "sh", path.parent, sys.executable)
    with (
        Client(str(path), "first") as first,
        subprocess.Popen(
            [*words, NAMESAKES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as theirs,
    ):
        first.hear()
        assert theirs.stdout is not None
        assert int(theirs.stdout.readline()) >= 2
        one.daemon.reload()
        with Client(str(path), "second") as second:
            second.hear()
            one.until_generation(2, active=1)
            one.until_generation(3, active=1)
        theirs.communicate()
    assert theirs.returncode == 0
    one.until_generation(3, active=0)


@pytest.mark.parametrize("amid", ["", "reload", "upgrade", "kill"])
def test_clients_wait_through_a_hold_and_the_next_generation_answers(
    one: Operated, path: Path, amid: str
) -> None:
    with one.line() as line:
        line.ask("hold", seconds=3600)
    with Client(str(path), "hello") as late:
        if amid == "reload":
            one.daemon.reload()
        elif amid == "upgrade":
            assert "event=resumed" in upgrade(one.daemon)
        elif amid == "kill":
            revived(one.daemon, kill_protector(one.daemon))
        serving = spawned(one.daemon)[-1]
        with one.line() as line:
            line.ask("release")
            assert late.hear().endswith(" hello")
    assert "hint=" not in one.daemon.log.wait_for("event=stranded")
    eventually(lambda: pid_in(ask(str(path))) != serving, "the next generation")


def test_a_status_warns_of_clients_of_a_hold_whose_generation_does_not_start(
    one: Operated, path: Path, release: Release
) -> None:
    said = f"unix:{path}: clients wait, and no worker has their socket; "

    def warnings() -> str:
        return " ".join(one.status()["warnings"])

    with one.line() as line:
        line.ask("hold", seconds=3600)
        with Client(str(path), "hello") as late:
            release.becomes("/bin/sh", "-c", "exit 3")
            assert said not in warnings()
            line.ask("release")
            one.daemon.log.wait_for("event=reload-failed")

            assert said in warnings()
            assert why_not_ready(one.status()) == ""

            release.becomes(*SERVER)
            assert late.hear().endswith(" hello")
    eventually(lambda: said not in warnings(), "no client waits")


def on_hold(start: Starter, place: Path, release: Release, *words: str) -> Operated:
    """Start a server with these words of the command line, and hold its clients."""
    release.becomes(*SERVER)
    one = Operated(start(*MODE, "--control", place, *words, "--", release.path).ready(), place)
    with one.line() as line:
        line.ask("hold", seconds=3600)
    return one


@pytest.mark.parametrize("amid", ["", "a release that starts", "a kill of the protector"])
def test_a_stop_lets_in_those_who_wait_through_a_hold(
    one: Operated, path: Path, release: Release, tmp_path: Path, amid: str
) -> None:
    gate = Gate(tmp_path / "gate")
    with one.line() as line:
        line.ask("hold", seconds=3600)
    with ExitStack() as clients:
        late = [clients.enter_context(Client(str(path), f"hello {n}")) for n in range(3)]
        if amid:
            release.becomes(*gate.before(*SERVER))
        if amid == "a release that starts":
            mark = one.daemon.signal(signal.SIGHUP)
            one.daemon.log.wait_for("event=spawned generation=2", after=mark)
            release.becomes(*SERVER)
        mark = one.daemon.signal(signal.SIGTERM)
        one.daemon.log.wait_for("event=stopping", after=mark)
        if amid == "a kill of the protector":
            one.daemon.log.wait_for("event=spawned generation=2", after=mark)
            revived(one.daemon, kill_protector(one.daemon))
            gate.stay_open()  # the worker may have been adopted, or another one wait there
        for number, each in enumerate(late):
            assert each.hear().endswith(f" hello {number}")
    assert one.daemon.wait() == 0
    assert one.daemon.log.count("event=clients-lost") == 0


@pytest.mark.costly
def test_a_stop_lets_in_those_who_wait_at_a_path_and_over_tcp(
    protector: Starter, path: Path, place: Path, release: Release
) -> None:
    one = on_hold(protector, place, release, "127.0.0.1:0", f"unix:{path}")
    with Client(str(path), "hello") as late, Unanswered(one.address) as again:
        again.tries_again()
        one.daemon.signal(signal.SIGTERM)
        assert late.hear().endswith(" hello")
        again.connects()
        again.say("hello")
        assert again.hear().endswith(" hello")
    assert one.daemon.wait() == 0
    assert one.daemon.log.count("event=clients-lost") == 0


@pytest.mark.costly
def test_a_stop_says_how_many_it_resets_if_no_worker_starts_for_them_in_its_time(
    protector: Starter, path: Path, place: Path, release: Release
) -> None:
    one = on_hold(protector, place, release, "--stop-timeout", "1s", f"unix:{path}")
    release.path.unlink()
    with Client(str(path), "hello"), Client(str(path), "hello"):
        mark = one.daemon.signal(signal.SIGTERM)
        one.daemon.log.wait_for(f"event=clients-lost address=unix:{path} lost=2", after=mark)
        assert one.daemon.wait() == 0


@pytest.mark.parametrize("amid", ["", "a kill of the protector"])
@pytest.mark.costly
def test_a_stop_starts_workers_for_those_who_wait_through_a_hold_until_they_serve(
    one: Operated, path: Path, release: Release, amid: str
) -> None:
    with one.line() as line:
        line.ask("hold", seconds=3600)
    release.path.unlink()
    with Client(str(path), "hello") as late:
        mark = one.daemon.signal(signal.SIGTERM)
        for number in range(2, 6):
            one.daemon.log.wait_for(f"event=reload-failed generation={number}", after=mark)
        if amid:
            revived(one.daemon, kill_protector(one.daemon))
        release.becomes(*SERVER)
        assert late.hear().endswith(" hello")
    assert one.daemon.wait() == 0
    assert one.daemon.log.count("event=clients-lost") == 0


@pytest.mark.costly
def test_a_stop_in_a_hold_awaits_no_later_client_while_another_program_has_the_path(
    protector: Starter, path: Path, place: Path, release: Release
) -> None:
    one = on_hold(protector, place, release, "--stop-timeout", "1h", f"unix:{path}")
    with Client(str(path), "hello") as late, socket.socket(socket.AF_UNIX) as theirs:
        path.unlink()
        theirs.bind(str(path))
        mark = one.daemon.signal(signal.SIGTERM)
        assert late.hear().endswith(" hello")
        one.daemon.log.wait_for("event=drained generation=1", after=mark)
        assert one.daemon.wait() == 0
    path.unlink()
    assert list(path.parent.iterdir()) == []


def test_a_hold_is_refused_while_another_program_has_the_path(one: Operated, path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as theirs, one.line() as line:
        theirs.bind(str(path))
        code, said = line.refused("hold", seconds=3600)

    assert code == "refused"
    why = "another program has put its file there; remove it"
    assert said == f"hold is unavailable: unix:{path}: {why}"
    assert one.status()["held_s"] is None
    path.unlink()
    with one.line() as line:
        line.ask("hold", seconds=3600)
        line.ask("release")


@pytest.mark.costly
def test_a_reload_removes_no_path_at_which_clients_wait_through_a_hold(
    protector: Starter, path: Path, place: Path, tmp_path: Path
) -> None:
    config, command = tmp_path / "web.toml", ", ".join(f"'{word}'" for word in SERVER)

    def write(listen: str) -> None:
        new = tmp_path / "new"
        new.write_text(f'handoff = "listener"\nlisten = [{listen}]\ncommand = [{command}]\n')
        new.rename(config)

    write(f"'127.0.0.1:0', 'unix:{path}'")
    one = Operated(protector("--config", config, "--control", place).ready(), place)
    with one.line() as line:
        line.ask("hold", seconds=3600)
    with Client(str(path), "hello") as late:
        write("'127.0.0.1:0'")
        mark = one.daemon.signal(signal.SIGHUP)
        said = one.daemon.log.wait_for("event=(reload-failed|reloaded)", after=mark)
        lost = f"the clients that wait at unix:{path} would be reset"
        assert f"on hold, and {lost}; end the hold first" in said
        with one.line() as line:
            line.ask("release")
        assert late.hear().endswith(" hello")
    one.daemon.log.wait_for("event=recovered")
    one.daemon.reload()
    assert not path.exists()
    assert one.daemon.log.count("event=clients-lost") == 0
    one.daemon.stop()


@pytest.fixture(params=["mounted", "linked"])
def mounted(request: pytest.FixtureRequest, path: Path, tmp_path: Path) -> Iterator[Path]:
    """Where the file of the socket stays, to which the path leads now: as in a container.

    linked: another link to it stands for that, where nothing can be mounted.
    """
    place = tmp_path / "mounted"
    request.getfixturevalue("one")
    if request.param == "linked":
        os.link(path, place)
        yield place
        return
    place.touch()
    script = f"mount --bind {path} {place} && echo mounted && exec cat"
    command = ("unshare", "--mount", "sh", "-c", script)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as inside:
        assert inside.stdin is not None
        assert inside.stdout is not None
        if inside.stdout.readline() != b"mounted\n":
            needs.skip("mounts")
        yield Path(f"/proc/{inside.pid}/root{place}")
        inside.stdin.close()


@pytest.mark.costly
def test_clients_of_a_mounted_socket_file_are_served_once_more_by_each_reload(
    one: Operated, path: Path, mounted: Path
) -> None:
    before = path.stat().st_ino
    with Load(f"unix:{mounted}") as load:
        for _ in range(2):
            mark = len(one.daemon.log.seen)
            one.daemon.reload()
            assert "mount the folder" in one.daemon.log.wait_for("event=stranded", after=mark)
            one.daemon.log.wait_for("event=recovered", after=mark)
            served(load)
            assert mounted.stat().st_ino == before

    assert load.snapshot().failures == ()
    assert one.daemon.log.count("event=stranded") == 2


@pytest.mark.costly
def test_a_mounted_socket_file_to_which_no_client_comes_costs_no_generation(
    one: Operated, mounted: Path
) -> None:
    """The file outlives its socket, so later clients are refused at once, and do not hang."""
    for _ in range(2):
        one.daemon.reload()
    with pytest.raises(ConnectionRefusedError):
        ask(str(mounted))

    assert one.daemon.log.count("event=stranded") == 0
    assert len(spawned(one.daemon)) == 3


@pytest.mark.costly
def test_no_hold_makes_the_clients_of_a_later_one_wait(one: Operated, path: Path) -> None:
    for _ in range(7):  # with twice the pause each time, the last one would wait for half a minute
        with one.line() as line:
            line.ask("hold", seconds=3600)
            with Client(str(path), "hello") as late:
                line.ask("release")
                assert late.hear().endswith(" hello")
    assert len(spawned(one.daemon)) == 8


@pytest.mark.costly
def test_a_hold_at_which_no_client_waited_starts_no_generation(one: Operated, path: Path) -> None:
    for _ in range(2):
        with one.line() as line:
            line.ask("hold", seconds=3600)
            line.ask("release")
    assert pid_in(ask(str(path))) == spawned(one.daemon, 1)[0]
    one.daemon.reload()

    assert pid_in(ask(str(path))) == spawned(one.daemon, 2)[0]
    assert one.daemon.log.count("event=stranded") == 0


@pytest.mark.parametrize("phase", ["hangs", "settles"])
@pytest.mark.costly
def test_clients_of_a_hold_that_ends_during_a_reload_wait_for_one_start_alone(
    protector: Starter, path: Path, place: Path, release: Release, tmp_path: Path, phase: str
) -> None:
    gate = Gate(tmp_path / "gate")
    release.becomes(*SERVER)
    settle = ("--settle", "1h") if phase == "settles" else ()
    words = (*MODE, *settle, "--control", place, f"unix:{path}", "--", release.path)
    one = Operated(protector(*words).ready(), place)
    with one.line() as line:
        line.ask("hold", seconds=3600)
        with Client(str(path), "hello") as late:
            if phase == "hangs":
                release.becomes(*gate.before(*SERVER))
            mark = one.daemon.signal(signal.SIGHUP)
            began = "spawned" if phase == "hangs" else "route"
            one.daemon.log.wait_for(f"event={began} generation=2", after=mark)
            release.becomes(*SERVER)
            line.ask("release")

            assert pid_in(late.hear()) == spawned(one.daemon, 3)[0]
    one.daemon.log.wait_for("event=retrying generation=2 ", after=mark)
    if phase == "hangs":
        one.daemon.log.wait_for("event=reloaded generation=4", after=mark)
        assert [each["result"] for each in one.status()["reloads"]] == ["reloaded"]
    else:
        assert one.status()["reload_wanted"]
    assert one.daemon.log.count("event=reload-failed") == 0
    one.daemon.stop()
    assert list(path.parent.iterdir()) == []


def test_a_stop_answers_what_waits_in_the_backlog(
    protector: Starter, path: Path, release: Release, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    release.becomes(*SERVER)
    daemon = protector(*MODE, f"unix:{path}", "--", release.path).ready()
    daemon.reload()
    with Client(str(path), f"wait {gate.path}") as first, Client(str(path), "second") as second:
        mark = daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("event=stopping", after=mark)
        gate.open()
        assert [pid_in(each.hear()) for each in (first, second)] == [spawned(daemon, 2)[0]] * 2
    assert daemon.wait() == 0
    assert list(path.parent.iterdir()) == []


def fill(path: Path, clients: ExitStack) -> list[socket.socket]:
    """Connect until a client that does not wait gets EAGAIN, as nginx does; each says a line."""
    made: list[socket.socket] = []
    while True:
        client = clients.enter_context(socket.socket(socket.AF_UNIX))
        client.setblocking(False)
        try:
            client.connect(str(path))
        except BlockingIOError:
            return made
        client.sendall(b"hello\n")
        client.settimeout(DEADLINE_S)
        made.append(client)


def ask_waiting(path: Path) -> str:
    """Ask as a client does that waits in connect()."""
    with socket.socket(socket.AF_UNIX) as client:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            client.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(DEADLINE_S), 0))
        client.connect(str(path))
        client.sendall(b"hello\n")
        return client.recv(100).decode()


def all_are_answered(clients: list[socket.socket]) -> None:
    assert all(client.recv(100).endswith(b" hello\n") for client in clients)


def held(gate: Gate) -> int:
    """Wait until a worker waits at a gate; return a descriptor that keeps it there until closed."""
    found: list[int] = []

    def waits() -> bool:
        with suppress(OSError):
            found.append(os.open(gate.path, os.O_WRONLY | os.O_NONBLOCK))
        return bool(found)

    eventually(waits, "a worker at the gate")
    return found[0]


BACKLOG = 5


@pytest.fixture
def full(
    protector: Starter, path: Path, release: Release, tmp_path: Path
) -> Iterator[tuple[Protector, int, list[socket.socket]]]:
    """A worker that serves a client until a descriptor is closed, and a full backlog."""
    gate = Gate(tmp_path / "gate")
    release.becomes(*SERVER)
    words = ("--settle", "1h", f"unix:{path}?backlog={BACKLOG}", "--", release.path)
    daemon = protector(*MODE, *words).ready()
    with ExitStack() as clients:
        first = clients.enter_context(Client(str(path), f"wait {gate.path}"))
        yield daemon, held(gate), fill(path, clients)
        assert pid_in(first.hear()) == spawned(daemon, 1)[0]
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0


@pytest.mark.costly
def test_a_full_backlog_has_clients_wait_or_try_again_whether_a_release_fails_or_not(
    full: tuple[Protector, int, list[socket.socket]], path: Path, release: Release
) -> None:
    daemon, gate, waiting = full
    assert len(waiting) == BACKLOG + 1
    release.becomes(*worker("dies_before_ready"))
    mark = daemon.signal(signal.SIGHUP)
    with ThreadPoolExecutor(1) as others, ExitStack() as clients:
        late = others.submit(ask_waiting, path)
        daemon.log.wait_for("event=reload-failed generation=2", after=mark)
        assert fill(path, clients) == []
        os.close(gate)
        all_are_answered(waiting)
        assert pid_in(late.result()) == spawned(daemon, 1)[0]


@pytest.mark.costly
def test_clients_of_a_full_backlog_are_answered_when_the_release_that_has_it_fails(
    full: tuple[Protector, int, list[socket.socket]], path: Path, release: Release, tmp_path: Path
) -> None:
    daemon, gate, before = full
    its, rescue = Gate(tmp_path / "its"), Gate(tmp_path / "rescue")
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    with ExitStack() as clients:
        clients.enter_context(Client(str(path), f"wait {its.path}"))
        clients.callback(os.close, held(its))
        waiting = fill(path, clients)
        assert len(waiting) == BACKLOG + 1
        release.becomes(*rescue.before(*SERVER))  # the generation that accepts their clients
        os.kill(spawned(daemon)[-1], signal.SIGKILL)
        daemon.log.wait_for("event=reload-failed generation=2", after=mark)
        assert fill(path, clients) == []  # that of the generation which serves is full, too
        rescue.open()
        os.close(gate)
        all_are_answered([*before, *waiting])


@pytest.mark.costly
def test_what_a_killed_protector_leaves_is_removed_by_the_next_start(
    protector: Starter, path: Path
) -> None:
    words = (*MODE, f"unix:{path}", "--", *SERVER)
    daemon = protector(*words).ready()
    daemon.reload()
    left = own_files(path)
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.process.wait()  # its log ends with the workers
    for pid in spawned(daemon):
        os.kill(pid, signal.SIGKILL)
    assert wait_gone(spawned(daemon)) == []
    assert own_files(path) == left

    daemon = protector(*words).ready()

    assert len(own_files(path)) == 2
    assert not set(own_files(path)) & set(left)
    daemon.stop()
    assert list(path.parent.iterdir()) == []


@pytest.mark.costly
def test_a_start_names_the_worker_that_has_the_path_of_a_killed_protector(
    protector: Starter, path: Path
) -> None:
    words = (*MODE, f"unix:{path}", "--", *SERVER)
    daemon = protector(*words).ready()
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.process.wait()
    (worker_pid,) = spawned(daemon)

    refused = protector(*words)

    assert refused.wait() == 111
    assert f"process {worker_pid} (" in refused.log.text()
    os.kill(worker_pid, signal.SIGKILL)
    assert wait_gone([worker_pid]) == []
    protector(*words).ready().stop()
    assert list(path.parent.iterdir()) == []


def test_a_release_that_shuts_its_socket_down_harms_no_client(
    one: Operated, path: Path, release: Release, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    with Load(f"unix:{path}") as load:
        release.becomes(*worker("breaks_its_socket", gate.path))
        mark = one.daemon.signal(signal.SIGHUP)
        one.daemon.log.wait_for("^waits$", after=mark)
        gate.open()
        one.daemon.log.wait_for("event=reload-failed generation=2 ", after=mark)
        served(load)
    release.becomes(*SERVER)
    one.daemon.reload()

    assert load.snapshot().failures == ()


@needs.ANOTHER_USER
@pytest.mark.parametrize(
    ("owned", "query", "said"),
    [
        (True, "?user=nobody", ""),
        (True, "", "the socket does not belong to user nobody: add \\?user=nobody"),
        (False, "?user=nobody", "user nobody cannot make files in .*: chown nobody "),
        (False, "", "make files in .*; the socket does not belong to user nobody: add "),
        (
            True,
            "?user=nobody&mode=0660&group=root",
            "user nobody is not in the socket's group root: add --group root",
        ),
    ],
)
def test_another_user_needs_the_folder_and_the_file(
    command: Command, owned: bool, query: str, said: str
) -> None:
    path = command.start.folder / "run" / "s"
    path.parent.mkdir()
    if owned:
        os.chown(path.parent, NOBODY, -1)
    server = command.worker("accepts", "--ready", "never")
    command.up("--user", "nobody", *MODE, f"unix:{path}{query}", "--", *server)

    found = re.findall("no second socket [^\\n]*", command.start.log)

    assert [re.search(said, each) is not None for each in found] == [True] * bool(said)
    # One socket is for a hold; without the folder or the file there is none.
    assert len(own_files(path)) == (2 if not said else 1 if "group" in query else 0)


@pytest.mark.costly
def test_many_paths_have_their_sockets_each_at_every_reload(
    protector: Starter, path: Path, release: Release
) -> None:
    release.becomes(*SERVER)
    paths = [path.parent / f"s{number}" for number in range(rounds(12, 60))]
    daemon = protector(*MODE, *(f"unix:{each}" for each in paths), "--", release.path).ready()
    for _ in range(3):
        daemon.reload()
        serving = {pid_in(ask(str(each))) for each in paths}

        assert serving == {spawned(daemon)[-1]}
    daemon.stop()
    assert list(path.parent.iterdir()) == []


@needs.ANOTHER_USER
@pytest.mark.costly
def test_a_reload_fails_while_the_user_cannot_make_files_beside_the_path(command: Command) -> None:
    path = command.start.folder / "run" / "s"
    path.parent.mkdir()
    os.chown(path.parent, NOBODY, -1)
    server = command.worker("accepts", "--ready", "never")
    command.up("--user", "nobody", *MODE, f"unix:{path}?user=nobody", "--", *server)
    with Load(f"unix:{path}") as load:
        served(load)
        os.chown(path.parent, 0, -1)
        os.kill(command.protector, signal.SIGHUP)
        eventually(lambda: "event=reload-failed" in command.start.log, "the reload fails")
        served(load)
        os.chown(path.parent, NOBODY, -1)
        os.kill(command.protector, signal.SIGHUP)
        eventually(lambda: "event=reloaded" in command.start.log, "the reload succeeds")
        served(load)

    assert re.search(f"reload-failed .*{path.parent}: Permission denied", command.start.log)
    assert "event=not-steered" not in command.start.log
    assert load.snapshot().failures == ()
