"""systemd's file descriptor store, played by the test as sd_notify(3) and sd_listen_fds(3) say."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests import needs
from tests.load import Load
from tests.procfs import children_of, kinds_of
from tests.running import Client, ask, eventually, wait_gone
from tests.scenarios.adopting import ROUNDS, Chance, at_rest, served
from tests.scenarios.managers import MANY, OWN, Service, of_generation, wait_stored
from tests.scenarios.operating import Line
from tests.scenarios.tools import EITHER_HANDOFF, Gate, Release, hold, pid_in, spawned, worker


def test_what_is_stored_is_what_lives_and_at_the_end_nothing_is(service: Service) -> None:
    service.start("127.0.0.1:0", "--", *MANY)
    service.wait_for("READY")
    wait_stored(service, OWN | of_generation(1, 1))

    service.main.reload()
    wait_stored(service, OWN | of_generation(2, 2))

    service.main.stop()
    wait_stored(service, set())
    assert not service.pid_file.exists()


def test_killed_and_started_again_it_goes_on(service: Service) -> None:
    words = ("127.0.0.1:0", "--workers", "2", "--", *MANY)
    first = service.start(*words).ready()
    service.wait_for("READY")
    port, workers = first.port, spawned(first)
    inode = service.pid_file.stat().st_ino
    with Client(("127.0.0.1", port)) as held:
        holder = pid_in(held.ask())

        service.kill()
        waiting = [Client(("127.0.0.1", port), f"hello {number}") for number in range(5)]
        second = service.start(*words)

        ready = service.wait_for("READY")
        assert ready["MAINPID"] == str(second.pid)
        for number, client in enumerate(waiting):
            line = client.hear()
            assert line.endswith(f" hello {number}")
            assert pid_in(line) in workers
            client.close()
        assert pid_in(held.ask()) == holder in workers
    assert service.pid_file.read_text() == f"{second.pid}\n"
    assert service.pid_file.stat().st_ino == inode

    os.kill(workers[0], signal.SIGKILL)  # no child of its own any more, and no guard to report it
    second.log.wait_for("event=worker-ready generation=1 worker=3")
    second.reload()
    assert wait_gone(workers) == []
    second.stop()
    wait_stored(service, set())


@pytest.mark.parametrize("file", ["", "unit.log"], ids=["the journal", "a file of the unit"])
def test_started_again_it_and_its_workers_write_to_its_log_file_and_not_to_stderr(
    service: Service, tmp_path: Path, free_port: Callable[[], int], file: str
) -> None:
    """file: of the unit's StandardError=append:FILE."""
    unit = tmp_path / file
    under = ("/bin/sh", "-c", f'exec "$0" "$@" 2>>{unit}') if file else ()
    log, port = tmp_path / "web.log", free_port()
    words = ("--log-file", str(log), f"127.0.0.1:{port}", "--", *worker("prints"))
    service.start(*words, under=under)
    service.wait_for("READY")

    service.kill()
    second = service.start(*words, under=under)
    ask(("127.0.0.1", port), "from a worker")
    eventually(lambda: "\nfrom a worker\n" in log.read_text(), "the line of the worker")

    assert "event=resumed" in log.read_text()
    assert second.log.text() == (unit.read_text() if file else "") == ""


