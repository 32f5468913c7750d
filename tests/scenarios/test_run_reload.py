"""Reloads: what serves, what drains, what is given up, and what clients notice (nothing)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from socketprotector.demo.seen import Snapshot
from socketprotector.launch.options import OPTIONS
from socketprotector.model.duration import Duration
from tests.load import Load
from tests.procfs import state_of
from tests.rounds import rounds
from tests.running import FAIR_START_S, Client, Protector, eventually, wait_gone
from tests.scenarios.adopting import at_rest
from tests.scenarios.tools import EITHER_HANDOFF, Gate, Release, hold, pid_in, spawned, worker

Start = Callable[..., Protector]
HUP, TERM = signal.SIGHUP, signal.SIGTERM


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@pytest.fixture
def release(tmp_path: Path) -> Release:
    made = Release(tmp_path / "daemon")
    made.becomes(*worker("many"))
    return made


def deployed(folder: Path, *commands: tuple[str, ...]) -> Path:
    """Releases 1, 2, ... that say so on stderr, and a symlink `current` to the first."""
    for name, command in enumerate(commands, 1):
        (folder / str(name)).mkdir()
        text = f"#!/bin/sh\necho from={name} >&2\nexec {' '.join(command)}\n"
        Release(folder / str(name) / "daemon").write(text)
    (folder / "current").symlink_to("1")
    return folder / "current"


def deploy(current: Path, name: str) -> None:
    new = current.with_name("new")
    new.symlink_to(name)
    new.rename(current)


def all_answered(seen: Snapshot) -> None:
    assert seen.failures == ()
    assert seen.connections == seen.begun


@pytest.mark.slow
def test_reloads_under_load_lose_no_connection(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    load = Load(f"127.0.0.1:{daemon.port}", concurrency=16).start()

    reloads = rounds(10, 400)
    for number in range(reloads):
        daemon.reload()
        if number % 2:  # the others may be replaced before they have answered anything
            (new,) = spawned(daemon, number + 2)
            load.wait_for(lambda now: new in now.pids)  # noqa: B023 (called here)

    seen = load.stop()
    all_answered(seen)
    daemon.stop()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("exits", "cannot read the configuration"),
        ("hangs", f"not ready within {FAIR_START_S}s"),
        ("is missing", "No such file"),
        ("is not executable", "not executable"),
        ("is no program", "Exec format error"),
    ],
)
@EITHER_HANDOFF
def test_a_release_that_does_not_start_changes_nothing_for_clients(
    fault: str, reason: str, protector: Start, release: Release
) -> None:
    limit = ("--start-timeout", f"{FAIR_START_S}s") if fault == "hangs" else ()
    daemon = protector(*limit, "127.0.0.1:0", "--", release.path).ready()
    load = Load(f"127.0.0.1:{daemon.port}", concurrency=4).start()
    match fault:
        case "exits":
            release.becomes(*worker("dies_before_ready"))
        case "hangs":
            release.becomes(*worker("never_ready"))
        case "is missing":
            release.path.unlink()
        case "is not executable":
            release.write("#!/bin/sh\nexit 0\n", mode=0o644)
        case "is no program":
            release.write("\0\0no program")

    mark = daemon.signal(HUP)
    said = daemon.log.wait_for("event=reload-failed", after=mark)

    assert reason in said or reason in daemon.log.text()
    before = load.snapshot()
    load.wait_for(lambda now: now.connections > before.connections + 10)
    release.becomes(*worker("many"))
    daemon.reload()
    seen = load.stop()
    all_answered(seen)
    assert set(seen.pids) <= {spawned(daemon)[0], spawned(daemon)[-1]}
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_release_that_crashes_after_ready_is_respawned_until_a_better_one_comes(
    protector: Start, release: Release, gate: Gate
) -> None:
    daemon = protector("127.0.0.1:0", "--", release.path).ready()
    load = Load(f"127.0.0.1:{daemon.port}", concurrency=4).start()
    load.wait_for(lambda now: now.connections > 10)
    release.becomes(*worker("dies_after_ready", gate.path))
    daemon.reload()

    for _ in range(3):
        mark = len(daemon.log.seen)
        gate.open()
        daemon.log.wait_for("event=exited generation=2", after=mark)
        daemon.log.wait_for("event=worker-ready generation=2", after=mark)
    release.becomes(*worker("many"))
    daemon.reload()
    gate.stay_open()  # the old worker may end by its signal before it waits there

    before = load.snapshot()
    load.wait_for(lambda now: now.connections > before.connections + 10)
    all_answered(load.stop())
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_hup_during_a_reload_is_remembered_once(
    protector: Start, release: Release, gate: Gate
) -> None:
    daemon = protector("127.0.0.1:0", "--", release.path).ready()
    release.becomes(*gate.before(*worker("many")))
    mark = daemon.signal(HUP)
    daemon.log.wait_for("event=spawned generation=2", after=mark)

    for _ in range(3):
        mark = daemon.signal(HUP)
        daemon.log.wait_for("event=signal signal=SIGHUP", after=mark)
    gate.open()
    daemon.log.wait_for("event=reloaded generation=2")
    gate.open()
    daemon.log.wait_for("event=reloaded generation=3")
    with Client(("127.0.0.1", daemon.port)) as client:
        assert pid_in(client.ask()) == spawned(daemon, 3)[0]
    daemon.stop()
    assert daemon.log.count("event=spawned") == 3


@EITHER_HANDOFF
def test_term_during_a_reload_gives_it_up_and_stops(
    protector: Start, release: Release, gate: Gate
) -> None:
    daemon = protector("127.0.0.1:0", "--", release.path).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        serves = pid_in(client.ask())
        release.becomes(*worker("never_ready"))
        mark = daemon.signal(HUP)
        daemon.log.wait_for("event=spawned generation=2", after=mark)

        mark = daemon.signal(TERM)

        daemon.log.wait_for("event=exited generation=2", after=mark)
        assert pid_in(client.ask()) == serves  # the old one still finishes what it has
    assert daemon.wait() == 0
    assert daemon.log.count("event=reloaded") == 0


@EITHER_HANDOFF
def test_hup_while_workers_crash_in_a_loop_starts_the_new_command_at_once(
    protector: Start, release: Release
) -> None:
    daemon = protector("127.0.0.1:0", "--", release.path).ready()
    release.becomes(*worker("many"))
    daemon.reload()
    assert wait_gone(spawned(daemon, 1)) == []  # where workers accept the next one has its socket
    with Client(("127.0.0.1", daemon.port)) as client:
        first = pid_in(client.ask())
    release.path.unlink()  # so that no replacement can be started
    os.kill(first, signal.SIGKILL)
    eventually(lambda: daemon.log.count("cannot start") >= 4, "the back-off")

    with Client(("127.0.0.1", daemon.port), "who waits") as waiting:
        release.becomes(*worker("many"))
        daemon.reload()

        # One that HUP has started.  Beside it one of the old generation may come up, whose back-off
        # is just over; and where workers accept, one more is started if none does any more.
        assert pid_in(waiting.hear()) in set(spawned(daemon)) - {first, *spawned(daemon, 1)}
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_hup_with_every_worker_dead_serves_what_was_queued_for_them(
    protector: Start, release: Release
) -> None:
    daemon = protector("--workers", "3", "127.0.0.1:0", "--", release.path).ready()
    release.path.unlink()
    for pid in spawned(daemon):
        os.kill(pid, signal.SIGKILL)
    # Later lines of that loop are withheld, for all workers of the generation together.
    eventually(lambda: daemon.log.count("cannot start") >= 5, "the back-off of all three")
    waiting = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(20)]

    release.becomes(*worker("many"))
    daemon.reload()

    for number, client in enumerate(waiting):
        assert client.hear().endswith(f" line {number}")
        client.close()
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_worker_that_dies_while_others_are_not_ready_yet_fails_the_reload(
    protector: Start, release: Release, gate: Gate
) -> None:
    daemon = protector("--workers", "2", "127.0.0.1:0", "--", release.path).ready()
    dies, hangs = worker("dies_after_ready", gate.path), worker("never_ready")
    release.write(
        "#!/bin/sh\n"
        f'[ "${{SOCKETPROTECTOR_WORKER-$EINHORN_CHILD_INDEX}}" = 0 ] && exec {" ".join(dies)}\n'
        f"exec {' '.join(hangs)}\n"
    )
    mark = daemon.signal(HUP)
    daemon.log.wait_for("event=worker-ready generation=2", after=mark)

    gate.open()

    daemon.log.wait_for("event=reload-failed", after=mark)
    with Client(("127.0.0.1", daemon.port)) as client:
        assert pid_in(client.ask()) in spawned(daemon, 1)
    assert wait_gone(spawned(daemon, 2)) == []
    daemon.stop()


@EITHER_HANDOFF
def test_a_worker_that_is_dead_when_its_ready_is_read_fails_the_reload(
    protector: Start, release: Release, gate: Gate
) -> None:
    daemon = protector("127.0.0.1:0", "--", release.path).ready()
    release.becomes(*gate.before(*worker("dies_after_ready")))
    mark = daemon.signal(HUP)
    daemon.log.wait_for("event=spawned generation=2", after=mark)
    (pid,) = spawned(daemon, 2)

    hold(daemon.pid)
    gate.open()
    eventually(lambda: state_of(pid) == "Z", "its end")
    daemon.signal(signal.SIGCONT)

    said = daemon.log.wait_for("event=reload-failed", after=mark)
    assert "exited with status 1 as soon as it was ready" in said
    with Client(("127.0.0.1", daemon.port)) as client:
        assert pid_in(client.ask()) in spawned(daemon, 1)
    daemon.stop()


def test_a_worker_that_dies_while_settling_is_rolled_back_with_what_is_queued_for_it(
    protector: Start, release: Release, gate: Gate
) -> None:
    daemon = protector("--settle", "60s", "127.0.0.1:0", "--", release.path).ready()
    release.becomes(*worker("dies_after_ready", gate.path))
    mark = daemon.signal(HUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    queued = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(20)]

    gate.open()

    daemon.log.wait_for("event=reload-failed", after=mark)
    for number, client in enumerate(queued):
        reply = client.hear()
        assert pid_in(reply) == spawned(daemon, 1)[0]
        assert reply.endswith(f" line {number}")
        client.close()
    daemon.stop()


def test_a_time_may_be_longer_than_the_kernel_can_wait(protector: Start) -> None:
    """epoll_wait(2) takes 24.8 days at most; this is the longest that an option takes."""
    times = (
        word
        for option in OPTIONS
        # With --max-age there is something to look at now and then, and no long wait.
        if isinstance(option.kind, Duration) and option.key != "max-age"
        for word in (f"--{option.key}", "999999999")
    )
    canary = ("--canary", "99.99%")
    words = (*canary, *times, "--health", "accept", "127.0.0.1:0", "--", *worker("many"))
    daemon = protector(*words).ready()
    daemon.log.wait_for("event=healthy generation=1")

    mark = daemon.signal(HUP)
    daemon.log.wait_for("event=route generation=1 sharing=2", after=mark)
    for number in (1, 2):  # of 10,000 connections the first stays with the old generation
        with Client(("127.0.0.1", daemon.port)) as client:
            assert pid_in(client.ask()) in spawned(daemon, number)
    mark = daemon.signal(TERM)
    daemon.log.wait_for("event=lame-duck ", after=mark)
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_settle_keeps_the_old_generation_until_the_new_one_has_lived_that_long(
    protector: Start,
) -> None:
    daemon = protector("--settle", "300ms", "127.0.0.1:0", "--", *worker("many")).ready()

    daemon.reload()

    assert wait_gone(spawned(daemon, 1)) == []
    daemon.stop()
    said = daemon.log.text()
    marks = ("route generation=2", "reloaded generation=2", "exited generation=1")
    order = [said.index(f"event={mark}") for mark in marks]
    assert order == sorted(order)


@EITHER_HANDOFF
def test_a_drain_that_takes_too_long_gets_term_then_kill_and_its_children_too(
    protector: Start, release: Release, handoff: str
) -> None:
    release.becomes(*worker("has_children"))
    limits = ("--drain-timeout", "0.3s", "--kill-timeout", "0.3s")
    daemon = protector(*limits, "127.0.0.1:0", "--", release.path).ready()
    child = int(daemon.log.wait_for("^child=").partition("=")[2])
    release.becomes(*worker("many"))

    daemon.reload()

    daemon.log.wait_for("event=exited generation=1 .*SIGKILL")
    said = [line.partition("event=")[2] for line in daemon.log.seen if "worker=1" in line]
    signals = ("TERM", "KILL") if handoff == "connection" else ("TERM", "TERM", "KILL")
    assert [line for line in said if line.startswith("signalled")] == [
        f"signalled worker=1 signal={each}" for each in signals
    ]
    assert wait_gone([child]) == []
    daemon.stop()


@EITHER_HANDOFF
def test_max_draining_ends_the_oldest(protector: Start) -> None:
    limits = ("--max-draining", "1", "--kill-timeout", "0.2s")
    daemon = protector(*limits, "127.0.0.1:0", "--", *worker("many")).ready()
    clients = []
    for _ in range(3):
        clients.append(Client(("127.0.0.1", daemon.port)))
        clients[-1].ask()
        daemon.reload()

    gone = wait_gone(spawned(daemon)[:2])

    assert gone == []
    assert pid_in(clients[2].ask()) == spawned(daemon, 3)[0]
    for client in clients:
        client.close()
    daemon.stop()


@pytest.mark.costly
def test_the_fourth_draining_generation_is_warned_about(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    clients = []
    for _ in range(4):
        clients.append(Client(("127.0.0.1", daemon.port)))
        clients[-1].ask()
        assert daemon.log.count("event=many-draining") == 0
        daemon.reload()

    daemon.log.wait_for('event=many-draining reason="4 generations"')
    for client in clients:
        client.close()
    daemon.stop()


@EITHER_HANDOFF
def test_stop_first_lets_the_old_generation_end_before_the_new_one_starts(
    protector: Start,
) -> None:
    daemon = protector("--reload-order", "stop-first", "127.0.0.1:0", "--", *worker("many")).ready()
    with Client(("127.0.0.1", daemon.port)) as served:
        old = pid_in(served.ask())
        mark = daemon.signal(HUP)
        daemon.log.wait_for("event=reloading", after=mark)
        at_rest(daemon)

        with Client(("127.0.0.1", daemon.port), "waits") as waiting:
            assert pid_in(served.ask()) == old
            assert daemon.log.count("event=spawned") == 1
            served.close()

            assert pid_in(waiting.hear()) == spawned(daemon, 2)[0]
    said = daemon.log.text()
    assert said.index("exited generation=1") < said.index("spawned generation=2")
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_stop_first_goes_back_to_the_previous_command_if_the_new_one_fails(
    protector: Start, tmp_path: Path
) -> None:
    current = deployed(tmp_path, worker("many"), worker("dies_before_ready"))
    daemon = protector(
        "--reload-order", "stop-first", "127.0.0.1:0", "--", current / "daemon"
    ).ready()
    deploy(current, "2")

    mark = daemon.signal(HUP)
    daemon.log.wait_for("event=reload-failed", after=mark)
    with Client(("127.0.0.1", daemon.port), "waits") as client:
        assert client.hear().endswith(" waits")

    daemon.log.wait_for("event=recovered", after=mark)
    daemon.stop()


@pytest.mark.slow
@pytest.mark.costly
def test_1000_slow_connections_drain_over_20_reloads(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    clients: list[tuple[Client, int]] = []
    for _ in range(20):
        new = [Client(("127.0.0.1", daemon.port), "first") for _ in range(50)]
        clients += [(client, pid_in(client.hear())) for client in new]
        daemon.reload()

    for client, _ in clients:
        client.say("second")
    for client, pid in clients:
        reply = client.hear()
        assert reply == f"[{pid}] second"
        client.close()

    assert {pid for _, pid in clients} == set(spawned(daemon)[:20])
    assert wait_gone(spawned(daemon)[:20]) == []
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_replacement_is_what_its_generation_was_started_as(
    protector: Start, tmp_path: Path
) -> None:
    """A deploy that was not reloaded yet never leaks into the old generation."""
    current = deployed(tmp_path, worker("many"), worker("many"))
    daemon = protector("127.0.0.1:0", "--", current / "daemon").ready()
    deploy(current, "2")

    os.kill(spawned(daemon)[0], signal.SIGKILL)
    eventually(lambda: daemon.log.count("event=worker-ready") == 2, "the replacement")
    eventually(lambda: daemon.log.count("from=1") == 2, "the lines of both workers")

    daemon.reload()
    eventually(lambda: daemon.log.count("from=2") == 1, "the new worker's line")
    daemon.stop()
