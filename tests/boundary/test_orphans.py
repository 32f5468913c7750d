"""What a failed worker leaves, and the moments at which a look at /proc misses it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest

from socketprotector.system import orphans, proc_scan
from socketprotector.system.loop import Loop
from socketprotector.system.orphans import Orphans
from tests.boundary.ending import settle, until

#: Differs from that of a second run of these tests beside this one: they kill what they find.
ADDRESS = f"@a-test-of-orphans-{os.getpid()}"


@contextmanager
def living(environment: dict[str, str]) -> Iterator[int]:
    """A process that has this environment, from its first moment that matters on."""
    with subprocess.Popen(
        ["/bin/cat"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"!")
        process.stdin.flush()
        assert process.stdout.read(1) == b"!"  # it has been executed
        yield process.pid


def found() -> list[int]:
    pids = []
    for address, pid, pidfd in proc_scan._with_address([ADDRESS, f"{ADDRESS}-another"]):
        assert address == ADDRESS
        pids.append(pid)
        os.close(pidfd)
    return pids


def test_processes_with_the_address_are_found_and_no_others() -> None:
    with living({"NOTIFY_SOCKET": ADDRESS}) as ours, living({"NOTIFY_SOCKET": ADDRESS + "x"}):
        assert found() == [ours]
    assert found() == []


def test_the_child_of_one_that_is_about_to_end_is_found_though_the_first_look_came_too_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has no environment any more and is not a zombie yet; here that lasts."""
    real = os.listdir
    looks: list[int] = []

    with living({}) as ending, living({"NOTIFY_SOCKET": ADDRESS}) as child:

        def listdir(path: str) -> list[str]:
            looks.append(ending)
            return [name for name in real(path) if len(looks) > 1 or name != str(child)]

        monkeypatch.setattr(os, "listdir", listdir)
        try:
            assert found() == [child]
        finally:
            monkeypatch.undo()


def test_processes_without_an_environment_are_not_looked_at_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[str] = []
    with living({}) as without:

        def listdir(path: str) -> list[str]:
            looks.append(path)
            return [str(without), str(os.getpid())]  # the machine's others come and go

        monkeypatch.setattr(os, "listdir", listdir)
        assert found() == []
        monkeypatch.undo()

    assert len(looks) == 2


