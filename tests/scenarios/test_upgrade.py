"""USR2: the protector's own program is replaced in place, or the old one goes on and says why."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from socketprotector import __version__
from tests.load import Load
from tests.procfs import children_of, in_backlog, state_of
from tests.rounds import rounds
from tests.running import DEADLINE_S, Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import (
    ROUNDS,
    Chance,
    Installation,
    at_rest,
    served,
    upgrade,
)
from tests.scenarios.managers import Manager
from tests.scenarios.operating import Line
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    Gate,
    Release,
    hold,
    kinds_at_rest,
    no_more_open,
    pid_in,
    spawned,
    worker,
)

MANY = worker("many")
AGREES = "from socketprotector.__main__ import main\nmain()\n"
#: A release that says yes to an upgrade, and cannot be executed any more.
REMOVED_ONCE_TRIED = (
    "if 'sp.probe' in os.environ.get('LISTEN_FDNAMES', ''):\n    os.unlink(sys.argv[0])\n" + AGREES
)
#: A release that takes over once its trial has passed a gate.
WAITS = "if 'sp.probe' in os.environ.get('LISTEN_FDNAMES', ''):\n    open({!r}).read()\n" + AGREES
Starter = Callable[..., Protector]


def upgraded(daemon: Protector) -> None:
    assert "event=resumed" in upgrade(daemon), daemon.log.text()


@pytest.mark.slow
@EITHER_HANDOFF
def test_upgrades_and_reloads_under_load_lose_nothing_at_all(
    protector: Starter, tmp_path: Path, handoff: str
) -> None:
    pid_file = tmp_path / "pid"
    daemon = protector("--pid-file", pid_file, "--workers", "2", "127.0.0.1:0", "--", *MANY).ready()
    descriptors, before = kinds_at_rest(daemon), pid_file.stat()

    with Load(f"127.0.0.1:{daemon.port}", concurrency=16) as load:
        for number in range(rounds(3, 100) if handoff == "connection" else rounds(2, 50)):
            upgraded(daemon)
            if number % 4 == 0:
                daemon.reload()
            served(load, 4)
    seen = load.snapshot()

    assert seen.failures == ()
    assert seen.connections == seen.begun
    last = spawned(daemon)[-2:]
    assert wait_gone([pid for pid in spawned(daemon) if pid not in last]) == []
    no_more_open(descriptors, daemon.pid)
    assert sorted(daemon.worker_pids()) == sorted(last)
    after = pid_file.stat()
    assert (after.st_ino, pid_file.read_text()) == (before.st_ino, f"{daemon.pid}\n")
    daemon.stop()


@EITHER_HANDOFF
def test_the_workers_stay_and_what_they_hold_with_them(protector: Starter) -> None:
    daemon = protector("127.0.0.1:0", "--", *MANY).ready()
    with Client(("127.0.0.1", daemon.port)) as held:
        first = pid_in(held.ask())
        for _ in range(rounds(2, 3)):
            upgraded(daemon)
        assert pid_in(held.ask()) == pid_in(ask(("127.0.0.1", daemon.port))) == first
    assert spawned(daemon) == [first]
    os.kill(first, signal.SIGKILL)  # still our child, watched as before
    assert "was killed by SIGKILL" in daemon.log.wait_for("event=exited generation=1")
    second = pid_in(ask(("127.0.0.1", daemon.port)))
    daemon.log.wait_for(f"event=spawned generation=1 .*pid={second}")
    assert spawned(daemon) == [first, second]
    daemon.stop()


# --- releases ---------------------------------------------------------------------


@pytest.mark.costly
def test_a_new_release_behind_the_symlink_takes_over_and_says_its_version(
    installation: Installation,
) -> None:
    daemon = installation.start("127.0.0.1:0", "--", *MANY).ready()
    installation.add("two", version="99.1")
    installation.switch("two")

    upgraded(daemon)

    assert daemon.log.count(r"event=upgrading version=99\.1")
    assert daemon.log.count(rf"event=resumed pid={daemon.pid} .* version=99\.1")
    assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon)[0]
    shutil.rmtree(installation.folder / "one")
    upgraded(daemon)
    daemon.reload()
    daemon.stop()


def missing_interpreter(installation: Installation) -> str:
    installation.script("two", "", interpreter="/nowhere/python")
    return "the interpreter in its first line is missing"


def no_package(installation: Installation) -> str:
    shutil.rmtree(installation.folder / "two" / "socketprotector")
    # Isolated from the one that these tests have installed.
    installation.script(
        "two",
        "sys.path[1:] = [each for each in sys.path[1:] if 'lib/python' in each"
        " and 'site-packages' not in each]\n"
        "sys.meta_path[:] = [each for each in sys.meta_path if 'ditable' not in repr(each)]\n"
        "from socketprotector.__main__ import main\nmain()\n",
    )
    return "No module named 'socketprotector'"


def syntax_error(installation: Installation) -> str:
    installation.change(
        "two", "daemon/delivery/queue/forwarder", r"class Forwarder:", "class Forwarder"
    )
    return "SyntaxError: expected ':'"


def exception_at_import(installation: Installation) -> str:
    installation.change(
        "two",
        "daemon/recovery",  # loaded only where a program resumes
        "#: Why a worker or",
        "raise OSError(28, 'disk')\n#: Why a worker or",
    )
    return "disk"


def older_state(installation: Installation) -> str:
    installation.change("two", "model/codec", r"FORMAT = 3", "FORMAT = 2")
    return r"written by a newer version \(format 3, this one reads up to 2\)"


def later_format(installation: Installation) -> str:
    installation.change("two", "model/codec", r"FORMAT = 3", "FORMAT = 4")
    return r"written by an older version \(format 3, this one reads only 4\); stop that version"


def other_settings(installation: Installation) -> str:
    installation.change("two", "model/settings", r"    workers: int = 1\n", "")
    return r"written by a newer version \(this one does not know workers\)"


def another_program(installation: Installation) -> str:
    installation.script("two", "sys.exit('usage: something else')\n")
    return "exited with status 1: usage: something else"


def silent(installation: Installation) -> str:
    installation.script("two", "")
    return "exited with status 0: it said nothing"


def crash(installation: Installation) -> str:
    installation.script("two", "os.abort()\n")
    return "killed by SIGABRT"


def nothing(installation: Installation) -> str:
    (installation.folder / "two" / "bin" / "SocketProtector").unlink()
    return "not found|No such file"


@pytest.mark.parametrize(
    "spoil",
    [
        missing_interpreter,
        no_package,
        syntax_error,
        exception_at_import,
        older_state,
        later_format,
        other_settings,
        another_program,
        silent,
        crash,
        nothing,
    ],
)
def test_a_release_that_cannot_take_over_changes_nothing_and_the_log_says_why(
    installation: Installation, spoil: Callable[[Installation], str]
) -> None:
    daemon = installation.start("127.0.0.1:0", "--", *MANY).ready()
    descriptors = kinds_at_rest(daemon)
    installation.add("two")
    why = spoil(installation)
    installation.switch("two")

    line = upgrade(daemon)

    assert "event=upgrade-failed" in line
    assert re.search(why, line), line
    assert f'hint="version {__version__} keeps running"' in line
    no_more_open(descriptors, daemon.pid)
    assert daemon.worker_pids() == spawned(daemon)
    daemon.reload()
    installation.switch("one")
    upgraded(daemon)
    daemon.stop()


@pytest.mark.costly
def test_a_program_removed_after_it_said_yes_leaves_all_as_it_was(
    installation: Installation,
) -> None:
    daemon = installation.start("127.0.0.1:0", "--", *MANY).ready()
    descriptors = kinds_at_rest(daemon)
    installation.add("two")
    installation.script("two", REMOVED_ONCE_TRIED)
    installation.switch("two")

    line = upgrade(daemon)

    assert re.search("event=upgrade-failed .*No such file", line)
    no_more_open(descriptors, daemon.pid)
    daemon.signal(signal.SIGHUP)  # signals are taken again
    daemon.log.wait_for("event=reloaded")
    installation.switch("one")
    upgraded(daemon)
    daemon.stop()


@pytest.mark.parametrize("ended", ["upgraded", "not upgraded", "stopped"])
@pytest.mark.costly
def test_a_diff_in_progress_is_called_off_and_its_client_gets_an_answer(
    installation: Installation, tmp_path: Path, ended: str
) -> None:
    place, file, there = (tmp_path / each for each in ("control", "web.toml", "there"))
    file.write_text(f'listen = "127.0.0.1:0"\ncommand = {json.dumps(MANY)}\n')
    daemon = installation.start("--control", place, "--config", file).ready()
    descriptors = kinds_at_rest(daemon)
    installation.add("two")
    installation.script(
        "two",
        f"if 'sp.reader.dry' in os.environ.get('LISTEN_FDNAMES', ''):\n"
        f"    os.symlink(str(os.getpid()), {str(there)!r})\n    import signal\n    signal.pause()\n"
        + (REMOVED_ONCE_TRIED if ended == "not upgraded" else AGREES),
    )
    installation.switch("two")
    with Line(place) as line:
        line.send("diff")
        eventually(there.is_symlink, "the reader")

        if ended == "stopped":
            daemon.stop()
        else:
            assert ("event=resumed" in upgrade(daemon)) == (ended == "upgraded")

        answer = line.answer()
    assert (answer["code"], answer["error"]) == (
        "busy",
        "called off: an upgrade or a stop has begun",
    )
    assert wait_gone([int(there.readlink().name)]) == []
    if ended == "stopped":
        return
    no_more_open(descriptors, daemon.pid)
    installation.switch("one")
    with Line(place) as line:
        assert line.ask("diff") == {"changes": [], "needs_restart": []}
    daemon.stop()


# --- in every phase -----------------------------------------------------------------


@EITHER_HANDOFF
def test_during_a_reload_the_new_generation_still_takes_over(
    protector: Starter, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*MANY)
    daemon = protector("127.0.0.1:0", "--", release.path).ready()
    gate = Gate(tmp_path / "gate")
    release.becomes(*gate.before(*MANY))
    daemon.signal(signal.SIGHUP)
    [second] = spawned(daemon, 2)

    upgraded(daemon)
    gate.open()

    daemon.log.wait_for("event=reloaded generation=2")
    assert pid_in(ask(("127.0.0.1", daemon.port))) == second
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_during_a_drain_the_connections_go_on_and_the_old_generation_ends(
    protector: Starter,
) -> None:
    daemon = protector("127.0.0.1:0", "--", *MANY).ready()
    with Client(("127.0.0.1", daemon.port)) as held:
        first = pid_in(held.ask())
        daemon.reload()
        upgraded(daemon)
        assert pid_in(held.ask()) == first
    assert "exited with status 0" in daemon.log.wait_for("event=exited generation=1")
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_drain_limit_goes_on_and_no_second_term_is_sent(protector: Starter, handoff: str) -> None:
    sent = 1 if handoff == "connection" else 2  # the first one has it finish
    daemon = protector(
        "--drain-timeout", "0.1s", "--kill-timeout", "1h", "127.0.0.1:0", "--", *MANY
    ).ready()
    with Client(("127.0.0.1", daemon.port)) as held:
        held.ask()
        daemon.reload()
        signals = "event=signalled worker=1 signal=TERM"
        eventually(lambda: daemon.log.count(signals) == sent, "the limit")
        upgraded(daemon)
        at_rest(daemon)
        assert daemon.log.count("event=signalled worker=1") == sent
        assert held.ask()
    daemon.log.wait_for("event=exited generation=1")
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_while_it_settles_the_old_generation_can_still_take_over_again(
    protector: Starter,
) -> None:
    daemon = protector("--settle", "1h", "127.0.0.1:0", "--", *MANY).ready()
    daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2")
    upgraded(daemon)
    at_rest(daemon)

    os.kill(spawned(daemon, 2)[0], signal.SIGKILL)

    daemon.log.wait_for("event=reload-failed generation=2")
    assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon, 1)[0]
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_in_a_back_off_the_next_worker_still_comes(protector: Starter, tmp_path: Path) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*MANY)
    daemon = protector("127.0.0.1:0", "--", release.path).ready()
    for number in range(1, 5):  # the fourth waits a while
        daemon.log.wait_for(f"event=worker-ready generation=1 worker={number}$")
        os.kill(spawned(daemon)[-1], signal.SIGKILL)
        daemon.log.wait_for(f"event=exited generation=1 worker={number} ")
    upgraded(daemon)
    pid = pid_in(ask(("127.0.0.1", daemon.port)))
    eventually(lambda: spawned(daemon)[4:] == [pid], "the log's line of the fifth worker")
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_during_a_stop_it_stops(protector: Starter) -> None:
    daemon = protector("127.0.0.1:0", "--", *MANY).ready()
    with Client(("127.0.0.1", daemon.port)) as held:
        first = pid_in(held.ask())
        daemon.signal(signal.SIGTERM)
        daemon.log.wait_for("event=stopping")
        upgraded(daemon)
        assert pid_in(held.ask()) == first
    assert daemon.wait() == 0


# --- signals ---------------------------------------------------------------------


@pytest.mark.slow
@EITHER_HANDOFF
def test_signals_during_an_upgrade_are_not_lost_and_kill_nothing(
    protector: Starter, handoff: str
) -> None:
    chance = Chance()
    daemon = protector("127.0.0.1:0", "--", *MANY).ready()
    with Load(f"127.0.0.1:{daemon.port}", concurrency=8) as load:
        for number in range(ROUNDS // 2 if handoff == "connection" else rounds(2, 25)):
            mark = daemon.signal(signal.SIGUSR2)
            daemon.log.wait_for("event=upgrading", after=mark)
            chance.moment(0.02)  # the exec is under way
            daemon.signal(signal.SIGTTIN if number % 2 == 0 else signal.SIGTTOU)
            daemon.signal(signal.SIGHUP)
            daemon.log.wait_for("event=signal signal=SIGHUP", after=mark)
            name = "SIGTTIN" if number % 2 == 0 else "SIGTTOU"
            daemon.log.wait_for(f"event=signal signal={name}", after=mark)
            daemon.log.wait_for(r"event=(reloaded|reload-failed)", after=mark)
    assert load.snapshot().failures == ()
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_storm_of_signals_with_upgrades_in_it_ends_well(protector: Starter) -> None:
    chance = Chance()
    daemon = protector("127.0.0.1:0", "--", *MANY).ready()
    storm = (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2)
    with Load(f"127.0.0.1:{daemon.port}", concurrency=8) as load:
        for _ in range(rounds(100, 500)):
            daemon.signal(chance.random.choice(storm))
            chance.moment(0.005)
        served(load)
    assert load.snapshot().failures == ()
    daemon.stop()


# --- what else must come along ------------------------------------------------------


@pytest.mark.costly
def test_a_full_queue_and_the_undelivered_connection_survive(protector: Starter) -> None:
    daemon = protector("--queue", "6", "127.0.0.1:0", "--", *MANY).ready()
    [pid] = spawned(daemon)
    hold(pid)
    clients = [Client(("127.0.0.1", daemon.port), f"hello {number}") for number in range(20)]
    # Six are queued, one is undelivered, and the rest stays where it is.
    eventually(lambda: in_backlog(daemon.port) == 13, "a full queue")

    upgraded(daemon)
    at_rest(daemon)
    os.kill(pid, signal.SIGCONT)

    for number, client in enumerate(clients):
        assert client.hear() == f"[{pid}] hello {number}"
        client.close()
    daemon.stop()


@pytest.mark.costly
def test_the_watchdog_is_fed_by_the_new_program_too(protector: Starter, tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    daemon = protector(
        "127.0.0.1:0", "--", *MANY, NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="100000"
    )
    manager.wait_for("READY")
    for _ in range(2):
        mark = daemon.signal(signal.SIGUSR2)
        # Heard all the while: nothing is upgraded whose manager has not read what was said.
        assert manager.wait_for("READY")["MAINPID"] == str(daemon.pid)
        daemon.log.wait_for("event=resumed", after=mark)
        manager.wait_for("WATCHDOG")
        assert manager.sender == daemon.pid
    daemon.stop()
    manager.close()


@pytest.mark.costly
def test_with_a_terminal_it_goes_on_and_ends_with_it(marked_environment: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    try:
        daemon = Protector(
            ["127.0.0.1:0", "--", *MANY],
            marked_environment,
            through=("setsid", "--ctty", "--wait"),
            stdin=theirs,
        )
        daemon.ready()
        [found] = re.findall(r"event=start pid=(\d+)", daemon.log.text())
        os.kill(int(found), signal.SIGUSR2)
        daemon.log.wait_for("event=resumed")
        assert pid_in(ask(("127.0.0.1", daemon.port))) == spawned(daemon)[0]
        os.kill(int(found), signal.SIGHUP)  # the terminal lives: a reload
        daemon.log.wait_for("event=reloaded")
    finally:
        os.close(theirs)
        os.close(ours)  # hangs up
    assert daemon.wait() == 0
    assert daemon.log.count("event=stopping")


@pytest.mark.costly
def test_a_stop_ends_the_probe_of_an_upgrade(installation: Installation, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    daemon = installation.start("127.0.0.1:0", "--", *MANY).ready()
    installation.add("two")
    installation.script("two", f"open({str(gate.path)!r}).read()\n")
    before = len(children_of(daemon.pid))
    installation.switch("two")
    daemon.signal(signal.SIGUSR2)
    eventually(lambda: len(children_of(daemon.pid)) > before, "the probe")
    children = children_of(daemon.pid)

    daemon.stop()

    assert wait_gone(children) == []


@pytest.mark.costly
def test_a_stop_answered_just_before_the_exec_is_not_lost(
    installation: Installation, tmp_path: Path
) -> None:
    gate, place = Gate(tmp_path / "gate"), tmp_path / "control"
    daemon = installation.start("--control", str(place), "127.0.0.1:0", "--", *MANY).ready()
    installation.add("two")
    installation.script("two", WAITS.format(str(gate.path)))
    before = len(children_of(daemon.pid))
    installation.switch("two")
    with Line(place) as line, Line(place) as other:
        other.ask("upgrade")  # so `line`, which is the earlier one, was accepted
        eventually(lambda: len(children_of(daemon.pid)) > before, "the trial")
        trial = max(children_of(daemon.pid))
        # One turn of the loop gets the request, and then the end of the trial.
        daemon.signal(signal.SIGSTOP)
        line.send("stop")
        gate.open()
        eventually(lambda: state_of(trial) == "Z", "the end of the trial")
        daemon.signal(signal.SIGCONT)

        assert line.answer()["ok"]

    assert daemon.process.wait(DEADLINE_S) == 0
    assert daemon.log.count("event=resumed") == 1


@pytest.mark.costly
def test_usr2_twice_is_one_upgrade(installation: Installation, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    daemon = installation.start("127.0.0.1:0", "--", *MANY).ready()
    installation.add("two")
    installation.script("two", WAITS.format(str(gate.path)))
    installation.switch("two")
    daemon.signal(signal.SIGUSR2)
    mark = daemon.signal(signal.SIGUSR2)
    eventually(lambda: daemon.log.count("signal=SIGUSR2") >= 1, "the signal")
    gate.open()

    daemon.log.wait_for("event=resumed", after=0)
    at_rest(daemon)
    assert mark >= 0
    assert daemon.log.count("event=resumed") == 1
    assert len(daemon.worker_pids()) == 1
    daemon.stop()
