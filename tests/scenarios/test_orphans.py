"""What outlives a process that we supervise: told to finish, shown, and ended in time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.nginx import own_folders
from tests.procfs import children_of, state_of
from tests.running import Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import ECHO, at_rest, kill_protector, protector_pid, revived, upgrade
from tests.scenarios.operating import Operating
from tests.scenarios.tools import Release, pid_in, spawned, worker

Starter = Callable[..., Protector]
MODE = ("--handoff", "listener", "--ready", "notify")
PREFORK = worker("master", "v1")
STUBBORN = worker("master", "--stubborn", "v1")


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path / "daemon")


def here(daemon: Protector) -> tuple[str, int]:
    return "127.0.0.1", daemon.port


def children(daemon: Protector) -> list[int]:
    """The processes that workers have said they started."""
    return [int(line.partition("=")[2]) for line in daemon.log.seen if line.startswith("child=")]


def newest_children(daemon: Protector) -> list[int]:
    """Wait until the newest worker has two children; return them."""
    eventually(lambda: len(children(daemon)) >= 2, "both children")  # READY may come before
    return children(daemon)[-2:]


def kill_master(daemon: Protector) -> list[int]:
    """SIGKILL the newest worker, and wait until that is known; return its children."""
    orphans, mark = newest_children(daemon), len(daemon.log.seen)
    os.kill(spawned(daemon)[-1], signal.SIGKILL)
    daemon.log.wait_for("event=exited .*SIGKILL", after=mark)
    return orphans


def versions(daemon: Protector) -> set[str]:
    """What answers eight clients."""
    return {ask(here(daemon)).partition(" ")[2] for _ in range(8)}


def the_port_is_free(daemon: Protector) -> None:
    """Bind it as the next start would."""
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(here(daemon))
        again.listen()


# -- under listener handoff they would serve an old version ------------------------------


@pytest.mark.costly
def test_after_a_masters_death_all_answers_come_from_the_new_version(
    protector: Starter, release: Release
) -> None:
    release.becomes(*PREFORK)
    daemon = protector(*MODE, "127.0.0.1:0", "--", release.path).ready()
    orphans = kill_master(daemon)
    for version in ("v2", "v3"):
        release.becomes(*worker("master", version))
        daemon.reload()

    assert versions(daemon) == {"v3"}
    assert wait_gone(orphans) == []
    daemon.stop()
    assert wait_gone(children(daemon)) == []
    the_port_is_free(daemon)


@needs.programs("nginx")
def test_after_the_death_of_nginxs_master_all_answers_come_from_the_new_version(
    protector: Starter, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    port, conf = free_port(), tmp_path / "nginx.conf"

    def becomes(version: str) -> None:
        conf.write_text(
            "daemon off; worker_processes 2; error_log stderr notice; "
            f"pid {tmp_path}/{version}.pid; events {{}} http {{ access_log off; "
            f"{own_folders(tmp_path)} server {{ "
            f'listen 127.0.0.1:{port}; location / {{ return 200 "{version}"; }} }} }}'
        )

    def answers() -> set[bytes]:
        found = set()
        for _ in range(8):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                found.add(answer.read())
        return found

    becomes("v1")
    daemon = protector(
        *("--handoff", "listener", "--ready", "after:500ms", "--drain-signal", "QUIT"),
        *("--env", "NGINX={fd:http};", f"http=127.0.0.1:{port}?nonblock=1"),
        *("--", "nginx", "-c", conf, "-e", "stderr"),
    ).ready()
    [master] = spawned(daemon)
    eventually(lambda: len(children_of(master)) == 2, "nginx's two workers")
    orphans = children_of(master)
    os.kill(master, signal.SIGKILL)
    daemon.log.wait_for("event=exited .*SIGKILL")
    for version in ("v2", "v3"):
        becomes(version)
        daemon.reload()

    assert answers() == {b"v3"}
    assert wait_gone(orphans) == []
    orphans = children_of(spawned(daemon)[-1])
    daemon.stop()
    assert wait_gone(orphans) == []
    the_port_is_free(daemon)


def test_what_a_dead_master_leaves_finishes_what_it_serves_and_keeps_its_generation(
    operated: Operating,
) -> None:
    service = operated(*MODE, command=PREFORK)
    daemon = service.daemon
    with Client(here(daemon)) as client:
        child = pid_in(client.ask())
        eventually(lambda: len(children(daemon)) == 2, "the other child")
        other = next(pid for pid in children(daemon) if pid != child)
        [master] = spawned(daemon)

        kill_master(daemon)

        daemon.log.wait_for(rf"event=signalled worker=1 group={master} signal=TERM")
        assert wait_gone([other]) == []
        daemon.log.wait_for(rf"event=orphans generation=1 worker=1 group={master} ")
        daemon.log.wait_for("event=worker-ready generation=1 worker=2")
        states = {each["pid"]: each["state"] for each in service.generation(1)["workers"]}
        assert states == {master: "orphaned", spawned(daemon)[1]: "ready"}
        assert pid_in(client.ask()) == child
        daemon.reload()
        daemon.log.wait_for("event=exited generation=1 worker=2")
        eventually(lambda: len(service.pids(1)) == 1, "the end of the other one")
        assert service.pids(1) == [master]
    daemon.log.wait_for("event=orphans-gone generation=1 worker=1")
    daemon.log.wait_for("event=drained generation=1")
    daemon.stop()


@pytest.mark.costly
def test_at_the_stop_orphans_have_the_time_of_workers_and_then_the_port_is_free(
    protector: Starter,
) -> None:
    times = ("--stop-timeout", "300ms", "--kill-timeout", "300ms")
    daemon = protector(*MODE, *times, "127.0.0.1:0", "--", *STUBBORN).ready()
    orphans = kill_master(daemon)

    daemon.stop()

    assert wait_gone(orphans, 0) == []
    the_port_is_free(daemon)
    assert "signalled worker=1 group" in daemon.log.wait_for("worker=1 .*signal=KILL")


@pytest.mark.costly
def test_orphans_are_killed_kill_timeout_after_drain_timeout(
    protector: Starter, tmp_path: Path
) -> None:
    times = ("--drain-timeout", "300ms", "--stop-timeout", "300ms", "--kill-timeout", "300ms")
    daemon = protector(*MODE, *times, "127.0.0.1:0", "--", *STUBBORN).ready()

    orphans = kill_master(daemon)

    assert wait_gone(orphans) == []
    daemon.log.wait_for("event=signalled worker=1 group=.* signal=KILL")
    said = [line.partition("event=")[2] for line in daemon.log.seen if "worker=1 group=" in line]
    signs = [line.rpartition("=")[2] for line in said if line.startswith("signalled")]
    assert signs == ["TERM", "TERM", "KILL"]  # to drain; the time is up; at once
    daemon.stop()


def test_a_failed_start_leaves_no_orphan(protector: Starter, tmp_path: Path) -> None:
    """nginx' children, for one, have no environment by which they could be found."""
    script = "env -i sh -c 'trap : TERM; echo child=$$ >&2; while :; do sleep 1000 & wait; done' &"
    daemon = protector(
        *MODE, *("--kill-timeout", "300ms", "127.0.0.1:0"), "--", "sh", "-c", f"{script} sleep 0.1"
    )

    assert daemon.wait() == 3
    assert wait_gone(children(daemon), 0) == []


