"""`--handoff listener`: unmodified servers accept from the listeners that are ours."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.load import Load
from tests.procfs import descriptors, state_of
from tests.rounds import rounds
from tests.running import (
    DEADLINE_S,
    FAIR_START_S,
    ROOT,
    Client,
    Protector,
    ask,
    eventually,
    shared_path,
    wait_gone,
)
from tests.scenarios.adopting import (
    at_rest,
    kill_protector,
    revived,
    served,
    upgrade,
)
from tests.scenarios.faults import injected
from tests.scenarios.operating import Line, Operating
from tests.scenarios.starting import Start
from tests.scenarios.tools import Gate, Release, hold, library_worker, pid_in, spawned, worker
from tests.unanswered import Unanswered

Starter = Callable[..., Protector]
MODE = ("--handoff", "listener")
FAST = ("--ready", "notify")
SERVER = worker("accepts")


@pytest.fixture
def served_by(protector: Starter) -> Callable[..., Protector]:
    """Start one that serves: served_by(*options, command=..., listen=...)."""

    def start(
        *options: str | Path,
        command: tuple[str, ...] = SERVER,
        listen: tuple[str, ...] = ("127.0.0.1:0",),
    ) -> Protector:
        return protector(*MODE, *options, *listen, "--", *command).ready()

    return start


def here(daemon: Protector) -> tuple[str, int]:
    return "127.0.0.1", daemon.port


# -- what a server is given -----------------------------------------------------


def test_a_server_finds_its_listeners_as_each_of_the_protocols_says(
    served_by: Starter, tmp_path: Path
) -> None:
    path = str(tmp_path / "s")
    daemon = served_by(
        *("--workers", "2"), *FAST, listen=("http=127.0.0.1:0", "[::1]:0", f"admin=unix:{path}")
    )
    first, second, _ = (each.removeprefix("tcp:") for each in daemon.addresses)

    pid = pid_in(ask(path))
    told = {
        name: ask(path, f"env {name}")
        for name in (
            *("LISTEN_FDS", "LISTEN_FDNAMES", "SERVER_STARTER_PORT", "SERVER_STARTER_GENERATION"),
            *("EINHORN_FD_COUNT", "EINHORN_FDS", "EINHORN_FD_0", "EINHORN_FD_1", "EINHORN_FD_2"),
            *("EINHORN_FD_3", "EINHORN_MASTER_PID", "SOCKETPROTECTOR_CHANNEL"),
        )
    }

    assert pid in spawned(daemon, 1)
    assert told == {
        "LISTEN_FDS": "3",
        "LISTEN_FDNAMES": "http:0:admin",
        "SERVER_STARTER_PORT": f"{first}=3;{second}=4;{path}=5",
        "SERVER_STARTER_GENERATION": "1",
        "EINHORN_FD_COUNT": "3",
        "EINHORN_FDS": "3 4 5",
        "EINHORN_FD_0": "3",
        "EINHORN_FD_1": "4",
        "EINHORN_FD_2": "5",
        "EINHORN_FD_3": "-",
        "EINHORN_MASTER_PID": str(daemon.pid),
        "SOCKETPROTECTOR_CHANNEL": "-",
    }
    places = {ask(path, "env EINHORN_CHILD_INDEX") for _ in range(20)}
    assert places <= {"0", "1"}
    assert ask(("::1", int(second.rpartition(":")[2]))).endswith(" hello")


def test_the_library_names_a_unix_listener_by_its_path(protector: Starter, tmp_path: Path) -> None:
    """Each generation's socket is bound under another name beside the path."""
    path = str(tmp_path / "s")
    program = ROOT / "tests" / "client" / "programs" / "serves.py"
    daemon = protector(
        *(*MODE, "127.0.0.1:0", f"unix:{path}", "--", sys.executable, program),
        PYTHONPATH=f"{ROOT}:{ROOT / 'client_lib'}",
    ).ready()

    assert ask(path, "listener") == f"unix:{path}"
    assert ask(here(daemon), "listener") == f"tcp:127.0.0.1:{daemon.port}"