@pytest.mark.costly
def test_what_was_queued_with_workers_that_stand_still_is_served(service: Service) -> None:
    """But the one that it may have in hand: it has not written that down, or sends it again."""
    words = ("--queue", "6", "127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    [pid] = spawned(first)
    hold(pid)
    clients = [Client(("127.0.0.1", first.port), f"hello {number}") for number in range(20)]

    eventually(lambda: "sp.hand.1" in service.store, "an undelivered connection")
    service.kill()
    second = service.start(*words)
    second.log.wait_for("event=route")
    os.kill(pid, signal.SIGCONT)

    lost = 0
    for number, client in enumerate(clients):
        reply = ""
        with suppress(ConnectionResetError):
            reply = client.hear()
        assert reply in (f"[{pid}] hello {number}", "")
        lost += not reply
        client.close()
    assert lost <= 1
    wait_stored(service, OWN | of_generation(1, 1))
    second.stop()


@pytest.mark.costly
def test_a_client_that_finds_no_room_in_the_store_is_counted_if_a_kill_loses_it(
    service: Service, tmp_path: Path
) -> None:
    stored = OWN | of_generation(1, 1)
    service.environment["FDSTORE"] = str(len(stored))
    control = tmp_path / "control"
    options = ("--no-log-relay", "--queue", "6", "--control", str(control))
    words = (*options, "127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    wait_stored(service, stored)
    [pid] = spawned(first)
    hold(pid)
    mark = len(first.log.seen)
    clients = [Client(("127.0.0.1", first.port), f"hello {number}") for number in range(20)]
    first.log.wait_for("event=store-full", after=mark)
    with Line(control) as line:
        assert line.status()["lost"] == 0  # and the state has the undelivered connection
    service.kill()
    second = service.start(*words)
    second.log.wait_for("event=route")
    os.kill(pid, signal.SIGCONT)

    lost = 0
    for client in clients:
        reply = ""
        with client, suppress(ConnectionResetError):
            reply = client.hear()
        lost += not reply
    with Line(control) as line:
        counted = line.status()["lost"]
    assert counted == 1
    assert lost - counted in (0, 1)  # it may have had another one in hand
    second.stop()


@pytest.mark.costly
def test_undelivered_clients_wait_while_the_state_cannot_be_written_and_the_log_says_why(
    service: Service,
) -> None:
    words = ("--queue", "6", "127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    [pid] = spawned(first)
    hold(pid)
    clients = [Client(("127.0.0.1", first.port), f"hello {number}") for number in range(20)]
    eventually(lambda: "sp.hand.1" in service.store, "an undelivered connection")

    before = resource.prlimit(first.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(first.pid, resource.RLIMIT_FSIZE, (1, before[1]))
    os.kill(pid, signal.SIGCONT)
    first.log.wait_for('event=state-not-written error="File too large"')
    eventually(lambda: all(client.has_answer() for client in clients[:5]), "the queue's clients")
    assert not clients[-1].has_answer()
    resource.prlimit(first.pid, resource.RLIMIT_FSIZE, before)

    for number, client in enumerate(clients):
        with client:
            assert client.hear() == f"[{pid}] hello {number}"
    assert not first.log.count("event=resources-exhausted")
    first.stop()


@pytest.mark.costly
def test_no_more_is_stored_than_systemd_can_pass_on_below_the_soft_limit(service: Service) -> None:
    service.environment["TEST_NOFILE"] = "100"
    words = ("127.0.0.1:0", "--workers", "12", "--", *MANY)  # 45 descriptors
    first = service.start(*words).ready()
    service.wait_for("READY")
    first.log.wait_for("event=store-full")
    mark = len(first.log.seen)
    first.signal(signal.SIGUSR2)
    first.log.wait_for("event=resumed", after=mark)
    first.reload()
    assert len(service.store) <= 36

    service.kill()
    second = service.start(*words)
    service.wait_for("READY")
    assert ask(("127.0.0.1", first.port))
    second.stop()
    wait_stored(service, set())


@pytest.mark.costly
# 8 are its own, 3 a generation's, 4 each worker's: no room for a channel, for half of one, for any
# worker, for half of one, for more than two generations need.  Where workers accept 2 more are its
# own: one's twin for the next generation, and the address reserved meanwhile.
@EITHER_HANDOFF
@pytest.mark.parametrize("room", [6, 8, 10, 14, 40])
def test_with_a_store_that_is_full_it_serves_after_a_kill_all_the_same(
    service: Service, room: int
) -> None:
    service.environment["FDSTORE"] = str(room)
    words = ("127.0.0.1:0", "--workers", "3", "--", *MANY)
    first = service.start(*words).ready()
    service.wait_for("READY")
    with Client(("127.0.0.1", first.port)) as held:
        held.ask()  # so that the generation before the last one is still there
        first.reload()
        assert (first.log.count("event=store-full") > 0) == (room < 40)
        workers = spawned(first)
        service.kill()
        assert len(service.store) <= room
        waiting = Client(("127.0.0.1", first.port))
        second = service.start(*words)
        service.wait_for(
            "READY"
        )  # not only an answer: a worker that it does not know gives one, too

        with waiting:
            waiting.ask()
    second.stop()
    assert wait_gone(workers) == []
    wait_stored(service, set())


@pytest.mark.parametrize("handoff", ["listener"], indirect=True)
@pytest.mark.costly
def test_of_a_worker_that_a_full_store_has_in_part_the_log_says_that(service: Service) -> None:
    service.environment["FDSTORE"] = "13"
    words = ("127.0.0.1:0", "--workers", "3", "--", *MANY)
    first = service.start(*words).ready()
    service.wait_for("READY")
    workers = spawned(first)
    eventually(lambda: "sp.worker.1.process" in service.store, "the first worker's process")
    assert "sp.worker.1.notify" not in service.store
    service.kill()
    second = service.start(*words)
    service.wait_for("READY")

    reason = "event=exited .*descriptors were not stored"
    eventually(lambda: second.log.count(reason) == len(workers), "the reason of each exit")
    assert not second.log.count("ended while no protector was running")
    second.stop()
    assert wait_gone(workers) == []


@pytest.mark.costly
def test_after_an_upgrade_with_a_full_store_what_was_left_out_is_stored_once_there_is_room(
    service: Service,
) -> None:
    service.environment["FDSTORE"] = "20"  # room for one generation, and not for two
    words = ("127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    service.wait_for("READY")
    with Client(("127.0.0.1", first.port)) as held:
        held.ask()  # so that the first generation stays
        first.reload()
        [_, worker] = spawned(first)
        mark = first.signal(signal.SIGUSR2)
        first.log.wait_for("event=resumed", after=mark)
        first.log.wait_for("event=store-full", after=mark)
        assert len(service.store) <= 20
    wait_stored(service, OWN | of_generation(2, 2))

    service.kill()
    second = service.start(*words)
    service.wait_for("READY")

    assert pid_in(ask(("127.0.0.1", first.port))) == worker
    second.stop()
    wait_stored(service, set())


@pytest.mark.slow
@pytest.mark.costly
def test_killed_under_load_again_and_again_it_loses_one_connection_a_time_at_most(
    service: Service,
) -> None:
    chance = Chance()
    words = ("127.0.0.1:0", "--", *MANY)
    port = service.start(*words).ready().port
    service.wait_for("READY")
    lost = []
    with Load(f"127.0.0.1:{port}", concurrency=16) as load:
        for _ in range(ROUNDS // 2):
            served(load)
            failed = len(load.snapshot().failures)
            chance.moment(0.05)
            service.kill()
            service.start(*words)
            service.wait_for("READY")
            served(load, 32)
            lost.append(len(load.snapshot().failures) - failed)
    seen = load.snapshot()

    print(f"{len(lost)} kills, {sum(lost)} connections lost, {seen.connections} served")
    assert max(lost) <= 1
    assert set(seen.pids) == set(spawned(service.started[0]))
    wait_stored(service, OWN | of_generation(1, 1))
    service.main.stop()
    wait_stored(service, set())


def test_killed_during_a_reload_the_new_generation_takes_over(
    service: Service, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*MANY)
    words = ("127.0.0.1:0", "--", release.path)
    first = service.start(*words).ready()
    gate = Gate(tmp_path / "gate")
    release.becomes(*gate.before(*MANY))
    first.signal(signal.SIGHUP)
    [new] = spawned(first, 2)
    wait_stored(service, OWN | of_generation(1, 1) | of_generation(2, 2))
    port = first.port
    first.log.wait_for("event=reopened", after=first.signal(signal.SIGUSR1))
    service.said.clear()

    service.kill()
    second = service.start(*words)

    service.wait_for("READY")
    service.wait_for("RELOADING")
    gate.open()
    assert service.wait_for("READY")["STATUS"] == "generation 2 is serving"
    assert pid_in(ask(("127.0.0.1", port))) == new
    second.stop()


@pytest.mark.costly
def test_killed_during_a_dry_run_it_goes_on_with_that_and_switches_to_nothing(
    service: Service, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*MANY)
    control = tmp_path / "control"
    words = ("--control", control, "127.0.0.1:0", "--", release.path)
    first = service.start(*words).ready()
    [old], port = spawned(first), first.port
    gate = Gate(tmp_path / "gate")
    release.becomes(*gate.before(*MANY))
    with Line(control) as line:
        line.ask("reload", dry_run=True)
    wait_stored(service, OWN | {"sp.control"} | of_generation(1, 1) | of_generation(2, 2))
    at_rest(first)

    service.kill()
    second = service.start(*words)

    second.log.wait_for("event=route generation=1")
    gate.open()
    second.log.wait_for("event=dry-run-passed generation=2")
    second.log.wait_for("event=drained generation=2")
    assert pid_in(ask(("127.0.0.1", port))) == old
    second.stop()


@pytest.mark.costly
def test_killed_while_a_generation_settles_it_asks_on(service: Service, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    settles = ("--settle", "60s", "--settle-check", f"! test -e {bad}")
    words = (*settles, "127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    [old], port = spawned(first), first.port
    first.signal(signal.SIGHUP)
    first.log.wait_for("event=route generation=2")
    wait_stored(service, OWN | of_generation(1, 1) | of_generation(2, 2))
    at_rest(first)

    service.kill()
    second = service.start(*words)
    second.log.wait_for("event=route generation=2")
    bad.touch()

    second.log.wait_for("event=reload-failed generation=2 reason=.*--settle-check: sh: exited")
    assert pid_in(ask(("127.0.0.1", port))) == old
    second.stop()


@pytest.mark.costly
def test_killed_while_it_stops_it_goes_on_to_stop(service: Service) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    with Client(("127.0.0.1", first.port)) as held:
        pid = pid_in(held.ask())
        first.signal(signal.SIGTERM)
        service.wait_for("STOPPING")
        service.kill()

        second = service.start(*words)
        service.wait_for("STOPPING")
        assert pid_in(held.ask()) == pid
    assert second.wait() == 0
    wait_stored(service, set())
    assert not service.pid_file.exists()


@needs.programs("strace")
@pytest.mark.costly
def test_a_program_told_to_stop_before_it_has_resumed_resumes_to_stop(service: Service) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    with Client(("127.0.0.1", first.port)) as held:
        pid = pid_in(held.ask())
        service.wait_for("READY")
        service.kill()

        # It is not blocked in a process that systemd starts, and no handler is installed yet.
        early = ("strace", "-D", "-qq", "-o", "/dev/null", "-e", "inject=chdir:signal=TERM:when=1")
        second = service.start(*words, under=early)
        service.wait_for("STOPPING")
        assert pid_in(held.ask()) == pid
    assert second.wait() == 0
    assert wait_gone([pid]) == []
    wait_stored(service, set())


def test_a_state_it_cannot_read_is_refused_and_the_workers_finish(service: Service) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    first = service.start(*words).ready()
    service.wait_for("READY")
    wait_stored(service, OWN | of_generation(1, 1))
    service.kill()
    for slot in (0, 1):
        os.pwrite(service.store["sp.state"], b"\0", slot * 64 * 1024 * 1024)

    second = service.start(*words)

    assert second.wait() == 111
    assert second.log.count("no whole state")
    assert not second.log.count("During handling")
    wait_stored(service, set())  # so that the next start is a fresh one
    third = service.start("127.0.0.1:0", "--", *MANY).ready()
    assert wait_gone(spawned(first)) == []
    third.stop()


@pytest.mark.costly
def test_nothing_is_left_open_that_was_stored_and_not_known(service: Service) -> None:
    words = ("127.0.0.1:0", "--", *MANY)
    service.start(*words).ready()
    service.wait_for("READY")
    wait_stored(service, OWN | of_generation(1, 1))
    service.kill()
    for name in ("sp.worker.9.line", "sp.channel.7.read", "sp.hand.5", "web"):
        service.store[name] = os.dup(service.store["sp.worker.1.line"])

    second = service.start(*words)

    service.wait_for("READY")
    wait_stored(service, OWN | of_generation(1, 1) | {"web"})  # not its own to remove
    targets = kinds_of(second.pid)
    second.log.wait_for("event=reopened", after=second.signal(signal.SIGUSR1))
    service.kill()
    third = service.start(*words)
    service.wait_for("READY")
    third.log.wait_for("event=reopened", after=third.signal(signal.SIGUSR1))
    assert kinds_of(third.pid)["socket"] == targets["socket"]
    assert children_of(third.pid) == []
    third.stop()