def test_what_a_failed_worker_leaves_gets_one_term(protector: Starter, tmp_path: Path) -> None:
    """Those in its group, and those that have left it: a second TERM may mean: at once."""
    counts = (
        "trap 'echo $0 got TERM >&2' TERM; echo $0 child=$$ >&2; : >$0;"
        " while :; do sleep 1000 & wait; done"
    )
    words = """
        sh -c "$1" stays & setsid sh -c "$1" detached &
        until [ -e stays ] && [ -e detached ]; do sleep 0.1; done
    """
    daemon = protector(
        *(*MODE, "--no-log-relay"),
        *("--kill-timeout", "5s", "--start-tries", "1", "--chdir", tmp_path, "127.0.0.1:0"),
        *("--", "sh", "-c", words, "-", counts),
    )

    assert daemon.wait() == 3
    for each in ("stays", "detached"):
        assert daemon.log.count(f"^{each} child=") == 1
        assert daemon.log.count(f"^{each} got TERM$") == 1
    assert daemon.log.count("event=left-behind .*signal=SIGTERM") >= 1


# -- any process reaps -------------------------------------------------------------------


@pytest.mark.costly
def test_a_master_that_dies_after_its_protector_leaves_no_child_that_serves_an_old_version(
    protector: Starter, release: Release
) -> None:
    release.becomes(*PREFORK)
    daemon = protector("--guard", *MODE, "127.0.0.1:0", "--", release.path).ready()
    [master] = spawned(daemon)
    revived(daemon, kill_protector(daemon))
    at_rest(daemon)

    orphans = kill_master(daemon)
    release.becomes(*worker("master", "v2"))
    daemon.reload()

    daemon.log.wait_for(rf"event=signalled worker=1 group={master} signal=TERM")
    assert versions(daemon) == {"v2"}
    assert wait_gone(orphans) == []
    daemon.stop()
    the_port_is_free(daemon)