def test_it_has_no_other_descriptor(served_by: Starter) -> None:
    daemon = served_by(listen=("127.0.0.1:0", "127.0.0.2:0"))

    # 5: its RETURN line; 6: the scoreboard; 7: einhorn's line, which is ended once it is ready.
    # The rest is the worker's own: wake-up pipe, the connection, the folder that it lists.
    numbers = ask(here(daemon), "fds").split()

    assert numbers[:8] == ["0", "1", "2", "3", "4", "5", "6", "7"]
    assert len(numbers) == 8 + 4
    pid = spawned(daemon, 1)[0]
    held = descriptors(pid)
    assert held[0] == "/dev/null"
    assert [held[fd].partition(":")[0] for fd in (3, 4, 5, 7)] == ["socket"] * 4
    assert held[6].startswith("/memfd:sp.board")


def test_a_bare_port_is_one_listener_for_ipv4_and_ipv6(served_by: Starter) -> None:
    daemon = served_by(listen=("0",))

    assert len(daemon.addresses) == 1
    assert ask(here(daemon)).endswith("hello")
    assert ask(("::1", daemon.port)).endswith("hello")
    assert ask(here(daemon), "env SERVER_STARTER_PORT") == f"{daemon.port}=3"


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_a_listener_blocks_unless_it_is_to_be_otherwise(served_by: Starter, wanted: str) -> None:
    """nginx would hang in accept() on one that does."""
    says = "import os, signal; os.write(2, b'blocks=%d\\n' % os.get_blocking(3)); signal.pause()"
    command = (sys.executable, "-c", says)
    daemon = served_by(
        *("--ready", "after:0"), listen=(f"127.0.0.1:0?nonblock={wanted}",), command=command
    )

    daemon.log.wait_for(f"blocks={int(wanted == '0')}")


@pytest.mark.costly
def test_names_in_the_command_and_the_environment_become_numbers(
    served_by: Starter, tmp_path: Path
) -> None:
    words = ("--fd={fd:http}", "$(circus.sockets.ADMIN)", "{fd:http}{fd:admin}", "{other}")
    daemon = served_by(
        *("--env", "NGINX={fd:http};{fd:admin};"),
        command=(*SERVER, "--", *words),
        listen=("http=127.0.0.1:0", f"admin=unix:{tmp_path / 's'}"),
    )

    assert ask(here(daemon), "words") == "--fd=3 4 34 {other}"
    assert ask(here(daemon), "env NGINX") == "3;4;"


# -- readiness --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "how", "said"),
    [
        ((), "notify", "notify, ack, a line or accept"),
        ((), "ack", "notify, ack, a line or accept"),
        ((), "{fd:ready}", "notify, ack or a line"),
        (("--ready", "ack"), "ack", "ack"),
        (("--ready", "ack"), "yaml", "ack"),
        (("--ready", "ack"), "path", "ack"),
        (("--ready", "fd:9"), "9", "fd 9"),
        (("--ready", "notify"), "notify", "notify"),
        (("--ready", "check:true"), "never", "check"),
        (("--ready", "after:100ms"), "never", "after 100ms (only a timer)"),
    ],
)
def test_a_server_is_ready_when_it_says_so_in_its_own_way(
    operated: Operating, tmp_path: Path, options: tuple[str, ...], how: str, said: str
) -> None:
    gate = Gate(tmp_path / "gate")
    command = (*SERVER, "--ready", how, *(() if how == "never" else ("--gate", str(gate.path))))
    daemon = operated(*MODE, *options, command=command, ready=False)
    if how != "never":
        gate.open()
    daemon.line()
    status = daemon.until("phase", "serving")

    by = {"yaml": "ack", "path": "ack", "9": "line", "{fd:ready}": "line"}.get(how, how)
    if how == "never":
        by = "check" if "check" in said else "timer"
    assert status["ready"] == said
    # On a busy machine it took more than a second, or accepted before its line was read.
    while ready_by(status) != [by] and ready_by(status) in (["timer"], ["accept"]):
        gate.path.unlink(missing_ok=True)
        gate.path.touch()
        daemon.daemon.reload()
        status = daemon.status()
    assert ready_by(status) == [by]
    assert status["handoff"] == "listener"
    assert ask(daemon.address).endswith("hello")


