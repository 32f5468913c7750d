"""`--config`: read again at each reload, under load, and whatever happens meanwhile.

Run each way is what follows from listeners that come and go, with two sockets for each where
workers accept, and from when a generation is over.  Who reads the file, what it refuses and what
workers are started with is the same for both; a listener that is added where workers accept is
in test_handoff_listener.py and test_handoff_steering.py.
"""

from __future__ import annotations

import itertools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.load import Load
from tests.procfs import in_backlog, kinds_of
from tests.rounds import rounds, some
from tests.running import DEADLINE_S, FAIR_START_S, Address, Client, Protector, ask, eventually
from tests.scenarios.adopting import (
    Chance,
    Installation,
    at_rest,
    kill_protector,
    revived,
    served,
    upgrade,
)
from tests.scenarios.config_file import File
from tests.scenarios.starting import TELLS, Start, told
from tests.scenarios.tools import EITHER_HANDOFF, Gate, hold, no_more_open, pid_in, spawned, worker

MANY = worker("many")
#: Each part of it is tried each way; in `make test-all` all of it.
OUTLIVES = [
    ("kill", True, "connection"),
    ("upgrade", False, "connection"),
    ("kill", False, "listener"),
    ("upgrade", True, "listener"),
]
EACH = [*itertools.product(("kill", "upgrade"), (True, False), ("connection", "listener"))]
Starter = Callable[..., Protector]


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "web.toml").says()


@pytest.fixture
def configured(protector: Starter, file: File) -> Callable[..., Protector]:
    """A protector that serves by the file."""

    def start(*options: str) -> Protector:
        return protector("--no-control", *options, "--config", file.path).ready()

    return start