class Log:
    """What it says, by event."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def write(self, level: str, event: str, **fields: Any) -> None:
        self.said.append((event, fields))


@pytest.fixture
def log() -> Log:
    return Log()


@contextmanager
def looks(
    loop: Loop, log: Log, kill_timeout_s: float = 30.0
) -> Iterator[tuple[Orphans, list[int]]]:
    """What ends orphans, and of how many addresses each of its looks was."""
    counted: list[int] = []
    real = proc_scan.Scan

    def look(loop: Loop, wanted: tuple[str, ...], *more: Any) -> Any:
        counted.append(len(wanted))
        return real(loop, wanted, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(proc_scan, "Scan", look)
        yield Orphans(loop, log, kill_timeout_s, None, lambda group: False), counted  # type: ignore[arg-type]
    settle(loop)


def test_what_twenty_failed_workers_have_left_is_found_in_one_look(loop: Loop, log: Log) -> None:
    with (
        looks(loop, log) as (found, counted),
        living({"NOTIFY_SOCKET": f"{ADDRESS}-3"}) as one,
        living({"NOTIFY_SOCKET": f"{ADDRESS}-17"}) as other,
        living({"NOTIFY_SOCKET": f"{ADDRESS}-another"}),
    ):
        for number in range(20):
            found.end(f"{ADDRESS}-{number}")
        assert counted == []  # nothing is looked at in the callback of a worker's end
        assert not found.found
        until(loop, lambda: len(log.said) == 2)
        assert counted == [20]
        assert found.found
        assert {fields["pid"] for _, fields in log.said} == {one, other}
        assert {fields["signal"] for _, fields in log.said} == {"SIGTERM"}
        assert sorted(found.left) == [
            f"{ADDRESS}-17",
            f"{ADDRESS}-3",
        ]  # until they are seen to be gone
        assert done(loop, found)


def done(loop: Loop, found: Orphans) -> bool:
    """Wait until nothing is left of them."""
    said: list[bool] = []
    found.when_ended(lambda: said.append(True))
    until(loop, lambda: bool(said))
    return found.left == ()


def test_the_end_of_the_processes_of_an_address_is_reported_once_they_are_gone(
    loop: Loop, log: Log
) -> None:
    """It does not wait for the time of KILL."""
    gone: list[str] = []
    with (
        looks(loop, log, 3600.0) as (found, _),
        subprocess.Popen(
            ["/bin/sh", "-c", "trap 'read x; exit 0' TERM; echo; while :; do sleep 0.01; done"],
            env={"NOTIFY_SOCKET": ADDRESS, "PATH": os.environ["PATH"]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as one,
    ):
        assert one.stdout is not None
        assert one.stdin is not None
        assert one.stdout.read(1) == b"\n"
        for address in (ADDRESS, f"{ADDRESS}-another"):
            found.end(address)
            found.watch(address, 1, 0, partial(gone.append, address))
        until(loop, lambda: found.found)
        assert gone == [f"{ADDRESS}-another"]
        one.stdin.close()
        until(loop, lambda: ADDRESS in gone)
        assert gone == [f"{ADDRESS}-another", ADDRESS]
        assert one.wait(30) == 0


def test_what_ignores_TERM_is_killed_when_its_time_is_over(loop: Loop, log: Log) -> None:
    with (
        looks(loop, log, 0.1) as (found, _),
        subprocess.Popen(
            ["/bin/sh", "-c", "trap '' TERM; echo; while :; do sleep 0.01; done"],
            env={"NOTIFY_SOCKET": ADDRESS, "PATH": os.environ["PATH"]},
            stdout=subprocess.PIPE,
        ) as stubborn,
    ):
        assert stubborn.stdout is not None
        assert stubborn.stdout.read(1) == b"\n"
        found.end(ADDRESS)
        assert done(loop, found)
        assert stubborn.wait(30) == -signal.SIGKILL


# -- lost workers ----------------------------------------------------------------------------

SERVES = """
trap 'echo $0 USR1' USR1
trap 'echo $0 TERM' TERM
[ $0 = worker ] && sh -c "$1" child &
echo $0
while :; do sleep 0.01; done
"""


@pytest.fixture
def lost() -> Iterator[subprocess.Popen[str]]:
    """A worker that says which signals it gets, as does its child."""
    with subprocess.Popen(
        ["/bin/sh", "-c", SERVES, "worker", SERVES],
        env={"NOTIFY_SOCKET": ADDRESS, "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert {says(process), says(process)} == {"worker", "child"}
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_lost_worker_gets_only_what_is_ordered_and_its_children_only_KILL(
    loop: Loop, log: Log, lost: subprocess.Popen[str]
) -> None:
    """As any worker: it passes on what its children are to get."""
    gone: list[str] = []
    with looks(loop, log, 0.0) as (found, counted):
        found.watch(ADDRESS, 1, signal.SIGUSR1, partial(gone.append, ADDRESS))
        until(loop, lambda: len(counted) == 1 and found._scan is None)
        assert (log.said, found.left, len(found.orders)) == ([], (), 0)
        found.drain(2)
        assert not found.orders
        found.drain(1)
        assert says(lost) == "worker USR1", "it waits for no look, which may hang"
        found.retire((ADDRESS, "another"))  # a second one may end it at once
        found.drain(1)
        found.order((ADDRESS, "another"), signal.SIGTERM)
        assert says(lost) == "worker TERM"
        assert found.orders == ((ADDRESS, 0),)
        looks_before = len(counted)
        until(loop, lambda: len(counted) > looks_before and found._scan is None)
        assert loop.due(orphans._TIMER) is None, "only an event begins another look"
        found.order((ADDRESS,), signal.SIGKILL)
        until(loop, lambda: gone == [ADDRESS])
        assert lost.wait(30) == -signal.SIGKILL
        assert says(lost) == ""


def test_the_exit_of_a_lost_worker_is_noticed_at_once_and_its_children_are_not_forgotten(
    loop: Loop, log: Log, lost: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "_CHILDREN_S", 0.01)
    gone: list[str] = []
    with looks(loop, log) as (found, counted):
        found.watch(ADDRESS, 1, signal.SIGUSR1, partial(gone.append, ADDRESS))
        until(loop, lambda: len(counted) == 1 and found._scan is None)
        os.kill(lost.pid, signal.SIGKILL)
        lost.wait(30)
        until(loop, lambda: len(counted) >= 4)
        assert gone == []
        assert says(lost) == "child USR1", "as the orphans of any worker"
        found.order((ADDRESS,), signal.SIGTERM)
        until(loop, lambda: found.orders == ((ADDRESS, 0),))
        assert says(lost) == "child TERM"
        os.killpg(lost.pid, signal.SIGKILL)
        until(loop, lambda: gone == [ADDRESS])
    assert {fields["signal"] for _, fields in log.said} == {"SIGUSR1", "SIGTERM"}


def test_an_order_whose_look_was_called_off_is_carried_out_by_the_next_program(
    loop: Loop, log: Log, lost: subprocess.Popen[str]
) -> None:
    """An upgrade, or a kill of the protector, comes between the order and its signal."""
    gone: list[str] = []
    with looks(loop, log) as (before, _), looks(loop, log) as (found, _):
        before.watch(ADDRESS, 1, 0, lambda: None)
        before.order((ADDRESS,), signal.SIGKILL)
        until(loop, lambda: before._scan is not None)
        before.stop_looking()

        found.watch(ADDRESS, 1, 0, partial(gone.append, ADDRESS))
        for address, sign in before.orders:
            found.order((address,), sign)
        until(loop, lambda: gone == [ADDRESS])
        assert lost.wait(30) == -signal.SIGKILL


def test_a_lost_worker_that_no_look_finds_delays_the_fleet_only_so_long(
    loop: Loop, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "_SCAN_AGAIN_S", 0.001)
    gone: list[str] = []

    def refused(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with looks(loop, log, 0.0) as (found, _):
        monkeypatch.setattr(proc_scan, "Scan", refused)
        found.watch(ADDRESS, 1, 0, partial(gone.append, ADDRESS))
        until(loop, lambda: bool(log.said))
        assert gone == []
        found.order((ADDRESS,), signal.SIGKILL)
        until(loop, lambda: gone == [ADDRESS])
    assert log.said == [("cannot-examine", {"error": "Too many open files"})]


def test_a_look_that_hangs_is_given_up_and_holds_nothing_up(
    loop: Loop, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one at a process whose memory is locked."""
    monkeypatch.setattr(orphans, "_SCAN_S", 0.1)
    monkeypatch.setattr(orphans, "_SCAN_AGAIN_S", 0.05)
    with looks(loop, log) as (found, counted), living({"NOTIFY_SOCKET": ADDRESS}) as ours:
        with monkeypatch.context() as hangs:
            hangs.setattr(proc_scan, "_with_address", lambda wanted: signal.pause())
            found.end(ADDRESS)
            until(loop, lambda: "cannot-examine" in (event for event, _ in log.said))
        monkeypatch.setattr(orphans, "_SCAN_S", 30.0)
        until(loop, lambda: log.said[-1][0] == "left-behind")
        assert log.said[-1] == ("left-behind", {"pid": ours, "signal": "SIGTERM"})
        assert len(counted) >= 2
        assert done(loop, found)


