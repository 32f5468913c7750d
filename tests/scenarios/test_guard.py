"""`--guard`: the protector may be killed at any moment, and another one goes on."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from socketprotector.programs import guard
from tests.load import Load
from tests.procfs import children_of, descriptors, kinds_of, name_of, parent_of
from tests.rounds import rounds
from tests.running import DEADLINE_S, Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import (
    AS_ANOTHER_USER,
    ROUNDS,
    Chance,
    Installation,
    at_rest,
    kill_protector,
    protector_pid,
    revived,
    served,
    upgrade,
    wait_dead,
)
from tests.scenarios.config_file import File
from tests.scenarios.starting import Start, start_of
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    Gate,
    Release,
    hold,
    no_more_open,
    pid_in,
    spawned,
    worker,
)

MANY = worker("many")
Starter = Callable[..., Protector]


@pytest.fixture
def guarded(protector: Starter, tmp_path: Path) -> Callable[..., Protector]:
    """A guarded protector that serves: guarded(*options, command=...)."""

    def start(*options: str, command: tuple[str, ...] = MANY) -> Protector:
        pid_file = ("--pid-file", str(tmp_path / "pid"))
        return protector("--guard", *pid_file, *options, "127.0.0.1:0", "--", *command).ready()

    return start


def test_it_is_the_guard_that_is_started_and_named_in_the_pid_file(
    guarded: Starter, tmp_path: Path
) -> None:
    daemon = guarded()

    assert (tmp_path / "pid").read_text() == f"{daemon.pid}\n"
    assert protector_pid(daemon) != daemon.pid
    assert parent_of(protector_pid(daemon)) == daemon.pid
    for pid in (daemon.pid, protector_pid(daemon)):
        assert name_of(pid) == "SocketProtector"
    daemon.stop()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@EITHER_HANDOFF
def test_a_protector_killed_again_and_again_under_load_loses_one_connection_a_time_at_most(
    guarded: Starter, tmp_path: Path, handoff: str
) -> None:
    """Where workers accept, none: it accepts none."""
    chance = Chance()
    daemon = guarded()
    at_rest(daemon)
    before = kinds_of(protector_pid(daemon), daemon.pid)
    workers = spawned(daemon)
    kills = rounds(3, 100) if handoff == "connection" else rounds(3, 50)
    lost = []

    with Load(f"127.0.0.1:{daemon.port}", concurrency=16) as load:
        served(load)
        for _ in range(kills):
            failed = len(load.snapshot().failures)
            chance.moment(0.05)
            revived(daemon, kill_protector(daemon))
            seen = served(load, 32)  # each that was open then has ended since
            lost.append(len(seen.failures) - failed)
    seen = load.snapshot()

    print(f"{kills} kills, {sum(lost)} connections lost, {seen.connections} served")
    assert max(lost) <= (1 if handoff == "connection" else 0), lost
    assert {failure.kind for failure in seen.failures} <= {"reset", "empty"}
    assert spawned(daemon) == workers
    assert set(seen.pids) == set(workers)
    assert (tmp_path / "pid").read_text() == f"{daemon.pid}\n"
    no_more_open(before, protector_pid(daemon), daemon.pid)
    daemon.stop()


@pytest.mark.slow
@EITHER_HANDOFF
@pytest.mark.costly
def test_a_protector_killed_during_reloads_loses_no_generation(guarded: Starter) -> None:
    chance = Chance()
    daemon = guarded("--workers", "2")
    failed = 0

    with Load(f"127.0.0.1:{daemon.port}", concurrency=16) as load:
        for _ in range(ROUNDS // 2):
            served(load)
            failed = len(load.snapshot().failures)
            daemon.signal(signal.SIGHUP)
            chance.moment(0.1)
            revived(daemon, kill_protector(daemon))
            served(load, 32)
            assert len(load.snapshot().failures) - failed <= 1
    # Whatever became of each: one more reload works, and then two workers are left.
    daemon.log.wait_for(r"event=resumed")
    at_rest(daemon)
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for(r"event=reloaded\b", after=mark)
    old = [pid for pid in spawned(daemon) if pid not in newest(daemon)]
    assert wait_gone(old) == []
    daemon.stop()


def newest(daemon: Protector) -> list[int]:
    found = [int(line.split("generation=")[1].split()[0]) for line in lines(daemon, "spawned")]
    return spawned(daemon, max(found))


def lines(daemon: Protector, event: str) -> list[str]:
    return [line for line in list(daemon.log.seen) if f"event={event} " in line]


# --- the guard's own end --------------------------------------------------------


@EITHER_HANDOFF
@pytest.mark.costly
def test_without_its_guard_the_protector_goes_on_and_puts_its_own_pid_into_the_file(
    guarded: Starter, tmp_path: Path
) -> None:
    daemon = guarded()
    pid = protector_pid(daemon)
    inode = (tmp_path / "pid").stat().st_ino
    with Load(f"127.0.0.1:{daemon.port}", concurrency=8) as load:
        served(load)
        daemon.process.kill()
        daemon.log.wait_for("event=guard-died")
        served(load)
        assert (tmp_path / "pid").read_text() == f"{pid}\n"
        assert (tmp_path / "pid").stat().st_ino == inode

        os.kill(pid, signal.SIGHUP)
        daemon.log.wait_for("event=reloaded")
        served(load)
    assert load.snapshot().failures == ()

    os.kill(pid, signal.SIGTERM)
    assert wait_gone([pid]) == []
    assert list(tmp_path.iterdir()) == []


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_protector_that_lost_its_guard_after_it_was_adopted_replaces_workers_at_once(
    guarded: Starter,
) -> None:
    daemon = guarded()
    pid = revived(daemon, kill_protector(daemon))
    at_rest(daemon)
    daemon.process.kill()
    daemon.log.wait_for("event=guard-died")

    os.kill(spawned(daemon)[0], signal.SIGKILL)

    assert 'how="ended with an unknown status"' in daemon.log.wait_for("event=exited generation=1")
    assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon)[1]
    os.kill(pid, signal.SIGTERM)
    assert wait_gone([pid]) == []


@pytest.mark.costly
def test_upgraded_after_it_lost_its_guard_it_still_does_not_wait_to_hear_how_workers_ended(
    installation: Installation,
) -> None:
    installation.change("one", "daemon/post_mortem", r"_STATUS_S = .*", "_STATUS_S = 1000.0")
    daemon = installation.start("--guard", "127.0.0.1:0", "--", *MANY).ready()
    pid = revived(daemon, kill_protector(daemon))
    at_rest(daemon)
    daemon.process.kill()
    daemon.log.wait_for("event=guard-died")
    mark = len(daemon.log.seen)
    os.kill(pid, signal.SIGUSR2)
    daemon.log.wait_for("event=resumed", after=mark)

    os.kill(spawned(daemon)[0], signal.SIGKILL)

    assert 'how="ended with an unknown status"' in daemon.log.wait_for("event=exited generation=1")
    assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon)[1]
    os.kill(pid, signal.SIGTERM)
    assert wait_gone([pid]) == []


# --- workers of a protector that is gone -----------------------------------------


@EITHER_HANDOFF
@pytest.mark.costly
def test_how_an_adopted_worker_ended_comes_from_the_guard(guarded: Starter) -> None:
    daemon = guarded()
    revived(daemon, kill_protector(daemon))

    os.kill(spawned(daemon)[0], signal.SIGKILL)

    line = daemon.log.wait_for("event=exited generation=1 worker=1")
    assert 'how="was killed by SIGKILL"' in line
    answered = pid_in(ask(("127.0.0.1", daemon.port)))
    eventually(lambda: spawned(daemon)[1:] == [answered], "the log has the worker that answered")
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_worker_that_ends_while_no_protector_lives_is_replaced_and_its_end_known(
    guarded: Starter,
) -> None:
    daemon = guarded()
    first = spawned(daemon)[0]
    hold(daemon.pid)
    mark = kill_protector(daemon)
    wait_dead(protector_pid(daemon))
    os.kill(first, signal.SIGKILL)
    wait_dead(first)
    client = Client(("127.0.0.1", daemon.port), "hello")  # waits in the backlog

    os.kill(daemon.pid, signal.SIGCONT)

    revived(daemon, mark)
    line = daemon.log.wait_for("event=exited generation=1 worker=1")
    assert 'how="was killed by SIGKILL"' in line
    assert pid_in(client.hear()) == spawned(daemon)[1] != first
    client.close()
    daemon.stop()


# --- killed in every phase ---------------------------------------------------------


@EITHER_HANDOFF
@pytest.mark.costly
def test_killed_while_a_reload_is_under_way_the_new_generation_takes_over(
    guarded: Starter, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*MANY)
    daemon = guarded(command=(str(release.path),))
    gate = Gate(tmp_path / "gate")
    release.becomes(*gate.before(*MANY))
    daemon.signal(signal.SIGHUP)
    [second] = spawned(daemon, 2)
    at_rest(daemon)

    revived(daemon, kill_protector(daemon))
    assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon, 1)[0]
    gate.open()

    daemon.log.wait_for("event=reloaded")
    assert pid_in(ask(("127.0.0.1", daemon.port))) == second
    assert wait_gone(spawned(daemon, 1)) == []
    daemon.stop()


@EITHER_HANDOFF
def test_killed_while_a_generation_drains_its_connections_go_on(guarded: Starter) -> None:
    daemon = guarded()
    with Client(("127.0.0.1", daemon.port)) as held:
        first = pid_in(held.ask())
        daemon.reload()

        revived(daemon, kill_protector(daemon))

        assert pid_in(held.ask()) == first
        assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon, 2)[0]
    assert wait_gone([first]) == []
    assert "exited with status 0" in daemon.log.wait_for("event=exited generation=1")
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_killed_while_it_settles_it_still_settles(guarded: Starter) -> None:
    daemon = guarded("--settle", "1h")
    daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2")
    revived(daemon, kill_protector(daemon))
    at_rest(daemon)

    os.kill(spawned(daemon, 2)[0], signal.SIGKILL)  # so the old one takes over again

    daemon.log.wait_for("event=reload-failed generation=2")
    assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon, 1)[0]
    daemon.stop()


@EITHER_HANDOFF
def test_killed_during_a_stop_it_goes_on_to_stop(guarded: Starter, tmp_path: Path) -> None:
    daemon = guarded()
    with Client(("127.0.0.1", daemon.port)) as held:
        first = pid_in(held.ask())
        daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("event=stopping")

        revived(daemon, kill_protector(daemon))

        assert pid_in(held.ask()) == first
    assert daemon.wait() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@EITHER_HANDOFF
@pytest.mark.costly
def test_killed_at_any_moment_of_a_stop_it_stops(protector: Starter, tmp_path: Path) -> None:
    chance = Chance()
    for number in range(ROUNDS // 4):
        unix = tmp_path / f"socket-{number}"
        daemon = protector("--guard", "127.0.0.1:0", f"unix:{unix}", "--", *MANY).ready()
        daemon.signal(signal.SIGTERM)
        chance.moment(0.3)
        try:
            kill_protector(daemon)
        except ProcessLookupError:
            pass  # it was faster
        assert daemon.wait() == 0
    assert list(tmp_path.iterdir()) == []


@EITHER_HANDOFF
@pytest.mark.costly
def test_term_is_not_lost_when_the_protector_is_killed_right_after(guarded: Starter) -> None:
    daemon = guarded()
    hold(protector_pid(daemon))

    daemon.signal(signal.SIGTERM)
    kill_protector(daemon)

    assert daemon.wait() == 0


@pytest.mark.costly
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_second_stop_signal_is_not_lost_when_the_protector_is_killed_right_after(
    guarded: Starter, second: signal.Signals
) -> None:
    daemon = guarded()
    with Client(("127.0.0.1", daemon.port)) as held:
        held.ask()
        daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("event=stopping")
        hold(protector_pid(daemon))

        daemon.signal(second)
        kill_protector(daemon)

        assert daemon.wait() == 0, "the second signal ends the held connection"


@pytest.mark.parametrize(
    ("number", "done"),
    [
        (signal.SIGHUP, "event=reloaded generation=2"),
        (signal.SIGTTIN, "event=worker-ready generation=1 worker=2"),
        (signal.SIGUSR1, "event=reopened"),
        (signal.SIGUSR2, "event=upgrading"),
    ],
    ids=["HUP", "TTIN", "USR1", "USR2"],
)
def test_no_signal_is_lost_when_the_protector_is_killed_right_after(
    guarded: Starter, number: signal.Signals, done: str
) -> None:
    daemon = guarded()
    hold(protector_pid(daemon))

    daemon.signal(number)
    kill_protector(daemon)

    daemon.log.wait_for(done)
    revived(daemon, kill_protector(daemon))
    daemon.stop()
    assert len([line for line in daemon.log.seen if f"signal={number.name}" in line]) == 1


@pytest.mark.costly
def test_killed_before_anything_served_the_launcher_still_gets_its_verdict(
    start: Start, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    words: list[str | Path] = ["--guard", "--log-file", start.log_file, "127.0.0.1:0", "--"]
    with start_of(start, *words, *gate.before(*MANY)) as command:
        start.wait_for("event=spawned")
        start.send(signal.SIGUSR1)
        start.wait_for("event=reopened")
        guard = start.pid
        [pid] = re.findall(r"event=start pid=(\d+)", start.log)
        os.kill(int(pid), signal.SIGKILL)
        start.wait_for("event=resumed")
        gate.open()
        assert command.wait(DEADLINE_S) == 0, command.stderr
    assert start.pid == guard != int(pid)
    assert ask(start.address).endswith("] hello")
    start.stop()


@pytest.mark.costly
def test_killed_before_anything_served_a_failed_start_is_still_reported(
    start: Start, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    words: list[str | Path] = [
        "--guard",
        "--start-tries",
        "1",
        "--log-file",
        start.log_file,
        "127.0.0.1:0",
        "--",
    ]
    with start_of(start, *words, *gate.before("/bin/sh", "-c", "exit 7")) as command:
        start.wait_for("event=spawned")
        start.send(signal.SIGUSR1)
        start.wait_for("event=reopened")
        [pid] = re.findall(r"event=start pid=(\d+)", start.log)
        os.kill(int(pid), signal.SIGKILL)
        start.wait_for("event=resumed")
        gate.open()
        assert command.wait(DEADLINE_S) == 3
        assert command.stderr
        assert "exited with status 7" in command.stderr.read()
    gate.path.unlink()
    assert start.left() == []


# --- signals -------------------------------------------------------------------


@pytest.mark.costly
def test_signals_to_the_guard_reach_the_protector(guarded: Starter) -> None:
    daemon = guarded()

    daemon.reload()
    daemon.signal(signal.SIGTTIN)
    daemon.log.wait_for("event=worker-ready generation=2 worker=3")
    daemon.signal(signal.SIGTTOU)
    daemon.log.wait_for("event=exited generation=2")
    daemon.log.wait_for("event=reopened", after=daemon.signal(signal.SIGUSR1))
    daemon.signal(signal.SIGQUIT)

    assert daemon.wait() == 0


@EITHER_HANDOFF
@pytest.mark.costly
def test_upgraded_in_place_and_then_killed_it_goes_on(guarded: Starter, tmp_path: Path) -> None:
    daemon = guarded()
    pid = protector_pid(daemon)
    with Load(f"127.0.0.1:{daemon.port}", concurrency=8) as load:
        served(load)
        assert "event=resumed" in upgrade(daemon)
        assert protector_pid(daemon) == pid
        served(load)
        assert load.snapshot().failures == ()

        assert revived(daemon, kill_protector(daemon)) != pid
        served(load)
        assert "event=resumed" in upgrade(daemon)
        served(load)
    assert len(load.snapshot().failures) <= 1
    assert (tmp_path / "pid").read_text() == f"{daemon.pid}\n"
    assert len(spawned(daemon)) == 1
    daemon.stop()


# --- a log without a reader ----------------------------------------------------


def full_pipe() -> tuple[int, int]:
    """A pipe into which nothing fits any more, and whose write end waits for room."""
    receive, send = os.pipe()
    os.set_blocking(send, False)
    for piece in (b"x" * 4096, b"x"):
        while True:
            try:
                os.write(send, piece)
            except BlockingIOError:
                break
    os.set_blocking(send, True)
    return receive, send


def full_socket() -> tuple[int, int]:
    """The same of a socket, such as the journal's."""
    receive, send = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    send.setblocking(False)
    for piece in (b"x" * 4096, b"x"):
        while True:
            try:
                send.send(piece)
            except BlockingIOError:
                break
    send.setblocking(True)
    return receive.detach(), send.detach()


