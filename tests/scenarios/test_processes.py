"""A worker that loads once and serves in forked children, by serve(processes=N)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.load import Load
from tests.procfs import in_sessions
from tests.rounds import rounds
from tests.running import WORKERS, Client, Protector, eventually
from tests.scenarios.adopting import kill_protector, revived, served
from tests.scenarios.operating import Operated, Operating
from tests.scenarios.tools import EITHER_HANDOFF, Gate, library_worker, pid_in


def shares(count: int, *way: str) -> tuple[str, ...]:
    return library_worker("shares", str(count), *way)


def children(web: Operated, generation: int = 1) -> list[dict[str, Any]]:
    workers = web.generation(generation)["workers"]
    [worker] = [each for each in workers if each["state"] != "orphaned"]
    found = worker["processes"]
    assert isinstance(found, list)
    return found


def pids(web: Operated, generation: int = 1) -> set[int]:
    return {each["pid"] for each in children(web, generation)}


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@EITHER_HANDOFF
def test_a_reload_under_load_loses_no_client_and_each_child_counts(operated: Operating) -> None:
    web = operated(command=shares(3))
    with Load(f"127.0.0.1:{web.address[1]}") as load:
        served(load)
        first = pids(web)
        web.daemon.reload()
        served(load)
    assert load.snapshot().failures == ()

    assert len(first) == 3
    assert len(pids(web, 2)) == 3
    assert not pids(web, 2) & first
    counts = children(web, 2)
    total = web.generation(2)["accepted"]
    assert total == sum(each["accepted"] for each in counts) > 0
    web.daemon.stop()
    assert web.daemon.log.count(r'event=exited .*how="exited with status 0"$') == 2


@EITHER_HANDOFF
def test_a_killed_child_is_replaced_and_listed(operated: Operating) -> None:
    web = operated("--log-prefix", command=shares(2))
    line = web.line(follows=True)
    with Client(web.address, "hello") as client:
        victim = pid_in(client.hear())
        os.kill(victim, signal.SIGKILL)
        found = line.event("child-failed", pid=victim)
    assert (found["how"], found["lost"]) == ("was killed by SIGKILL", 1)

    eventually(lambda: len(pids(web) - {victim}) == 2, "two children")
    generation = web.generation(1)
    assert generation["lost"] == 1
    assert generation["accepted"] == 1  # by the dead child
    [crash] = line.ask("crashes")["crashes"]
    [parent] = web.pids(1)
    assert crash["pid"] == victim
    assert crash["how"] == f"child {found['child']} of {parent}: was killed by SIGKILL"
    eventually(lambda: "begins" in line.ask("crashes")["crashes"][0]["last_words"], "its words")


@EITHER_HANDOFF
def test_children_of_a_killed_parent_finish_while_the_next_one_serves(
    operated: Operating, gate: Gate
) -> None:
    web = operated(command=shares(2))
    [parent], old = web.pids(1), pids(web)
    with Client(web.address, f"wait {gate.path}") as busy, Client(web.address, "hello") as idle:
        assert pid_in(idle.hear()) in old
        os.kill(parent, signal.SIGKILL)
        web.daemon.log.wait_for(r"event=worker-ready .*worker=2")
        with Client(web.address, "hello") as client:
            assert pid_in(client.hear()) not in old
        assert idle.ask("again")
        gate.open()
        assert pid_in(busy.hear()) in old
    for each in old:
        eventually(lambda pid=each: gone(pid), "the end of an orphan")  # type: ignore[misc]
    eventually(lambda: len(pids(web)) == 2, "the new children")
    # Unknown (None) until the protector has seen the end of the orphans' group.
    eventually(lambda: web.generation(1)["lost"] == 0, "the counts")


@EITHER_HANDOFF
def test_connections_of_a_killed_process_group_count_as_lost(operated: Operating) -> None:
    web = operated(command=shares(2))
    [parent] = web.pids(1)
    with Client(web.address, "hello") as first, Client(web.address, "hello") as second:
        assert {pid_in(first.hear()), pid_in(second.hear())} <= pids(web)
        os.killpg(parent, signal.SIGKILL)
        web.daemon.log.wait_for(r"event=exited .*worker=1 .*SIGKILL.* lost=2$")
    eventually(lambda: web.generation(1)["lost"] == 2, "the count")


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_killed_parent_is_replaced_although_orphans_fill_a_rolling_reloads_limit(
    operated: Operating, gate: Gate
) -> None:
    """Clients would find no worker, so the third parent starts above the limit; no fourth does."""
    limits = ("--guard", "--reload-order", "rolling", "--drain-timeout", "5m")
    web = operated(*limits, command=shares(2))
    first = pids(web)
    with Client(web.address, f"wait {gate.path}") as busy:
        _active(web)
        os.kill(web.pids(1)[0], signal.SIGKILL)
        web.daemon.log.wait_for("event=worker-ready .*worker=2")
        second = pids(web)
        os.kill(ready_pid(web), signal.SIGKILL)
        web.daemon.log.wait_for("event=worker-ready .*worker=3")
        for is_killed in (False, True):
            if is_killed:
                revived(web.daemon, kill_protector(web.daemon))
            with Client(web.address, "hello") as client:
                assert pid_in(client.hear()) in pids(web)
        gate.open()
        assert pid_in(busy.hear()) in first
    for each in first | second:
        eventually(lambda pid=each: gone(pid), "the end of an orphan")  # type: ignore[misc]
    assert not web.daemon.log.count("event=spawned .*worker=4 ")


def ready_pid(web: Operated) -> int:
    [found] = [w["pid"] for w in web.generation(1)["workers"] if w["state"] == "ready"]
    assert isinstance(found, int)
    return found


@pytest.mark.costly
def test_orphans_and_grandchildren_are_gone_after_the_drain_timeout(
    operated: Operating, gate: Gate
) -> None:
    web = operated("--drain-timeout", "1s", "--kill-timeout", "1s", command=shares(2, "grandchild"))
    [parent] = web.pids(1)
    with Client(web.address, f"wait {gate.path}"):
        session = in_sessions([parent])
        assert len(session) == 5
        os.kill(parent, signal.SIGKILL)
        for each in session:
            eventually(lambda pid=each: gone(pid), "its end")  # type: ignore[misc]


@pytest.mark.timeout(rounds(120, 1800))
@EITHER_HANDOFF
@pytest.mark.costly
def test_parents_killed_under_load_leave_no_orphan_and_lose_no_client(
    operated: Operating,
) -> None:
    """Every second time the protector is killed, too, and its guard starts another one."""
    limits = ("--drain-timeout", "1s", "--kill-timeout", "1s", "--guard")
    web = operated(*limits, command=shares(2, "grandchild"))
    killed: list[int] = []
    with Load(f"127.0.0.1:{web.address[1]}") as load:
        for number in range(1, rounds(3, 100) + 1):
            [parent] = web.pids(number)
            killed.append(parent)
            mark = len(web.daemon.log.seen)
            os.kill(parent, signal.SIGKILL)
            if number % 2 == 0:
                revived(web.daemon, kill_protector(web.daemon))
            web.daemon.log.wait_for("event=worker-ready ", after=mark)
            served(load)
            web.daemon.reload()
    assert load.snapshot().failures == ()
    eventually(lambda: not in_sessions(killed), "the end of all orphans")


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("fails", "ValueError: no database"),
        ("threads", "cannot fork while threads run ('metrics')"),
    ],
)
def test_a_release_whose_children_cannot_start_fails(
    protector: Callable[..., Protector], way: str, says: str
) -> None:
    daemon = protector(
        *("--log-prefix", "--start-tries", "1", "127.0.0.1:0", "--"), *shares(3, way)
    )

    daemon.log.wait_for(says.replace("(", r"\(").replace(")", r"\)"))

    assert daemon.process.wait(60) == 3
    assert not daemon.log.count("event=worker-ready")


def test_a_child_is_replaced_by_its_pid_without_losing_its_client(
    operated: Operating, gate: Gate
) -> None:
    web = operated(command=shares(2))
    [parent] = web.pids(1)
    with Client(web.address, f"wait {gate.path}") as busy:
        busy_pid = next(each["pid"] for each in _active(web))
        web.line().ask("replace", pid=busy_pid)
        eventually(lambda: len(pids(web) - {busy_pid}) == 2, "another child")
        gate.open()
        assert pid_in(busy.hear()) == busy_pid
    eventually(lambda: gone(busy_pid), "its end")
    assert web.pids(1) == [parent]
    assert not web.line().ask("crashes")["crashes"]


def _active(web: Operated) -> list[dict[str, Any]]:
    eventually(lambda: any(each["active"] for each in children(web)), "a client")
    return [each for each in children(web) if each["active"]]


@pytest.mark.parametrize(
    ("option", "value", "said"), [("--max-memory", "70M", "grow"), ("--retire-after", "1", "hello")]
)
def test_a_child_that_reaches_a_limit_is_replaced(
    operated: Operating, option: str, value: str, said: str
) -> None:
    web = operated(option, value, command=shares(2))
    [parent] = web.pids(1)
    with Client(web.address, said) as client:
        victim = pid_in(client.hear())
    web.daemon.log.wait_for(f"event=retired worker=1 child={victim}")
    eventually(lambda: gone(victim), "its end")
    eventually(lambda: len(pids(web)) == 2, "another child")
    assert web.pids(1) == [parent]


def test_a_child_that_hangs_is_replaced_by_its_parent(operated: Operating) -> None:
    web = operated("--watchdog", "1s", command=shares(2))
    [parent] = web.pids(1)
    line = web.line(follows=True)
    with Client(web.address, "hang") as client:
        found = line.event("child-failed")
        assert found["how"].startswith("was killed by SIGABRT")
        try:
            assert client.hear() == ""
        except ConnectionResetError:
            pass
    eventually(lambda: len(pids(web) - {found["pid"]}) == 2, "another child")
    assert web.pids(1) == [parent]


@pytest.mark.costly
def test_each_line_of_the_log_names_its_child(operated: Operating) -> None:
    """Also a line that goes through logging, which the parent has configured."""
    web = operated("--log-prefix", command=shares(2))
    [parent] = web.pids(1)
    with Client(web.address, "log hello") as client:
        pid = pid_in(client.hear())
    [number] = [each["number"] for each in children(web) if each["pid"] == pid]
    web.daemon.log.wait_for(rf"^\[1 {parent}\] \[{number} {pid}\] WARNING log hello$")
    web.daemon.log.wait_for(rf"^\[1 {parent}\] \[{number} {pid}\] child {number} begins, {number}$")


@pytest.mark.costly
def test_native_threads_at_the_fork_cause_one_warning_and_take_no_signal(
    operated: Operating,
) -> None:
    web = operated(command=shares(3, "native"))
    with Client(web.address, "hello") as client:
        assert pid_in(client.hear()) in pids(web)
    web.daemon.log.wait_for("2 native threads run at the fork")
    assert web.daemon.log.count("native threads") == 1

    [parent] = web.pids(1)
    native = max(map(int, os.listdir(f"/proc/{parent}/task")))
    assert native != parent
    os.kill(native, signal.SIGUSR1)  # to its process, and the kernel tries this thread first
    eventually(lambda: len(pids(web)) == 4, "one more child")
    assert web.pids(1) == [parent]


@pytest.mark.costly
def test_a_thread_that_threading_does_not_know_counts_as_native(operated: Operating) -> None:
    web = operated(command=shares(2, "raw"))
    web.daemon.log.wait_for("1 native threads run at the fork")


@pytest.mark.costly
def test_a_program_that_handles_term_keeps_its_children(operated: Operating) -> None:
    web = operated(command=shares(2, "handles"))
    [parent], first = web.pids(1), pids(web)
    os.kill(parent, signal.SIGTERM)
    web.daemon.log.wait_for(f"^{parent} handles TERM")
    os.kill(min(first), signal.SIGKILL)
    eventually(lambda: len(pids(web) - {min(first)}) == 2, "another child")
    assert web.daemon.log.count("handles TERM") == 1
    assert web.pids(1) == [parent]


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("exits", r"child \d+ ended with 0; 1 left"),
        ("scarce", "cannot fork one more child: Resource temporarily unavailable"),
    ],
)
@pytest.mark.costly
def test_a_child_that_cannot_be_replaced_is_logged_until_it_can(
    operated: Operating, tmp_path: Path, way: str, says: str
) -> None:
    cause = tmp_path / "cause"
    web = operated(command=shares(2, way, str(cause)))
    victim = min(pids(web))
    cause.touch()
    os.kill(victim, signal.SIGKILL)
    web.daemon.log.wait_for(says)
    cause.unlink()
    eventually(lambda: len(pids(web) - {victim}) == 2, "another child")
    with Client(web.address, "hello") as client:
        assert pid_in(client.hear()) in pids(web)


@pytest.mark.costly
def test_a_changed_file_reloads_a_parent_and_its_children(
    operated: Operating, tmp_path: Path
) -> None:
    program = tmp_path / "source" / "shares.py"
    program.parent.mkdir()
    program.write_text((WORKERS / "shares.py").read_text())
    watched = ("--watch", str(program.parent))
    web = operated(*watched, command=(sys.executable, str(program), "2"))
    web.daemon.log.wait_for("event=watching")
    first = pids(web)

    program.write_text(program.read_text() + "\n")

    web.daemon.log.wait_for("event=reloaded ")
    assert len(pids(web, 2)) == 2
    for each in first:
        eventually(lambda pid=each: gone(pid), "the end of an old child")  # type: ignore[misc]


@pytest.mark.costly
def test_connections_and_kill_know_the_children(operated: Operating, gate: Gate) -> None:
    web = operated(command=shares(2))
    with Client(web.address, f"wait {gate.path}"):
        [busy] = _active(web)
        found = web.line().ask("connections")["workers"]
        [child] = [each for each in found if each["pid"] == busy["pid"]]
        assert len(child["accepted_at_by_fd"]) == 1
        web.daemon.reload()
        assert not gone(busy["pid"])
        web.line().ask("kill", generation=1)
        eventually(lambda: gone(busy["pid"]), "its end")
    web.daemon.log.wait_for("event=drained generation=1")