@pytest.mark.costly
def test_a_master_that_dies_while_no_protector_lives_leaves_no_child_either(
    protector: Starter, release: Release
) -> None:
    release.becomes(*PREFORK)
    daemon = protector("--guard", *MODE, "127.0.0.1:0", "--", release.path).ready()
    [master], orphans = spawned(daemon), newest_children(daemon)
    # The guard cannot start another one before it goes on.
    daemon.process.send_signal(signal.SIGSTOP)
    kill_protector(daemon)
    os.kill(master, signal.SIGKILL)
    daemon.process.send_signal(signal.SIGCONT)

    daemon.log.wait_for("event=exited generation=1 worker=1 .*SIGKILL")
    release.becomes(*worker("master", "v2"))
    daemon.reload()

    assert versions(daemon) == {"v2"}
    assert wait_gone(orphans) == []
    daemon.stop()
    the_port_is_free(daemon)


@pytest.mark.parametrize("how", ["upgrade", "kill"])
def test_orphans_are_known_to_the_next_program(protector: Starter, how: str) -> None:
    times = ("--stop-timeout", "300ms", "--kill-timeout", "300ms")
    daemon = protector("--guard", *MODE, *times, "127.0.0.1:0", "--", *STUBBORN).ready()
    orphans = kill_master(daemon)
    daemon.log.wait_for("event=orphans generation=1 worker=1")

    if how == "upgrade":
        upgrade(daemon)
    else:
        revived(daemon, kill_protector(daemon))
    at_rest(daemon)

    daemon.stop()
    assert wait_gone(orphans, 0) == []
    the_port_is_free(daemon)


# -- elsewhere they finish ------------------------------------------------------------------


@pytest.mark.costly
def test_where_connections_are_handed_over_orphans_finish_and_end_at_the_limits(
    operated: Operating,
) -> None:
    times = ("--stop-timeout", "300ms", "--kill-timeout", "300ms")
    service = operated(*times, command=worker("has_children"))
    daemon = service.daemon
    daemon.log.wait_for("^child=")
    [child], [pid] = children(daemon), spawned(daemon)

    os.kill(pid, signal.SIGKILL)

    daemon.log.wait_for(rf"event=orphans generation=1 worker=1 group={pid} ")
    found = {each["pid"]: each for each in service.generation(1)["workers"]}
    assert (found[pid]["state"], found[pid]["accepted"]) == ("orphaned", None)
    assert daemon.log.count("event=signalled") == 0
    daemon.stop()
    assert wait_gone([child], 0) == []


@pytest.mark.costly
def test_there_a_child_is_known_whose_worker_died_while_no_protector_lived(
    protector: Starter,
) -> None:
    times = ("--stop-timeout", "300ms", "--kill-timeout", "300ms")
    daemon = protector("--guard", *times, "127.0.0.1:0", "--", *worker("has_children")).ready()
    daemon.log.wait_for("^child=")
    [child], [pid] = children(daemon), spawned(daemon)
    # The guard cannot start another protector before it goes on.
    daemon.process.send_signal(signal.SIGSTOP)
    kill_protector(daemon)
    os.kill(pid, signal.SIGKILL)
    daemon.process.send_signal(signal.SIGCONT)

    daemon.log.wait_for(rf"event=orphans generation=1 worker=1 group={pid} ")

    daemon.stop()
    assert wait_gone([child], 0) == []


# -- a worker that a killed protector had started, and not yet recorded --------------------