@pytest.mark.parametrize("full", [full_pipe, full_socket])
@pytest.mark.costly
def test_a_guard_whose_log_is_not_read_still_restarts_and_passes_signals_on(
    full: Callable[[], tuple[int, int]], marked_environment: dict[str, str], tmp_path: Path
) -> None:
    receive, send = full()
    path = str(tmp_path / "socket")
    arguments = ["--guard", f"unix:{path}", "--", *MANY]
    daemon = Protector(arguments, marked_environment, stderr=send)

    def answers() -> int:
        try:
            return pid_in(ask(path))
        except OSError:  # not bound or listening yet
            return 0

    def protector_of_guard() -> list[int]:
        # Not workers, which the guard adopts when their protector is gone.
        return [pid for pid in children_of(daemon.pid) if name_of(pid) == "SocketProtector"]

    try:
        eventually(lambda: answers() != 0, "the first worker")
        first = answers()
        [pid] = protector_of_guard()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: protector_of_guard() not in ([], [pid]), "another protector")
        assert answers() == first

        daemon.process.send_signal(signal.SIGHUP)

        eventually(lambda: answers() != first, "the second generation")
        assert os.get_blocking(send), "the shared description was changed"
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(DEADLINE_S) == 0
    finally:
        daemon.end()
        os.close(receive)
        os.close(send)