def listens(address: Address) -> bool:
    """Whether a client can connect."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(0.2)
        try:
            client.connect(address)
        except OSError:
            return False
        return True


def place(handoff: str, ever: int) -> int:
    """Which of its listeners the second one is to a worker: counted for ever, or as handed."""
    return ever if handoff == "connection" else 1


def failed_reload(daemon: Protector) -> str:
    """Ask for a reload that fails, and return the reason."""
    mark = daemon.signal(signal.SIGHUP)
    line = daemon.log.wait_for(r"event=(reloaded|reload-failed)\b", after=mark)
    assert "event=reload-failed" in line, daemon.log.text()
    return line.partition("reason=")[2]


# -- what a reload changes -------------------------------------------------------


def test_a_reload_changes_command_environment_and_number_of_workers(
    configured: Starter, file: File
) -> None:
    file.command = TELLS
    file.says(tables='[env]\nMODE = "old"\nGONE = "x"\n[limit]\nnofile = 300')
    daemon = configured()
    before = told(("127.0.0.1", daemon.port))

    file.command = ("/bin/sh", "-c", 'ARGUMENT=new exec "$@"', "sh", *TELLS)
    file.says('workers = 3\numask = "077"', '[env]\nMODE = "new"')
    daemon.reload()
    after = told(("127.0.0.1", daemon.port))

    assert (before["environment"]["MODE"], after["environment"]["MODE"]) == ("old", "new")
    assert "GONE" not in after["environment"]
    assert after["environment"]["ARGUMENT"] == "new"
    assert after["umask"] == 0o077
    assert len(spawned(daemon, 2)) == 3
    line = daemon.log.wait_for("event=configured")
    for change in (
        "workers: 1 -> 3",
        "umask: ",
        "env: changed MODE",
        "env: - GONE",
        "limit.nofile",
    ):
        assert change in line
    assert '"old"' not in line
    daemon.stop()


@pytest.mark.costly
def test_what_was_asked_of_workers_by_signal_stays_while_the_file_says_the_same(
    configured: Starter, file: File
) -> None:
    file.says("workers = 2")
    daemon = configured()
    daemon.signal(signal.SIGTTIN)
    eventually(lambda: len(spawned(daemon, 1)) == 3, "a third worker")

    daemon.reload()
    assert len(spawned(daemon, 2)) == 3

    file.says("workers = 1")
    daemon.reload()
    assert len(spawned(daemon, 3)) == 1


@pytest.mark.costly
@EITHER_HANDOFF
def test_a_new_policy_holds_from_the_reload_on_that_reads_it(
    configured: Starter, file: File, handoff: str
) -> None:
    daemon = configured()
    with Client(("127.0.0.1", daemon.port)) as kept:
        kept.ask()
        limits = 'drain-timeout = "100ms"\nkill-timeout = "100ms"'
        file.says(f'{limits}\nsettle = "10ms"\nlog-level = "debug"')

        daemon.reload()

        assert kept.hear() == ""  # its worker was ended
    daemon.log.wait_for(r"event=signalled worker=1 signal=KILL")
    sent = 1 if handoff == "connection" else 2  # the first one has it finish
    assert daemon.log.count("event=signalled worker=1 signal=TERM") == sent
    daemon.log.wait_for(r" debug ")


@pytest.mark.costly
def test_the_command_line_wins_at_a_reload_too(configured: Starter, file: File) -> None:
    daemon = configured("--workers", "2")
    file.says("workers = 5")

    daemon.reload()

    assert len(spawned(daemon, 2)) == 2


# -- listeners -------------------------------------------------------------------


@pytest.mark.costly
def test_an_added_listener_is_served_by_the_generation_that_knows_it(
    configured: Starter, file: File, tmp_path: Path
) -> None:
    file.command = TELLS
    file.says()
    daemon = configured()
    first = ("127.0.0.1", daemon.port)
    path = tmp_path / "s"
    file.listens += ["127.0.0.1:0?backlog=77", f"unix:{path}?mode=0600"]
    file.says()

    daemon.reload()
    line = daemon.log.wait_for(r"event=configured .*listen: \+ tcp:127")
    port = int(re.findall(r"\+ tcp:127.0.0.1:(\d+)", line)[0])

    assert [told(each)["listener"] for each in (first, ("127.0.0.1", port), str(path))] == [0, 1, 2]
    listeners = told(str(path))["environment"]["SOCKETPROTECTOR_LISTENERS"].split()
    assert listeners == [f"tcp:127.0.0.1:{first[1]}", f"tcp:127.0.0.1:{port}", f"unix:{path}"]
    assert path.stat().st_mode & 0o777 == 0o600
    daemon.stop()
    assert not path.exists()


@EITHER_HANDOFF
def test_a_removed_listener_leaves_its_place_and_an_added_one_gets_another(
    configured: Starter, file: File, tmp_path: Path, handoff: str
) -> None:
    file.command = TELLS
    path, other = tmp_path / "s", tmp_path / "t"
    file.listens += [f"unix:{path}"]
    file.says()
    daemon = configured()
    address = ("127.0.0.1", daemon.port)

    file.listens = ["127.0.0.1:0", f"unix:{other}"]
    file.says()
    daemon.reload()
    eventually(lambda: not path.exists(), "the removed socket's file is gone")

    assert told(str(other))["listener"] == place(handoff, 2)
    environment = told(address)["environment"]
    if handoff == "connection":
        listeners = environment["SOCKETPROTECTOR_LISTENERS"].split()
        assert listeners == [f"tcp:127.0.0.1:{address[1]}", "-", f"unix:{other}"]
    else:
        assert environment["SERVER_STARTER_PORT"] == f"127.0.0.1:{address[1]}=3;{other}=4"

    file.listens = ["127.0.0.1:0", f"unix:{path}"]
    file.says()
    daemon.reload()
    assert told(str(path))["listener"] == place(handoff, 3)

    adopted = upgrade(daemon)
    assert adopted.endswith(f'listen="tcp:127.0.0.1:{address[1]} unix:{path}"'), adopted


@pytest.mark.parametrize(
    ("kind", "clients", "handoff"),
    [
        ("tcp", 3, "connection"),
        ("unix", 3, "connection"),
        ("tcp", 30, "connection"),
        ("unix", 30, "connection"),
        # Where workers accept no client is sorted, and at a UNIX socket the kernel does not say who
        # waits: those that the old ones do not accept within a second are lost (docs/modes.md).
        ("tcp", 30, "listener"),
    ],
    indirect=["handoff"],
)
@pytest.mark.costly
def test_clients_waiting_at_a_removed_listener_are_served_by_workers_that_know_it(
    configured: Starter,
    file: File,
    tmp_path: Path,
    free_port: Callable[[], int],
    kind: str,
    clients: int,
) -> None:
    path = tmp_path / "s"
    port = free_port()
    removed = f"127.0.0.1:{port}" if kind == "tcp" else f"unix:{path}"
    file.listens += [removed]
    file.says("queue = 6")
    daemon = configured()
    (old,) = spawned(daemon, 1)
    hold(old)
    address = ("127.0.0.1", port) if kind == "tcp" else str(path)
    waiting = [Client(address, f"hello {number}") for number in range(clients)]
    staying = [Client(("127.0.0.1", daemon.port), "to the next") for _ in range(3)]
    if kind == "tcp" and clients > 20:
        eventually(lambda: in_backlog(port) > 5, "clients in the backlog")

    file.listens = ["127.0.0.1:0"]
    file.says("queue = 6")
    daemon.reload()
    for client in staying[1:]:
        client.close()
    os.kill(old, signal.SIGCONT)

    for number, client in enumerate(waiting):
        assert client.hear() == f"[{old}] hello {number}"
        client.close()
    eventually(lambda: not listens(address), "no process listens there any more")
    staying[0].close()
    assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon, 2)[0]
    daemon.log.wait_for("event=drained generation=1")
    daemon.stop()
    assert "lost=" not in daemon.log.text()


# -- reloads that fail -------------------------------------------------------------


@pytest.mark.costly
def test_more_workers_than_there_are_descriptors_for_are_a_failed_reload(
    configured: Starter, file: File
) -> None:
    daemon = configured()
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (200, 200))
    file.says("workers = 600")

    reason = failed_reload(daemon)

    assert "descriptors each, and the hard limit of 200 has room for" in reason
    assert f"{file.path} line 1: " in reason
    assert len(spawned(daemon)) == 1
    daemon.stop()


def test_a_file_with_mistakes_is_a_failed_reload_that_changes_nothing(
    configured: Starter, file: File
) -> None:
    daemon = configured()
    address = ("127.0.0.1", daemon.port)
    (pid,) = spawned(daemon, 1)
    at_rest(daemon)
    before = kinds_of(daemon.pid)
    file.says('workers = 0\ncolour = "red"')

    reason = failed_reload(daemon)

    assert (
        f"{file.path} line 1: workers: 0 is not in the range 1<=x<=1000000 (and 1 more)" in reason
    )
    daemon.log.wait_for(r"event=not-configured .*line 2: colour: unknown key")
    assert pid_in(ask(address)) == pid
    at_rest(daemon)
    no_more_open(before, daemon.pid)
    file.says("workers = 2")
    daemon.reload()
    assert len(spawned(daemon)) == 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('name = "other"', "cannot change at a reload: name: "),
        ('pid-file = "other"', "cannot change at a reload: pid-file: none -> "),
        ("guard = true", "cannot change at a reload: guard: false -> true; needs a restart"),
        ('log-file = "x"', "cannot change at a reload: log-file: "),
        ("foreground = 1", "must be true or false"),
        ("listen = 1", "Cannot overwrite a value"),
    ],
)
@pytest.mark.costly
def test_what_cannot_change_is_refused(
    configured: Starter, file: File, more: str, said: str
) -> None:
    daemon = configured()
    file.says(more)

    assert said in failed_reload(daemon)
    assert ask(("127.0.0.1", daemon.port)).endswith("hello")


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_listener_that_cannot_be_had_is_a_failed_reload_that_leaves_none(
    configured: Starter, file: File, tmp_path: Path
) -> None:
    daemon = configured()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file.listens = ["127.0.0.1:0", f"unix:{tmp_path}/s", f"127.0.0.1:{port}", "fd:web"]
        file.says()

        reason = failed_reload(daemon)

    assert f"cannot listen on 127.0.0.1:{port}" in reason
    daemon.log.wait_for("event=not-configured .*fd:web: sockets are passed only at a start")
    assert not (tmp_path / "s").exists()
    assert ask(("127.0.0.1", daemon.port)).endswith("hello")


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_generation_that_never_serves_takes_its_settings_and_listeners_along(
    configured: Starter, file: File, tmp_path: Path, handoff: str
) -> None:
    daemon = configured()
    at_rest(daemon)
    before = kinds_of(daemon.pid)
    file.listens += [f"unix:{tmp_path}/s"]
    file.command = worker("dies_before_ready")
    file.says("workers = 3")

    failed_reload(daemon)

    assert not (tmp_path / "s").exists()
    assert ask(("127.0.0.1", daemon.port)).endswith("hello")
    at_rest(daemon)
    no_more_open(before, daemon.pid)
    file.command = TELLS
    file.says("workers = 3")
    daemon.reload()
    # 1 was given to the one that failed.
    assert told(f"{tmp_path}/s")["listener"] == place(handoff, 2)


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_rollback_after_it_has_served_gives_up_what_was_added(
    configured: Starter, file: File, tmp_path: Path
) -> None:
    file.listens += [f"unix:{tmp_path}/old"]
    file.says()
    daemon = configured()
    file.listens[1] = f"unix:{tmp_path}/new"
    file.command = MANY
    file.says('settle = "30s"\nworkers = 2')
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    assert pid_in(ask(f"{tmp_path}/new")) in spawned(daemon, 2)
    waiting = Client(f"{tmp_path}/old", "waits while the new one settles")

    os.kill(spawned(daemon, 2)[0], signal.SIGKILL)
    daemon.log.wait_for("event=reload-failed generation=2", after=mark)

    assert pid_in(waiting.hear()) in spawned(daemon, 1)
    waiting.close()
    assert pid_in(ask(f"{tmp_path}/old")) in spawned(daemon, 1)
    eventually(lambda: not (tmp_path / "new").exists(), "the added socket's file is gone")
    eventually(lambda: len(spawned(daemon)) == 3, "as many workers as before")


@EITHER_HANDOFF
@pytest.mark.costly
def test_stop_first_goes_back_to_the_listeners_that_there_were(
    configured: Starter, file: File, tmp_path: Path
) -> None:
    file.listens += [f"unix:{tmp_path}/old"]
    file.says()
    daemon = configured()
    file.listens[1] = f"unix:{tmp_path}/new"
    file.command = worker("dies_before_ready")
    file.says('reload-order = "stop-first"')

    failed_reload(daemon)

    assert pid_in(ask(f"{tmp_path}/old")) in spawned(daemon, 3)
    eventually(lambda: not (tmp_path / "new").exists(), "the added socket's file is gone")
    file.command = MANY
    file.says('reload-order = "stop-first"')
    daemon.reload()
    assert ask(f"{tmp_path}/new").endswith("hello")
    assert not (tmp_path / "old").exists()


def test_the_detached_protector_reads_the_file_again(start: Start, file: File) -> None:
    file.command = TELLS
    file.says()
    start.up("--no-control", "--config", "web.toml", cwd=file.path.parent)
    file.says(tables='[env]\nMODE = "new"')

    start.reload()

    assert told(start.address)["environment"]["MODE"] == "new"
    start.stop()


# -- under load, and whatever happens -----------------------------------------------


@pytest.mark.slow
@EITHER_HANDOFF
@pytest.mark.costly
def test_reloads_with_changes_fail_no_connection(
    configured: Starter, file: File, tmp_path: Path, handoff: str
) -> None:
    daemon = configured()
    times = rounds(4, 40) if handoff == "connection" else rounds(2, 20)

    with Load(f"127.0.0.1:{daemon.port}", concurrency=16) as load:
        for number in range(times):
            file.listens = ["127.0.0.1:0", f"unix:{tmp_path}/s{number % 3}"]
            settle = f'settle = "{number % 2 * 20}ms"'
            file.says(f"workers = {1 + number % 3}\nqueue = {6 + number * 7}\n{settle}")
            daemon.reload()
            with Load(f"unix:{tmp_path}/s{number % 3}", concurrency=2) as other:
                served(other, 5)
            assert not other.snapshot().failures
            served(load, 10)

    assert not load.snapshot().failures
    assert daemon.log.count("event=reloaded") == times
    daemon.stop()
    assert "lost=" not in daemon.log.text()


def answers(path: str) -> bool:
    try:
        return ask(path) != ""
    except OSError:
        return False  # not bound yet, or shut down with the file before


@pytest.mark.slow
@EITHER_HANDOFF
@pytest.mark.costly
def test_a_kill_at_any_moment_of_a_reload_leaves_the_one_or_the_other(
    configured: Starter, file: File, tmp_path: Path, handoff: str
) -> None:
    chance = Chance()
    times = rounds(3, 40) if handoff == "connection" else rounds(2, 20)
    daemon = configured("--guard")

    with Load(f"127.0.0.1:{daemon.port}", concurrency=8) as load:
        for number in range(times):
            file.listens = ["127.0.0.1:0", f"unix:{tmp_path}/s{number % 3}"]
            file.says(f'workers = {1 + number % 3}\nsettle = "{number % 2 * 50}ms"')
            mark = daemon.signal(signal.SIGHUP)
            chance.moment(0.4)
            kill_protector(daemon)
            revived(daemon, mark)
            daemon.log.wait_for(r"event=(reloaded|reload-failed|route)\b", after=mark)
            served(load)
        file.says("workers = 2")
        mark = daemon.signal(signal.SIGHUP)
        daemon.log.wait_for(r"event=reloaded\b", after=mark)
        # Of the file before, perhaps, which a reload was about when the last kill came too late.
        eventually(lambda: answers(f"{tmp_path}/s{(times - 1) % 3}"), "the last listener")
        served(load)
    at_rest(daemon)
    daemon.stop()

    failures = load.snapshot().failures
    # Those that were between accept and send; where workers accept, none.
    assert len(failures) <= (times if handoff == "connection" else 0), failures


class Gated:
    """A protector of an installed release whose reader waits at a gate."""

    def __init__(self, installation: Installation, file: File, folder: Path) -> None:
        self.gate = Gate(folder / "gate")
        self.installation = installation
        self.file = file

    def start(self, *options: str) -> Protector:
        words = ("--no-control", *options, "--config", str(self.file.path))
        daemon = self.installation.start(*words).ready()
        self.installation.change(
            "one",
            "launch/reload_child",
            r"    descriptors = inherited.receive\(\)",
            f"    open({str(self.gate.path)!r}).read()\n    descriptors = inherited.receive()",
        )
        return daemon

    def through(self, daemon: Protector, pattern: str, mark: int) -> str:
        """Let all that come to the gate through, until the protector logs something."""
        return let_through(self.gate, daemon, pattern, mark)


def let_through(gate: Gate, daemon: Protector, pattern: str, mark: int) -> str:
    def said() -> bool:
        gate.let_through()
        return any(re.search(pattern, line) for line in daemon.log.seen[mark:])

    eventually(said, pattern)
    return daemon.log.wait_for(pattern, after=mark)


@pytest.fixture
def gated(installation: Installation, file: File, tmp_path: Path) -> Gated:
    return Gated(installation, file, tmp_path)


def reading(daemon: Protector) -> int:
    """Ask for a reload; return the log's length before, once the file is being read."""
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=reloading", after=mark)
    return mark