def test_what_keeps_us_from_looking_is_said_once_and_again_after_a_look(
    loop: Loop, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "_SCAN_AGAIN_S", 0.01)

    def refused(wanted: object) -> object:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with looks(loop, log) as (found, counted):
        for said in (1, 2):
            with monkeypatch.context() as patched:
                patched.setattr(proc_scan, "_with_address", refused)
                found.end(ADDRESS)
                more = len(counted) + 5
                until(loop, lambda more=more: len(counted) >= more)  # type: ignore[misc]
            until(loop, lambda: not found.left)
            assert log.said == [("cannot-examine", {"error": "Operation not permitted"})] * said


def test_a_look_under_way_is_ended_before_another_program_begins_one(loop: Loop, log: Log) -> None:
    with looks(loop, log) as (found, counted), living({"NOTIFY_SOCKET": ADDRESS}):
        found.end(ADDRESS)
        until(loop, lambda: counted == [1])
        found.stop_looking()
        assert found.left == (ADDRESS,)  # the caller learns what there is to look for
        found.schedule()
        until(loop, lambda: bool(log.said))
        assert done(loop, found)


def test_nothing_of_ours_is_open_in_the_process_that_looks(
    loop: Loop, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undelivered connection, for one, must end for its client when the worker closes it."""
    receive, send = os.pipe()
    monkeypatch.setattr(proc_scan, "_with_address", lambda wanted: signal.pause())
    with looks(loop, log) as (found, counted):
        found.end(ADDRESS)
        until(loop, lambda: counted == [1])
        os.close(send)
        with open(receive, "rb") as file:
            assert file.read() == b""
        found.stop_looking()
    assert log.said == []


def test_it_closes_only_the_descriptors_that_are_open(
    loop: Loop, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """closerange() to a limit of a billion takes minutes without close_range(2), as with musl."""
    real = os.closerange

    def closerange(low: int, high: int) -> None:
        assert high - low < 1000
        real(low, high)

    monkeypatch.setattr(os, "closerange", closerange)
    with looks(loop, log) as (found, _), living({"NOTIFY_SOCKET": ADDRESS}):
        found.end(ADDRESS)
        until(loop, lambda: bool(log.said))
        assert log.said[0][0] == "left-behind"
        assert done(loop, found)