def test_a_line_that_the_guard_could_not_write_is_counted_in_the_next(tmp_path: Path) -> None:
    receive, send = full_pipe()
    one = guard.Guard([], {guard.RELAY: send})

    one.log("first", a=1)
    one.log("second", a=1)
    os.read(receive, 1 << 20)
    one.log("third", a=1)
    one.log("fourth", a=1)

    lines = os.read(receive, 1 << 20).decode().splitlines()
    assert lines == ["<4>event=third a=1 dropped_lines=2", "<4>event=fourth a=1"]
    assert os.get_blocking(send)
    os.close(receive)
    os.close(send)


@pytest.mark.costly
def test_in_the_journal_a_line_of_the_guard_has_a_priority_and_no_time(
    marked_environment: dict[str, str],
) -> None:
    ours, journal = socket.socketpair()
    found = os.fstat(journal.fileno())
    environment = {**marked_environment, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
    arguments = ["--guard", "127.0.0.1:0", "--", *MANY]
    with journal:
        daemon = Protector(arguments, environment, stderr=journal.fileno())
    ours.settimeout(DEADLINE_S)

    def line_of(event: str) -> str:
        return next(line for line in stream if f"event={event}" in line)

    try:
        with ours, ours.makefile() as stream:
            line_of("ready")
            daemon.signal(signal.SIGUSR1)
            line_of("reopened")  # so the guard knows that the start has succeeded
            [pid] = [pid for pid in children_of(daemon.pid) if name_of(pid) == "SocketProtector"]

            os.kill(pid, signal.SIGKILL)

            assert line_of("protector-died").startswith("<4>event=protector-died")
            line_of("resumed")
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.process.wait(DEADLINE_S) == 0
    finally:
        daemon.end()


def test_how_workers_ended_is_reported_once_a_protector_that_stood_still_reads_on() -> None:
    ends = [b"X_EXITED=%d 0" % pid for pid in range(2000)]
    one = guard.Guard([], {})
    line, protectors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, guard.BUFFER_BYTES)
    one.line = line

    for each in ends:
        one.statuses.append((0.0, each))
        one.send_statuses()
    assert one.sent < len(one.statuses), "there was room for all of them"
    assert [each for _, each in one.statuses] == ends, "the next protector would lack some"
    heard: list[bytes] = []
    protectors.settimeout(DEADLINE_S)
    while len(heard) < len(ends):
        heard.append(protectors.recv(100))
        one.send_statuses()

    assert heard == ends
    line.close()
    protectors.close()