@pytest.mark.costly
def test_a_program_that_resumes_after_a_kill_rereads_the_file(gated: Gated) -> None:
    daemon = gated.start("--guard")
    gated.file.says("workers = 2")
    mark = reading(daemon)

    kill_protector(daemon)
    revived(daemon, mark)
    gated.through(daemon, "event=reloaded generation=2", mark)

    assert len(spawned(daemon, 2)) == 2
    daemon.stop()


@pytest.mark.costly
def test_a_socket_that_is_bound_anew_while_the_file_is_read_is_known_from_then_on(
    gated: Gated, tmp_path: Path
) -> None:
    path, attack = tmp_path / "s", Gate(tmp_path / "attack")
    gated.file.listens = [f"unix:{path}"]
    gated.file.command = worker("hostile_listener", "shuts_it_down", attack.path)
    quick = 'drain-timeout = "0.1s"\nkill-timeout = "0.1s"'
    keys = f'handoff = "listener"\nready = "notify"\n{quick}'
    gated.file.says(keys)
    daemon = gated.start("--guard")
    gated.file.command = worker("accepts")
    gated.file.says(keys)
    mark = reading(daemon)
    attack.open()
    daemon.log.wait_for("event=socket-replaced", after=mark)
    # Clients that wait at the new socket may get the last good command first, as a generation.
    line = gated.through(daemon, "event=reloaded", mark)
    number = int(line.partition(" generation=")[2].split()[0])

    revived(daemon, kill_protector(daemon))

    assert pid_in(ask(str(path))) == spawned(daemon, number)[0]
    for older in range(1, number):  # a stop has a limit of its own
        if any(f"spawned generation={older} " in each for each in daemon.log.seen):
            daemon.log.wait_for(f"event=drained generation={older}")
    daemon.stop()
    assert not path.exists()