def ready_by(status: dict[str, Any]) -> list[str]:
    """By what each worker of the serving generation was ready."""
    [serving] = [each for each in status["generations"] if each["number"] == status["route"]]
    return [each["ready_by"] for each in serving["workers"]]


@pytest.mark.costly
def test_a_server_that_says_nothing_is_ready_after_a_second(served_by: Starter) -> None:
    daemon = served_by(command=(*SERVER, "--ready", "never"))

    assert ask(here(daemon)).endswith("hello")


@pytest.mark.parametrize("how", ["ack", "{fd:ready}"])
def test_one_that_says_it_late_serves_on(protector: Starter, tmp_path: Path, how: str) -> None:
    """After the second in which others are thought ready, too, nothing it writes to is closed."""
    gate, path = Gate(tmp_path / "gate"), str(shared_path(tmp_path))
    command = (*SERVER, "--ready", how, "--gate", gate.path)
    # Where it can be asked, it would not be thought ready.
    daemon = protector(*MODE, f"http=unix:{path}", "--", *command)
    if how == "ack":
        daemon.log.wait_for("event=worker-ready .*by=timer")
    else:
        later = protector(*MODE, "--start-timeout", "1500ms", "http=127.0.0.1:0", "--", *command)
        later.process.wait(DEADLINE_S)
        for each in (daemon, later):
            assert each.log.count("event=worker-ready") == 0
        assert later.log.count("not ready within 1.5s") > 0
    gate.open()
    daemon.ready()

    assert pid_in(ask(path)) == spawned(daemon)[0]
    assert daemon.log.count("event=exited") == 0