def test_the_next_protector_gets_how_workers_ended_however_long_no_protector_could_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    one = guard.Guard([sys.executable, "-c", ""], {})
    one.first = False
    lines: list[dict[str, object]] = []
    monkeypatch.setattr(one, "log", lambda event, **fields: lines.append(fields))
    one.statuses.append((now[0], b"X_EXITED=7 0"))

    def runs(message: dict[str, str]) -> None:
        """A protector is started, sends this message, and ends long after."""
        one.start()
        assert one.sent == 1
        one.take(message, -1)
        _, status = os.waitpid(one.pid, 0)
        now[0] += guard.SENT_AGAIN_S + 1
        one.ended(status)

    for _ in range(3):
        runs({"X_FAILED": "cannot resume: it is newer"})
    assert [each for _, each in one.statuses] == [b"X_EXITED=7 0"]
    assert [each["error"] for each in lines] == 3 * ["cannot resume: it is newer"]
    runs({"X_BEGAN": "1"})
    assert "error" not in lines[-1]
    one.start()
    os.waitpid(one.pid, 0)
    assert one.statuses == [], "the last protector has read it"
    one.close_line()


def test_a_signal_that_a_protector_has_taken_shows_that_it_handles_signals() -> None:
    one = guard.Guard([], {})

    one.take({"X_FAILED": "a shortage"}, -1)
    one.take({"WATCHDOG": "1"}, -1)
    assert (one.began, one.failure) == (False, "a shortage")

    one.take({"X_TOOK": str(signal.SIGHUP.value)}, -1)
    assert one.began