@pytest.mark.costly
def test_an_upgrade_while_the_file_is_read_rereads_it(gated: Gated) -> None:
    daemon = gated.start()
    gated.file.says("workers = 2")
    mark = reading(daemon)

    assert "event=resumed" in upgrade(daemon)
    gated.through(daemon, "event=reloaded generation=2", mark)

    assert len(spawned(daemon, 2)) == 2
    daemon.stop()


@pytest.mark.parametrize(("how", "good", "handoff"), some(EACH, OUTLIVES), indirect=["handoff"])
def test_what_was_read_outlives_the_protector_until_it_serves_or_fails(
    protector: Starter,
    file: File,
    tmp_path: Path,
    free_port: Callable[[], int],
    how: str,
    good: bool,
    handoff: str,
) -> None:
    file.listens = [f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/s"]
    file.says()
    options = ("--guard",) if how == "kill" else ()
    daemon = protector("--no-control", *options, "--config", file.path).ready()
    gate = Gate(tmp_path / "gate")
    file.listens = [file.listens[0], f"unix:{tmp_path}/t"]
    file.command = gate.before(*(TELLS if good else ("/bin/false",)))
    file.says("workers = 2")
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=configured", after=mark)
    eventually(lambda: len(spawned(daemon, 2)) == 2, "both workers")
    at_rest(daemon)

    if how == "kill":
        kill_protector(daemon)
        revived(daemon, mark)
    else:
        assert "event=resumed" in upgrade(daemon)
    line = let_through(gate, daemon, "event=(reloaded|reload-failed)", mark)

    if good:
        assert "event=reloaded generation=2" in line
        assert told(f"{tmp_path}/t")["listener"] == place(handoff, 2)
        eventually(lambda: not (tmp_path / "s").exists(), "the removed socket's file is gone")
    else:
        assert "event=reload-failed generation=2" in line
        assert ask(f"{tmp_path}/s").endswith("hello")
        eventually(lambda: not (tmp_path / "t").exists(), "the added socket's file is gone")
    # It holds for later clients, too.
    file.command = TELLS
    file.says("workers = 2")
    daemon.reload()
    assert told(f"{tmp_path}/t")["listener"] == place(handoff, 2 if good else 3)
    if how == "upgrade":
        assert "event=resumed" in upgrade(daemon)
    assert told(f"{tmp_path}/t")["listener"] == place(handoff, 2 if good else 3)
    daemon.stop()
    assert [each.name for each in tmp_path.iterdir() if each.is_socket()] == []


@pytest.mark.costly
def test_a_stop_while_the_file_is_read_waits_for_nothing(gated: Gated) -> None:
    daemon = gated.start()
    reading(daemon)

    daemon.stop()


@pytest.mark.costly
def test_a_file_that_takes_too_long_to_read_is_a_failed_reload(gated: Gated) -> None:
    gated.file.says(f'start-timeout = "{FAIR_START_S}s"')
    daemon = gated.start()

    assert f"the configuration was not read within {FAIR_START_S}s" in failed_reload(daemon)
    gated.through(daemon, "event=reloaded", reading(daemon))


@pytest.mark.costly
def test_a_reader_that_cannot_be_executed_is_a_failed_reload(gated: Gated) -> None:
    daemon = gated.start()
    gated.installation.script("one", "raise SystemExit('a broken install')\n")

    assert "a broken install" in failed_reload(daemon)
    assert ask(("127.0.0.1", daemon.port)).endswith("hello")


@pytest.mark.costly
def test_a_wish_while_the_file_is_read_is_one_more_reload(gated: Gated) -> None:
    daemon = gated.start()
    mark = reading(daemon)
    for _ in range(3):
        more = daemon.signal(signal.SIGHUP)
        daemon.log.wait_for("event=signal signal=SIGHUP", after=more)

    gated.through(daemon, "event=reloaded generation=3", mark)
    at_rest(daemon)

    assert daemon.log.count("event=reloading") == 2


def test_no_module_of_the_launching_side_comes_into_the_resident_process() -> None:
    code = "import sys, socketprotector.daemon.resident; print(*sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )

    loaded = {*said.stdout.split()}
    assert not loaded & {"tomllib", "click", "difflib", "socketprotector.launch.config_file"}