@pytest.mark.costly
def test_a_check_knows_which_worker_it_is_about(served_by: Starter, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    check = f"check:echo $SOCKETPROTECTOR_WORKER_PID >> {asked}"
    daemon = served_by("--ready", check)
    daemon.reload()

    assert [int(pid) for pid in asked.read_text().split()] == spawned(daemon)


@pytest.mark.parametrize("option", ["ack", "fd:9", "notify", "check:test -e GATE"])
def test_a_reload_waits_until_the_new_one_says_so(
    served_by: Starter, tmp_path: Path, option: str
) -> None:
    """And the other ways of saying it do not count."""
    there = tmp_path / "there"
    there.touch()
    gate = Gate(tmp_path / "gate")
    how = {"ack": "ack", "fd:9": "9", "notify": "notify"}.get(option, "never")
    release = Release(tmp_path / "server")
    release.becomes(*SERVER, "--ready", how)
    wanted = option.replace("GATE", str(there))
    daemon = served_by("--ready", wanted, command=(str(release.path),))
    old = pid_in(ask(here(daemon)))
    there.unlink()
    waits = ("--gate", str(gate.path)) if how != "never" else ()
    release.becomes(*SERVER, "--ready", how, *waits)

    mark = daemon.signal(signal.SIGHUP)
    new = spawned(daemon, 2)[0]
    held = [ask(here(daemon)) for _ in range(3)]
    at_rest(daemon)
    assert not [line for line in daemon.log.seen[mark:] if "event=reloaded" in line]
    there.touch()
    if waits:
        gate.open()
    daemon.log.wait_for("event=reloaded", after=mark)
    assert wait_gone([old]) == []

    assert {pid_in(each) for each in held} <= {old, new}
    assert pid_in(ask(here(daemon))) == new


@pytest.mark.costly
def test_a_check_that_never_succeeds_fails_the_reload(served_by: Starter, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    daemon = served_by("--ready", f"check:test -e {there}", "--start-timeout", f"{FAIR_START_S}s")
    there.unlink()

    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=reload-failed", after=mark)
    daemon.log.wait_for("event=exited generation=2", after=mark)

    assert pid_in(ask(here(daemon))) == spawned(daemon, 1)[0]


@pytest.mark.costly
def test_a_check_that_hangs_ends_with_its_worker(served_by: Starter, tmp_path: Path) -> None:
    there, pids = tmp_path / "there", tmp_path / "pids"
    there.touch()
    check = f"check:echo $$ >> {pids}; test -e {there} || exec sleep 1000"
    daemon = served_by("--ready", check, "--start-timeout", f"{FAIR_START_S}s")
    there.unlink()

    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=exited generation=2", after=mark)

    hung = [int(pid) for pid in pids.read_text().split()]
    assert wait_gone(hung) == []


@pytest.mark.costly
def test_a_check_that_hangs_is_asked_again_and_reported_without_its_arguments(
    protector: Starter, tmp_path: Path
) -> None:
    tries = tmp_path / "tries"
    hangs = f"echo $$ >> {tries}; test $(wc -l < {tries}) -gt 2 || exec sleep 1000"
    sooner = injected(
        tmp_path / "sooner",
        "if resident():\n"
        "    from socketprotector.system import check_command\n"
        "    check_command.LIMIT_S = 0.5\n",
    )
    daemon = protector(
        *MODE, "--ready", f"check:PASSWORD=secret; {hangs}", "127.0.0.1:0", "--", *SERVER, **sooner
    ).ready()

    told = [line for line in daemon.log.seen if "event=check-timed-out" in line]
    assert [line.partition(" event=")[2] for line in told] == [
        "check-timed-out worker=1 check=sh for_s=0.5"
    ]
    assert wait_gone([int(pid) for pid in tries.read_text().split()]) == []
    assert "secret" not in daemon.log.text()
    daemon.stop()


@pytest.mark.parametrize("guarded", [False, True], ids=["alone", "guarded"])
@pytest.mark.costly
def test_a_check_under_way_ends_with_its_protector(
    served_by: Starter, tmp_path: Path, guarded: bool
) -> None:
    """All of its group, whether another protector goes on or not."""
    there, pids = tmp_path / "there", tmp_path / "pids"
    there.touch()
    guard = ("--guard",) if guarded else ()
    check = f"echo $$ >> {pids}; test -e {there} && exit; sleep 1000 & echo $! >> {pids}; wait"
    daemon = served_by(*guard, "--ready", f"check:{check}")
    there.unlink()
    daemon.signal(signal.SIGHUP)
    eventually(lambda: len(pids.read_text().split()) == 3, "a check of the new one")
    spawned(daemon, 2)  # its check may be sooner than the protector's line about it
    there.touch()  # too late for that one, which waits

    mark = kill_protector(daemon)

    _, *hung = [int(pid) for pid in pids.read_text().split()][:3]
    assert wait_gone(hung) == []
    if guarded:
        daemon.log.wait_for("event=(reloaded|reload-failed)", after=mark)
        daemon.stop()
    else:
        for pid in (*spawned(daemon, 1), *spawned(daemon, 2)):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.costly
def test_an_upgrade_amid_a_check_checks_again(served_by: Starter, tmp_path: Path) -> None:
    there, pids = tmp_path / "there", tmp_path / "pids"
    there.touch()
    daemon = served_by("--ready", f"check:echo $$ >> {pids}; test -e {there} || sleep 1000")
    there.unlink()
    mark = daemon.signal(signal.SIGHUP)
    eventually(lambda: len(pids.read_text().split()) == 2, "a check of the new one")
    there.touch()  # too late for that one, which sleeps

    assert "event=resumed" in upgrade(daemon)
    daemon.log.wait_for("event=reloaded", after=mark)

    checks = [int(pid) for pid in pids.read_text().split()]
    assert wait_gone(checks) == []
    assert [state_of(pid) for pid in checks] == [""] * len(checks)  # no zombie either


# -- reload, crash, stop ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "3"])
def test_reloads_under_load_fail_no_client(served_by: Starter, workers: str) -> None:
    daemon = served_by("--workers", workers, *FAST)

    with Load(f"127.0.0.1:{daemon.port}", concurrency=16) as load:
        for _ in range(rounds(2, 40)):
            daemon.reload()
            served(load)

    assert not load.snapshot().failures
    assert wait_gone(spawned(daemon)[: -int(workers)]) == []
    assert daemon.worker_pids() == spawned(daemon)[-int(workers) :]


def test_what_is_being_served_is_finished_by_the_old_one(
    served_by: Starter, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    daemon = served_by(*FAST)
    with Client(here(daemon), f"wait {gate.path}") as held:
        old = spawned(daemon)[0]
        writer = os.open(gate.path, os.O_WRONLY)  # waits until a worker reads there, which has it
        daemon.reload()
        new = pid_in(ask(here(daemon)))
        os.close(writer)
        assert pid_in(held.hear()) == old

    assert new != old
    assert wait_gone([old]) == []


def test_another_signal_may_tell_it_to_finish(served_by: Starter) -> None:
    daemon = served_by("--drain-signal", "sigquit", *FAST)
    old = spawned(daemon)[0]

    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=signalled worker=1 signal=QUIT", after=mark)

    assert wait_gone([old]) == []
    daemon.stop()
    assert daemon.log.count("signal=QUIT") == 2


@pytest.mark.costly
def test_clients_that_connect_while_no_worker_lives_are_served_by_the_next(
    served_by: Starter, tmp_path: Path
) -> None:
    release = Release(tmp_path / "server")
    release.becomes(*SERVER)
    gate = Gate(tmp_path / "gate")
    daemon = served_by(*FAST, command=(str(release.path),))
    release.becomes(*gate.before(*SERVER))  # the same file is executed by a respawn
    os.kill(spawned(daemon)[0], signal.SIGKILL)
    daemon.log.wait_for("event=exited")
    clients = [Client(here(daemon), f"hello {n}") for n in range(20)]
    gate.open()

    heard = [client.hear() for client in clients]

    assert [each.partition(" ")[2] for each in heard] == [f"hello {n}" for n in range(20)]
    for each in clients:
        each.close()


def test_a_stop_first_serves_clients_that_have_connected(served_by: Starter) -> None:
    daemon = served_by(*FAST)
    pid = spawned(daemon)[0]
    os.kill(pid, signal.SIGSTOP)
    clients = [Client(here(daemon), f"hello {n}") for n in range(50)]
    mark = daemon.signal(signal.SIGTERM)
    daemon.log.wait_for("event=stopping", after=mark)
    os.kill(pid, signal.SIGCONT)

    heard = [client.hear() for client in clients]

    assert heard == [f"[{pid}] hello {n}" for n in range(50)]
    assert daemon.wait() == 0
    for each in clients:
        each.close()


@pytest.mark.costly
def test_a_unix_socket_s_file_is_gone_after_a_stop(served_by: Starter, tmp_path: Path) -> None:
    path = tmp_path / "s"
    daemon = served_by(*FAST, listen=(f"unix:{path}",))
    pid = spawned(daemon)[0]
    os.kill(pid, signal.SIGSTOP)
    clients = [Client(str(path), f"hello {n}") for n in range(20)]
    mark = daemon.signal(signal.SIGTERM)
    daemon.log.wait_for("event=stopping", after=mark)
    os.kill(pid, signal.SIGCONT)

    assert [client.hear() for client in clients] == [f"[{pid}] hello {n}" for n in range(20)]
    assert daemon.wait() == 0
    assert not path.exists()
    for each in clients:
        each.close()


def test_scaling_adds_one_and_has_one_finish(served_by: Starter) -> None:
    daemon = served_by(*FAST)

    mark = daemon.signal(signal.SIGTTIN)
    daemon.log.wait_for("event=worker-ready generation=1 worker=2", after=mark)
    mark = daemon.signal(signal.SIGTTOU)
    daemon.log.wait_for("event=exited .*worker=2", after=mark)

    assert daemon.log.count("signal=TERM") == 1
    assert daemon.worker_pids() == spawned(daemon)[:1]


@pytest.mark.costly
def test_a_hold_of_a_unix_socket_is_refused_in_words(operated: Operating, tmp_path: Path) -> None:
    path = shared_path(tmp_path)
    daemon = operated(*MODE, *FAST, f"unix:{path}", command=SERVER)

    with daemon.line() as line:
        code, said = line.refused("hold", seconds=5)

    assert code == "refused"
    assert said == (
        f"hold is unavailable: unix:{path} has one socket for all generations, "
        "from which workers accept directly"
    )


def test_a_reload_that_is_ordered_during_the_first_start_is_probed(protector: Starter) -> None:
    """It begins within the answer to the probe of the first generation."""
    daemon = protector(*MODE, "127.0.0.1:0", "--", *SERVER)
    daemon.log.wait_for("event=spawned generation=1")
    daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=(reloaded|reload-failed) generation=2")
    assert daemon.log.count("event=reload-failed") == 0


CUT_OFF = "its socket file was removed, so no client can connect; restart SocketProtector"


@pytest.mark.costly
def test_a_reload_fails_where_the_file_of_the_only_socket_was_removed(
    protector: Callable[..., Protector], tmp_path: Path
) -> None:
    """The release would get no client."""
    path = shared_path(tmp_path)
    daemon = protector(*MODE, *FAST, f"unix:{path}", "--", *SERVER)
    daemon.log.wait_for("event=ready generation=1")
    os.unlink(path)

    mark = daemon.signal(signal.SIGHUP)
    said = daemon.log.wait_for("event=reload-failed generation=2", after=mark)

    assert CUT_OFF in said
    assert str(path) in said
    assert len(spawned(daemon)) == 1


@pytest.mark.costly
def test_a_removed_socket_file_keeps_no_release_from_another_listener(
    operated: Operating, tmp_path: Path
) -> None:
    path = shared_path(tmp_path)
    daemon = operated(*MODE, *FAST, f"unix:{path}", command=SERVER)
    warning = f"unix:{path}: {CUT_OFF}"
    assert warning not in daemon.status()["warnings"]
    os.unlink(path)
    assert warning in daemon.status()["warnings"]

    mark = daemon.daemon.signal(signal.SIGHUP)
    said = daemon.daemon.log.wait_for("event=listener-lost", after=mark)

    assert f"listen=unix:{path}" in said
    daemon.daemon.log.wait_for("event=reloaded generation=2", after=mark)


@pytest.mark.costly
def test_a_hold_lasts_through_a_reload_an_upgrade_and_a_crash(operated: Operating) -> None:
    """No client is refused, and none gets in before it is over."""
    daemon = operated("--guard", *MODE, *FAST, command=SERVER)
    with Client(daemon.address) as early:
        early.ask()  # one worker that accepts: who has come is served
        daemon.line().ask("hold", seconds=3600)
        with Unanswered(daemon.address) as late:
            late.tries_again()
            daemon.daemon.reload()
            assert "resumed" in upgrade(daemon.daemon)
            revived(daemon.daemon, kill_protector(daemon.daemon))
            with Unanswered(daemon.address) as later:
                later.tries_again()
                assert daemon.status()["held_s"] > 3000

                daemon.line().ask("release")
                for each in (late, later):
                    each.connects()
                    each.say("hello")  # it serves one after the other
                assert [each.hear().endswith(" hello") for each in (late, later)] == [True] * 2
    assert {pid_in(ask(daemon.address)) for _ in range(20)} == {spawned(daemon.daemon, 2)[0]}
    assert daemon.daemon.log.count("event=stranded|event=not-steered") == 0


@pytest.mark.costly
def test_a_hold_ends_with_its_time(operated: Operating) -> None:
    daemon = operated(*MODE, *FAST, command=SERVER)
    daemon.line().ask("hold", seconds=1.5)
    with Unanswered(daemon.address) as late:
        late.connects()
        late.say("hello")
        assert late.hear().endswith(" hello")
    assert daemon.status()["held_s"] is None


@pytest.mark.costly
def test_a_stop_lets_those_in_that_a_hold_has_kept_out(operated: Operating) -> None:
    """Also when the protector is replaced meanwhile."""
    daemon = operated(*MODE, *FAST, command=SERVER)
    daemon.line().ask("hold", seconds=3600)
    with Unanswered(daemon.address) as late:
        late.tries_again()
        mark = daemon.daemon.signal(signal.SIGTERM)
        daemon.daemon.log.wait_for("event=stopping", after=mark)
        assert "resumed" in upgrade(daemon.daemon)
        late.connects()
        late.say("hello")
        assert late.hear().endswith(" hello")
    assert daemon.daemon.wait() == 0


def test_a_second_signal_waits_for_none_of_them(operated: Operating) -> None:
    daemon = operated(*MODE, *FAST, "--stop-timeout", "1h", command=SERVER)
    line = daemon.line(follows=True)
    line.ask("hold", seconds=3600)
    line.event("held")
    for _ in range(2):
        mark = daemon.daemon.signal(signal.SIGTERM)
        daemon.daemon.log.wait_for("event=signal signal=SIGTERM", after=mark)

    assert daemon.daemon.wait() == 0


@pytest.mark.parametrize("reloads", [0, 1, 2])
def test_one_that_is_killed_unguarded_leaves_no_client_on_hold(
    operated: Operating, reloads: int
) -> None:
    """Its servers go on, as without a hold."""
    daemon = operated(*MODE, *FAST, command=SERVER)
    address = daemon.address
    daemon.line().ask("hold", seconds=3600)
    with Unanswered(address) as late:
        late.tries_again()
        for generation in range(1, reloads + 1):
            daemon.daemon.reload()
            assert wait_gone(spawned(daemon.daemon, generation)) == []
        os.kill(daemon.daemon.pid, signal.SIGKILL)
        late.connects()
        late.say("hello")
        assert late.hear().endswith(" hello")
    [pid] = spawned(daemon.daemon, reloads + 1)
    assert {pid_in(ask(address)) for _ in range(20)} == {pid}
    os.kill(pid, signal.SIGTERM)
    assert wait_gone([pid]) == []


@pytest.mark.costly
def test_what_cannot_be_held_is_not_added_during_a_hold(protector: Starter, tmp_path: Path) -> None:
    config, added = tmp_path / "web.toml", shared_path(tmp_path)
    words = ", ".join(f'"{word}"' for word in SERVER)

    def write(listen: str) -> None:
        new = tmp_path / "new"
        new.write_text(
            f'handoff = "listener"\nready = "notify"\nlisten = [{listen}]\ncommand = [{words}]\n'
        )
        new.rename(config)

    write('"127.0.0.1:0"')
    daemon = protector("--config", config, "--control", tmp_path / "control").ready()
    with Line(tmp_path / "control") as line:
        line.ask("hold", seconds=3600)
        write(f'"127.0.0.1:0", "unix:{added}"')
        mark = daemon.signal(signal.SIGHUP)
        said = daemon.log.wait_for("event=reload-failed", after=mark)
        line.ask("release")

    assert (
        f"on hold, and unix:{added} has one socket for all generations, "
        "from which workers accept directly; end the hold first"
    ) in said
    assert not added.exists()
    daemon.reload()
    assert ask(str(added)).endswith(" hello")


# -- daemons that use the client library ------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["echo", "asyncio_server"])
def test_a_daemon_of_the_library_serves_from_listeners_too(served_by: Starter, name: str) -> None:
    """One program for each way: handed connections, handed listeners, or neither."""
    daemon = served_by(*FAST, command=library_worker(name))

    with (
        Client(here(daemon), "first") as held,
        Load(f"127.0.0.1:{daemon.port}", concurrency=8) as load,
    ):
        assert held.hear().endswith(" first")
        for _ in range(rounds(1, 10)):
            daemon.reload()
            served(load)
        old = pid_in(held.ask())
        assert old == spawned(daemon, 1)[0]

    assert not load.snapshot().failures
    assert wait_gone([old]) == []
    assert daemon.log.count("event=signalled") == 0


def test_one_of_the_library_leaves_when_all_its_clients_are_served(served_by: Starter) -> None:
    """It is told on its line: clients waiting at its socket were accepted before, and finish."""
    daemon = served_by(*FAST, command=library_worker("echo"))
    old = spawned(daemon)[0]
    hold(old)
    clients = [Client(here(daemon), f"hello {n}") for n in range(20)]
    daemon.reload()
    assert pid_in(ask(here(daemon))) == spawned(daemon, 2)[0]

    os.kill(old, signal.SIGCONT)

    assert {pid_in(client.hear()) for client in clients} == {old}
    daemon.reload()  # which waits until that one was told
    for client in clients:
        assert pid_in(client.ask()) == old
        client.close()
    assert wait_gone([old]) == []
    assert daemon.log.count("event=signalled|event=stranded|event=not-accepted") == 0


@pytest.mark.costly
def test_one_of_the_library_is_told_to_finish_on_its_line_after_an_upgrade_too(
    operated: Operating,
) -> None:
    daemon = operated("--guard", *MODE, *FAST, command=library_worker("echo"))
    first = spawned(daemon.daemon)
    assert "event=resumed" in upgrade(daemon.daemon)
    daemon.daemon.reload()
    assert wait_gone(first) == []
    revived(daemon.daemon, kill_protector(daemon.daemon))
    second = daemon.pids(2)
    daemon.daemon.reload()
    assert wait_gone(second) == []

    daemon.daemon.stop()
    assert daemon.daemon.log.count("event=signalled") == 0


@pytest.mark.costly
def test_those_of_the_library_end_with_an_unguarded_protector(served_by: Starter) -> None:
    daemon = served_by(*FAST, command=library_worker("echo"))
    [pid] = spawned(daemon)
    with Client(here(daemon)) as client:
        client.ask()
        os.kill(daemon.pid, signal.SIGKILL)
        assert pid_in(client.ask()) == pid
    assert wait_gone([pid]) == []


# -- which process survives what ------------------------------------------------------


@pytest.mark.parametrize("how", ["ack", "9"])
@pytest.mark.costly
def test_what_says_ready_after_a_kill_is_heard_by_the_next_protector(
    protector: Starter, tmp_path: Path, how: str
) -> None:
    gate = Gate(tmp_path / "gate")
    release = Release(tmp_path / "server")
    release.becomes(*SERVER, "--ready", how)
    kind = "ack" if how == "ack" else "fd:9"
    words = ("--guard", *MODE, "--ready", kind, "127.0.0.1:0", "--", release.path)
    daemon = protector(*words).ready()
    release.becomes(*SERVER, "--ready", how, "--gate", str(gate.path))
    daemon.signal(signal.SIGHUP)
    spawned(daemon, 2)
    at_rest(daemon)

    mark = kill_protector(daemon)
    revived(daemon, mark)
    gate.open()
    daemon.log.wait_for("event=reloaded", after=mark)
    assert wait_gone(spawned(daemon, 1)) == []  # for a moment both accept

    assert pid_in(ask(here(daemon))) == spawned(daemon, 2)[0]


@pytest.mark.costly
def test_a_listener_that_a_reload_adds_is_handed_to_the_new_ones(
    protector: Starter, tmp_path: Path
) -> None:
    config = tmp_path / "web.toml"
    words = ", ".join(f'"{word}"' for word in (*SERVER, "--", "{fd:a}", "{fd:b}"))
    added = tmp_path / "s"

    def write(listen: str, command: str) -> None:
        new = tmp_path / "new"
        new.write_text(
            f'handoff = "listener"\nready = "notify"\nlisten = [{listen}]\ncommand = [{command}]\n'
        )
        new.rename(config)

    write('"a=127.0.0.1:0"', words.replace(', "{fd:b}"', ""))
    daemon = protector("--config", config).ready()
    assert ask(here(daemon), "words") == "3"
    write(f'"a=127.0.0.1:0", "b=unix:{added}"', words)
    daemon.reload()
    assert wait_gone(spawned(daemon, 1)) == []  # for a moment both accept
    assert ask(str(added), "words") == "3 4"
    write(f'"b=unix:{added}"', words.replace('"{fd:a}", ', ""))
    daemon.reload()
    assert wait_gone(spawned(daemon, 2)) == []

    assert ask(str(added), "words") == "3"
    assert ask(str(added), "env LISTEN_FDNAMES") == "b"
    mark = len(daemon.log.seen)
    write(f'"b=unix:{added}"', words)
    daemon.signal(signal.SIGHUP)
    line = daemon.log.wait_for("event=reload-failed", after=mark)
    assert re.search(r"\{fd:a\}: no listener has this name; there is: b", line)


@pytest.mark.costly
def test_the_command_returns_when_the_server_is_ready(start: Start) -> None:
    ended = start.up(*MODE, *FAST, "127.0.0.1:0", "--", *SERVER)

    assert ended.status == 0
    assert ask(start.address).endswith("hello")
    start.stop()
    assert start.left() == []