def test_a_guard_removes_only_files_on_which_no_process_listens(tmp_path: Path) -> None:
    stale, held = tmp_path / "stale", tmp_path / "held"
    with socket.socket(socket.AF_UNIX) as listens, socket.socket(socket.AF_UNIX) as closed:
        listens.bind(str(held))
        listens.listen()
        closed.bind(str(stale))
        closed.close()

        for each in (stale, held):
            guard.remove_if_stale(str(each))

        assert held.exists()
        assert not stale.exists()


@pytest.mark.parametrize("lacks", ["module", "name", "sense"])
def test_a_guard_s_end_is_the_same_with_files_that_were_replaced(
    lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package manager replaced or removed them, and the guard imports some only at its end."""

    def fail(*_: object) -> None:
        raise RuntimeError("it has other arguments now")

    other = {name: fail for name in ("files_of", "is_stale", "remove_folder") if lacks == "sense"}
    for name in ("socket_file", "sd_notify"):
        module = f"socketprotector.system.{name}"
        stands = None if lacks == "module" else SimpleNamespace(**other)
        monkeypatch.setitem(sys.modules, module, stands)
    folder = os.open(tmp_path, os.O_RDONLY)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        one = guard.Guard([], {"sp.listener.0": listener.detach(), "sp.notify": folder})

    with pytest.raises(SystemExit) as ended:
        one.give_up("dies", 7)

    assert ended.value.code == 7
    os.close(folder)


# --- a protector that cannot go on -------------------------------------------------


@pytest.fixture
def broken(installation: Installation) -> Installation:
    """The release `two` dies as soon as it is to go on."""
    installation.add("two")
    installation.change(
        "two", "daemon/resident", r"os\.chdir\(.*", 'raise RuntimeError("injected")'
    )
    return installation


def failing(installation: Installation, tmp_path: Path) -> Protector:
    """A guarded protector that was killed, and whose successor dies again and again."""
    pid_file = ("--pid-file", tmp_path / "pid")
    daemon = installation.start("--guard", *pid_file, "127.0.0.1:0", "--", *MANY).ready()
    at_rest(daemon)  # the guard knows that it has accepted
    installation.switch("two")
    kill_protector(daemon)
    daemon.log.wait_for("event=protector-died .*status 1.* again_in_s=0.1")
    daemon.log.wait_for("event=protector-died .*status 1.* again_in_s=0.2")
    return daemon


@EITHER_HANDOFF
@pytest.mark.costly
def test_one_that_dies_at_once_is_started_later_and_later_until_it_recovers(
    broken: Installation, tmp_path: Path
) -> None:
    daemon = failing(broken, tmp_path)
    assert daemon.log.count("RuntimeError: injected")
    client = Client(("127.0.0.1", daemon.port), "hello")  # waits in the backlog
    mark = len(daemon.log.seen)

    broken.switch("one")

    revived(daemon, mark)
    assert pid_in(client.hear()) == spawned(daemon)[0]
    client.close()
    at_rest(daemon)  # where workers accept, their answer says nothing of the protector
    mark = kill_protector(daemon)
    daemon.log.wait_for("event=protector-died .* again_in_s=0$", after=mark)
    revived(daemon, mark)
    daemon.stop()


def test_one_that_dies_soon_after_it_has_served_is_started_later_and_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    one = guard.Guard([], {})
    one.first = False
    lines: list[dict[str, object]] = []
    monkeypatch.setattr(one, "log", lambda event, **fields: lines.append(fields))

    def waits(status: int = 1 << 8, served_s: float = 0.001) -> float:
        """Return how long it waits after one that served so long and ended like this."""
        one.accepted_at = None
        one.take({"READY": "1"}, -1)
        now[0] += served_s
        one.take({"READY": "1"}, -1)  # after a reload
        one.ended(status)
        assert one.due is not None
        return round(one.due - now[0], 2)

    assert [waits() for _ in range(11)] == [0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]
    assert lines[-1] == {"protector": "exited with status 1", "in_a_row": 11, "again_in_s": 10.0}
    assert waits(signal.SIGSEGV, served_s=4.0) == 6
    assert waits(served_s=10.0) == 0
    assert [waits() for _ in range(3)] == [0, 0, 0.1]
    assert [waits(signal.SIGKILL) for _ in range(20)] == [0] * 20, "one that was killed is well"
    assert lines[-1] == {"protector": "killed by signal 9", "again_in_s": 0}


def test_a_stop_that_the_protector_did_not_come_to_take_is_for_the_next_one_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(os, "kill", lambda pid, number: None)
    one = guard.Guard([], {})
    one.first = False
    one.deaths = 20
    monkeypatch.setattr(one, "log", lambda event, **fields: None)

    def dies() -> float:
        one.ended(signal.SIGSEGV)
        assert one.due is not None
        return round(one.due - now, 2)

    one.pid = 1234
    one.signalled(signal.SIGTERM)

    assert [dies() for _ in range(4)] == [0, 0, 0.1, 0.2]


@pytest.mark.costly
def test_term_in_the_back_off_stops_in_order_if_the_protector_is_well_again(
    broken: Installation, tmp_path: Path
) -> None:
    daemon = failing(broken, tmp_path)
    daemon.log.wait_for("event=protector-died .* again_in_s=0.8")
    broken.switch("one")

    daemon.signal(signal.SIGTERM)

    assert daemon.wait() == 0
    assert daemon.log.count("event=stopped")
    assert list(tmp_path.iterdir()) == []


@EITHER_HANDOFF
@pytest.mark.costly
def test_term_with_a_protector_that_cannot_start_lets_the_workers_finish(
    broken: Installation, tmp_path: Path
) -> None:
    daemon = broken.start(
        "--guard", "--pid-file", tmp_path / "pid", "127.0.0.1:0", "--", *MANY
    ).ready()
    with Client(("127.0.0.1", daemon.port)) as held:
        first = pid_in(held.ask())
        at_rest(daemon)
        broken.switch("two")
        kill_protector(daemon)
        daemon.log.wait_for("event=protector-died .*status 1.*")

        daemon.signal(signal.SIGTERM)

        assert daemon.process.wait(DEADLINE_S) == 1
        daemon.log.wait_for("event=guard-gives-up")
        assert pid_in(held.ask()) == first
    assert wait_gone([first]) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("upgraded", [False, True])
@pytest.mark.costly
def test_a_guard_sends_the_drain_signal_of_the_last_reload(
    broken: Installation, tmp_path: Path, upgraded: bool
) -> None:
    options = 'handoff = "listener"\nready = "after:1ms"\n'
    file = File(tmp_path / "web.toml")
    file.command = ("sleep", "1000")
    file.says(options)
    daemon = broken.start("--guard", "--config", file.path).ready()
    file.command = ("sh", "-c", "trap '' TERM; exec sleep 1000")
    file.says(options + 'drain-signal = "USR1"\n')
    daemon.reload()
    daemon.log.wait_for("event=drained generation=1")
    if upgraded:
        assert "resumed" in upgrade(daemon)
    at_rest(daemon)
    [sleeping] = spawned(daemon, 2)
    broken.switch("two")
    kill_protector(daemon)
    daemon.log.wait_for("event=protector-died .*status 1.*")

    daemon.signal(signal.SIGTERM)

    daemon.log.wait_for("event=guard-gives-up")
    assert daemon.process.wait(DEADLINE_S) == 1
    assert wait_gone([sleeping]) == []


def barely_enough(pid: int) -> int:
    """A limit below which two are free once settings and state are closed, and no sooner."""
    taken = descriptors(pid)
    closed = {
        fd for fd, to in taken.items() if to.startswith(("/memfd:sp.settings", "/memfd:sp.state"))
    }

    def free(limit: int, without: Iterable[int]) -> int:
        return len(set(range(limit)) - {*without})

    return next(n for n in range(max(taken)) if free(n, taken) < 2 <= free(n, {*taken} - closed))


@EITHER_HANDOFF
@pytest.mark.parametrize("says_why", [False, True])
def test_term_to_a_guard_without_descriptors_lets_the_workers_finish(
    guarded: Starter, tmp_path: Path, says_why: bool
) -> None:
    """says_why: what it lets go of first has room for its last line."""
    daemon = guarded()
    with Client(("127.0.0.1", daemon.port)) as held:
        first = pid_in(held.ask())
        at_rest(daemon)
        _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        soft = barely_enough(daemon.pid) if says_why else 3
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (soft, hard))
        kill_protector(daemon)

        daemon.signal(signal.SIGTERM)

        assert daemon.process.wait(DEADLINE_S) == guard.FAILED
        if says_why:
            daemon.log.wait_for("event=guard-gives-up")
        assert pid_in(held.ask()) == first
    assert wait_gone([first]) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "call"), [("os", "fork"), ("socket", "socketpair")])
@pytest.mark.parametrize("when", ["first", "stop", "stopping", "later"])
def test_a_protector_that_cannot_be_started_is_tried_again_only_while_something_serves(
    monkeypatch: pytest.MonkeyPatch, module: str, call: str, when: str
) -> None:
    def fails(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(f"socketprotector.programs.guard.{module}.{call}", fails)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    one = guard.Guard([], {})
    lines: list[str] = []
    monkeypatch.setattr(one, "log", lambda event, **fields: lines.append(event))
    one.first = when == "first"
    one.stopping = when == "stopping"
    if when == "stop":
        one.untaken[signal.SIGTERM] = False
    try:
        if when == "later":
            one.start()
            assert lines == ["guard-cannot-start"]
            assert one.due is not None
        else:
            with pytest.raises(SystemExit) as ended:
                one.start()
            assert ended.value.code == guard.FAILED
            assert lines == ["guard-gives-up"]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_a_guard_that_cannot_catch_signals_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pipe2", fails)
    one = guard.Guard([], {})
    lines: list[str] = []
    monkeypatch.setattr(one, "log", lambda event, **fields: lines.append(event))

    with pytest.raises(SystemExit) as ended:
        one.run()

    assert ended.value.code == guard.FAILED
    assert lines == ["guard-gives-up"]


@pytest.mark.costly
def test_an_uncaught_exception_is_survived_and_its_traceback_logged(
    installation: Installation, tmp_path: Path
) -> None:
    installation.add("two")
    installation.change(
        "two", "daemon/supervisor", r"self\.reopen_logs\(\)", "raise KeyError(number)"
    )
    installation.switch("two")
    log_file = tmp_path / "log"
    daemon = installation.start("--guard", "--log-file", log_file, "127.0.0.1:0", "--", *MANY)

    def read(pattern: str) -> None:
        eventually(lambda: re.search(pattern, log_file.read_text()) is not None, pattern)

    eventually(log_file.exists, "the log file")
    read(r"event=ready\b")
    port = int(re.findall(r"listen=tcp:127.0.0.1:(\d+)", log_file.read_text())[0])
    with Load(f"127.0.0.1:{port}", concurrency=8) as load, Client(("127.0.0.1", port)) as held:
        first = pid_in(held.ask())
        served(load)
        daemon.process.send_signal(signal.SIGUSR1)
        read("event=resumed")
        served(load)
        assert pid_in(held.ask()) == first
    assert load.snapshot().failures == ()
    text = log_file.read_text()
    assert "Traceback (most recent call last):" in text
    assert "KeyError: <Signals.SIGUSR1: 10>" in text or "KeyError: 10" in text
    daemon.process.terminate()
    assert daemon.process.wait(DEADLINE_S) == 0


# --- another user ----------------------------------------------------------------


@AS_ANOTHER_USER
@pytest.mark.costly
def test_as_another_user_it_is_killed_and_goes_on_as_that_user(
    marked_environment: dict[str, str],
) -> None:
    daemon = Protector(
        ["--guard", "--user", "nobody", "127.0.0.1:0", "--", *MANY], marked_environment
    )
    try:
        daemon.ready()
        for _ in range(2):
            status = Path(f"/proc/{revived(daemon, kill_protector(daemon))}/status").read_text()
            assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
            assert re.search(r"^Uid:\t(?!0\b)(\d+)\t\1\t\1\t\1$", status, re.MULTILINE)
        assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon)[0]
        daemon.stop()
    finally:
        daemon.end()
        print(daemon.log.text())