#: Accepts; QUIT makes it finish what it serves, and TERM ends it at once.
QUITS = """
import os, select, signal, socket
ended, wake = os.pipe2(os.O_NONBLOCK)
signal.set_wakeup_fd(wake)
signal.signal(signal.SIGQUIT, lambda *_: None)
listener = socket.socket(fileno=3)
while ended not in select.select([listener, ended], [], [])[0]:
    with listener.accept()[0] as client, client.makefile("rw") as lines:
        for line in lines:
            print(line, end="", file=lines, flush=True)
"""
BY_QUIT = ("--handoff", "listener", "--ready", "after:10ms", "--drain-signal", "QUIT")
LOST = {
    "library": ("127.0.0.1:0", "--", *ECHO),
    "signal": (*BY_QUIT, "127.0.0.1:0", "--", sys.executable, "-S", "-E", "-c", QUITS),
    "programs": ("--handoff", "stdio", "--workers", "1", "127.0.0.1:0", "--", "cat"),
}


def lose_worker(daemon: Protector) -> Client:
    """Kill the protector between a worker's start and its record; return the worker's client."""
    [first] = spawned(daemon)
    os.kill(first, signal.SIGSTOP)  # so that the client gets the next worker
    eventually(lambda: state_of(first) == "T", "the stop of the first worker")
    client = Client(here(daemon))
    # The first such call follows the start of the worker; the record comes later.
    stops = ("-e", "trace=pidfd_open", "-e", "inject=pidfd_open:signal=SIGSTOP")
    tracer = ("strace", *stops, "-p", str(protector_pid(daemon)))
    with subprocess.Popen(tracer, stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        assert b"attached" in strace.stderr.readline()
        os.kill(first, signal.SIGKILL)
        assert client.ask()
        mark = kill_protector(daemon)
        strace.stderr.read()
    revived(daemon, mark)
    daemon.log.wait_for("event=worker-ready", after=mark)
    return client


@pytest.mark.costly
@needs.programs("strace")
@pytest.mark.parametrize("words", LOST.values(), ids=LOST)
def test_a_worker_without_a_record_finishes_its_clients(
    protector: Starter, words: tuple[str, ...]
) -> None:
    daemon = protector("--guard", "--kill-timeout", "10ms", *words).ready()
    with lose_worker(daemon) as client:
        upgrade(daemon)
        at_rest(daemon)
        daemon.reload()
        daemon.reload()
        assert client.ask()
    daemon.log.wait_for("event=drained generation=1")
    signals = [line for line in daemon.log.seen if "event=signalled worker=2 group=" in line]
    assert [line.rpartition("=")[2] for line in signals] == ["QUIT"] * ("QUIT" in words)
    assert daemon.log.count("event=left-behind") == 0
    daemon.stop()


@needs.programs("strace")
@pytest.mark.parametrize("by", ["drain-timeout", "stop"])
@pytest.mark.costly
def test_a_worker_without_a_record_has_the_time_of_others(protector: Starter, by: str) -> None:
    limit = {"drain-timeout": ("--drain-timeout", "10ms")}.get(by, ("--stop-timeout", "10ms"))
    words = (*limit, "--kill-timeout", "10ms", "127.0.0.1:0", "--", *ECHO)
    daemon = protector("--guard", *words).ready()
    with lose_worker(daemon) as client:
        if by == "stop":
            daemon.stop()
        else:
            daemon.reload()
            daemon.log.wait_for("event=signalled worker=2 group=.* signal=KILL")
            daemon.stop()
        assert client.rest() == []
    assert wait_gone(spawned(daemon)) == []


@needs.programs("strace")
def test_a_worker_without_a_record_does_not_count_for_another(operated: Operating) -> None:
    service = operated("--guard", command=ECHO)
    with lose_worker(service.daemon):
        [ready] = [w for w in service.generation(1)["workers"] if w["state"] == "ready"]
        assert (ready["accepted"], ready["active"]) == (0, 0)
        assert service.generation(1)["active"] == 1
        with Client(here(service.daemon)) as client:
            assert pid_in(client.ask()) == ready["pid"]
    eventually(lambda: len(service.generation(1)["workers"]) == 1, "the end of the lost worker")
    assert service.generation(1)["accepted"] == 2
    service.daemon.stop()
