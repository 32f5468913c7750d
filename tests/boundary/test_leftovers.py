"""What gone workers leave, which of it is ours to end, and when a look misses it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from socketprotector.system import leftovers, proc_scan, procfs
from socketprotector.system.leftovers import NEVER, Holder, Leftovers
from socketprotector.system.loop import Loop
from socketprotector.system.proc_scan import Family, Stranger
from socketprotector.system.process import Process, boot_ticks, known_pids
from tests.boundary.ending import settle, until

#: Differs from that of a second run of these tests beside this one.
ADDRESS = f"@a-test-of-leftovers-{os.getpid()}"
STUBBORN = "trap '' TERM; echo; while :; do sleep 0.01; done"


@contextmanager
def living(
    *fds: int, command: tuple[str, ...] = ("/bin/cat",), **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has these descriptors and, from its first moment on, this environment."""
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=fds,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"\n"  # it has been executed
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def family(*known: int, addresses: tuple[str, ...] = ()) -> Family:
    """The processes below this one are strangers, but for what the test run has started."""
    return Family(os.getpid(), False, known_pids() | {*known}, frozenset(), addresses)


def found(*known: int, addresses: tuple[str, ...] = ()) -> dict[int, Stranger]:
    strangers = proc_scan.strangers(os.getpid(), family(*known, addresses=addresses))
    return {each.pid: each for each in strangers}


def test_a_stranger_is_found_with_its_sockets_whatever_its_environment(
    listener: socket.socket,
) -> None:
    with living(listener.fileno()) as one, living() as other:
        seen = found()
        assert seen[one.pid].sockets == frozenset({inode(listener)})
        assert seen[other.pid].sockets == frozenset()
    assert not found().keys() & {one.pid, other.pid}


def test_what_descends_from_a_known_process_is_no_stranger() -> None:
    forks = ("/bin/sh", "-c", "setsid sh -c 'echo; exec sleep 1000'; exit 1")
    with living(command=forks) as parent:
        [child] = procfs.children_of(parent.pid)
        assert found().keys() >= {parent.pid, child}
        assert not found(parent.pid).keys() & {parent.pid, child}
        os.kill(child, signal.SIGKILL)


def test_a_descriptor_of_one_thread_alone_is_found(listener: socket.socket) -> None:
    text = (
        "import ctypes, os, threading, time\n"
        "def hide():\n"
        "    ctypes.CDLL(None).unshare(0x400)\n"  # CLONE_FILES
        f"    ready.set(); time.sleep(1000)\n"
        "ready = threading.Event()\n"
        "threading.Thread(target=hide).start(); ready.wait()\n"
        f"os.close({listener.fileno()}); print(flush=True)\n"
    )
    command = (sys.executable, "-S", "-E", "-c", text)
    with living(listener.fileno(), command=command) as hiding:
        assert found()[hiding.pid].sockets == frozenset({inode(listener)})


def test_a_notify_address_is_found_only_if_it_is_asked_for() -> None:
    with living(NOTIFY_SOCKET=ADDRESS) as ours, living(NOTIFY_SOCKET=ADDRESS + "x") as other:
        seen = found(addresses=(ADDRESS,))
        assert (seen[ours.pid].address, seen[other.pid].address) == (ADDRESS, "")
        assert found()[ours.pid].address == ""


def test_the_child_of_a_process_that_has_just_ended_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, looks = os.listdir, list[str]()

    with living() as child:

        def listdir(path: str) -> list[str]:
            looks.append(path)
            return [name for name in real(path) if len(looks) > 1 or name != str(child.pid)]

        monkeypatch.setattr(os, "listdir", listdir)
        try:
            assert child.pid in found()
        finally:
            monkeypatch.undo()


# -- what is done with it ----------------------------------------------------------------------


class Log:
    """What it says, by event."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def write(self, level: str, event: str, **fields: Any) -> None:
        self.said.append((event, fields))

    def signals(self, pid: int) -> list[str]:
        return [f["signal"] for _, f in self.said if f.get("pid") == pid and "signal" in f]

    def hints(self, pid: int) -> list[str]:
        return [f["hint"] for _, f in self.said if f.get("pid") == pid and "hint" in f]


@pytest.fixture
def log() -> Log:
    return Log()


class Ours:
    """Leftovers, and the generations that live."""

    def __init__(self, loop: Loop, log: Log, kill_timeout_s: float) -> None:
        self.loop = loop
        self.living: list[Holder] = []
        self.leftovers = Leftovers(
            *(loop, log, kill_timeout_s, None),  # type: ignore[arg-type]
            reaper=os.getpid,
            groups=lambda: (),
            holders=lambda: self.living,
        )

    def finish(self) -> None:
        """Wait until nothing is left to be done."""
        said: list[bool] = []
        self.leftovers.when_ended(lambda: said.append(True))
        until(self.loop, lambda: bool(said))


@pytest.fixture
def make(loop: Loop, log: Log) -> Iterator[Callable[..., Ours]]:
    yield lambda kill_timeout_s=30.0: Ours(loop, log, kill_timeout_s)
    settle(loop)


def test_what_holds_a_socket_of_a_failed_worker_is_ended(
    make: Callable[..., Ours], log: Log, listener: socket.socket
) -> None:
    ours, start = make(), boot_ticks()
    with living(listener.fileno()) as left, living() as other:
        ours.leftovers.end((2, start, {inode(listener)}))
        assert log.said == [], "nothing is looked at in the callback of a worker's end"
        until(ours.loop, lambda: bool(log.signals(left.pid)))
        assert left.wait(30) == -signal.SIGTERM
        ours.finish()
        assert log.signals(left.pid) == ["SIGTERM"]
        assert log.hints(other.pid) == ["not signalled: it holds no socket of ours"]
        assert other.poll() is None
        assert ours.leftovers.condemned == ()


def test_what_ignores_TERM_is_killed_when_its_time_is_over(
    make: Callable[..., Ours], log: Log, listener: socket.socket
) -> None:
    ours, start = make(0.1), boot_ticks()
    with living(listener.fileno(), command=("/bin/sh", "-c", STUBBORN)) as left:
        ours.leftovers.end((2, start, {inode(listener)}))
        until(ours.loop, lambda: ours.leftovers.found)
        assert ours.leftovers.condemned == ((inode(listener), 2, start),)
        ours.finish()
        assert left.wait(30) == -signal.SIGKILL
        assert log.signals(left.pid) == ["SIGTERM", "SIGKILL"]


@pytest.mark.parametrize(
    ("failed", "living_generations", "is_ended"),
    [
        # (number, seconds between its start and the stranger's): positive if it is older.
        ((2, 5), [], True),
        ((2, 5), [(1, 9)], True),  # the serving one is older: the failed release is the newer
        ((2, -5), [(1, 9)], False),  # it was there before the failed one
        ((1, 9), [(2, 5)], False),  # it may be a child of the newer one's workers
        ((1, 9), [(2, -5)], True),  # it is older than the newer one
        ((5, -5), [(4, -9)], True),  # it is older than each that has the socket now
    ],
)
def test_a_stranger_that_may_belong_to_a_living_generation_is_left_alone(
    make: Callable[..., Ours],
    log: Log,
    listener: socket.socket,
    failed: tuple[int, int],
    living_generations: list[tuple[int, int]],
    is_ended: bool,
) -> None:
    ours, ticks = make(), os.sysconf("SC_CLK_TCK")
    sockets = {inode(listener)}
    with living(listener.fileno()) as left:
        stat = procfs.stat_of(left.pid)
        assert stat is not None
        ours.living = [(n, stat.start - age * ticks, sockets) for n, age in living_generations]
        ours.leftovers.end((failed[0], stat.start - failed[1] * ticks, sockets))
        ours.finish()
        assert bool(log.signals(left.pid)) == is_ended


def test_a_socket_without_a_generation_belongs_to_no_stranger(
    make: Callable[..., Ours], log: Log, listener: socket.socket
) -> None:
    ours = make()
    ours.living = [(0, NEVER, {inode(listener)})]
    with living(listener.fileno()) as left:
        ours.leftovers.adopt(())
        ours.finish()
        assert log.signals(left.pid) == ["SIGTERM"]


def test_without_a_stranger_nothing_is_scanned(
    make: Callable[..., Ours], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make()
    monkeypatch.setattr(procfs, "children_of", lambda _: [*known_pids()])
    ours.leftovers.end((1, 1, {1}))
    assert ours.loop.due(leftovers._TIMER) is None
    assert ours.leftovers.condemned == ()


def test_a_scan_that_hangs_is_given_up_and_holds_nothing_up(
    make: Callable[..., Ours],
    log: Log,
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one at a process whose memory is locked."""
    monkeypatch.setattr(leftovers, "_SCAN_S", 0.1)
    monkeypatch.setattr(leftovers, "_SCAN_AGAIN_S", 0.05)
    ours, start = make(), boot_ticks()
    with living(listener.fileno()) as left:
        with monkeypatch.context() as hangs:
            hangs.setattr(proc_scan, "strangers", lambda *_: signal.pause())
            ours.leftovers.end((2, start, {inode(listener)}))
            until(ours.loop, lambda: "cannot-examine" in (event for event, _ in log.said))
        monkeypatch.setattr(leftovers, "_SCAN_S", 30.0)
        until(ours.loop, lambda: log.signals(left.pid) == ["SIGTERM"])
        ours.finish()


def test_what_keeps_us_from_looking_is_said_once(
    make: Callable[..., Ours],
    log: Log,
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leftovers, "_SCAN_AGAIN_S", 0.01)
    scans: list[object] = []

    def refused(*_: object) -> None:
        scans.append(None)
        raise OSError(errno.EMFILE, "Too many open files")

    ours, start = make(), boot_ticks()
    with living(listener.fileno()) as left:
        with monkeypatch.context() as short:
            short.setattr(proc_scan, "Scan", refused)
            ours.leftovers.end((2, start, {inode(listener)}))
            until(ours.loop, lambda: len(scans) >= 5)
        ours.finish()
        assert log.signals(left.pid) == ["SIGTERM"]
        assert log.said[0] == ("cannot-examine", {"error": "Too many open files"})
        assert [event for event, _ in log.said].count("cannot-examine") == 1


def test_a_scan_is_ended_before_another_program_begins_one(
    make: Callable[..., Ours], log: Log, listener: socket.socket
) -> None:
    before, ours, start = make(), make(), boot_ticks()
    with living(listener.fileno()) as left:
        before.leftovers.end((2, start, {inode(listener)}))
        until(before.loop, lambda: before.leftovers._scan is not None)
        before.leftovers.stop_looking()
        assert log.said == []
        ours.leftovers.adopt(before.leftovers.condemned)
        until(ours.loop, lambda: log.signals(left.pid) == ["SIGTERM"])
        ours.finish()


def test_nothing_of_ours_is_open_in_the_process_that_scans(
    make: Callable[..., Ours], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undelivered connection, for one, must end for its client when the worker closes it."""
    receive, send = os.pipe()
    monkeypatch.setattr(proc_scan, "strangers", lambda *_: signal.pause())
    ours = make()
    ours.leftovers.adopt(())
    until(ours.loop, lambda: ours.leftovers._scan is not None)
    os.close(send)
    with open(receive, "rb") as file:
        assert file.read() == b""
    ours.leftovers.stop_looking()
    assert log.said == []


def test_the_scan_closes_only_the_descriptors_that_are_open(
    make: Callable[..., Ours], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """closerange() to a limit of a billion takes minutes without close_range(2), as with musl."""
    real = os.closerange

    def closerange(low: int, high: int) -> None:
        assert high - low < 1000
        real(low, high)

    monkeypatch.setattr(os, "closerange", closerange)
    ours = make()
    ours.leftovers.adopt(())
    ours.finish()
    assert log.said == []


# -- lost workers ----------------------------------------------------------------------------


def test_a_lost_worker_is_found_by_its_address_with_what_was_ordered(
    make: Callable[..., Ours], log: Log, listener: socket.socket
) -> None:
    """Its socket is that of a generation that was not stored: it is no leftover."""
    ours = make()
    ours.living = [(0, NEVER, {inode(listener)})]
    seen: list[tuple[Process | None, int | None]] = []
    with living(listener.fileno(), NOTIFY_SOCKET=ADDRESS) as lost:
        for number, address in ((7, ADDRESS), (8, f"{ADDRESS}-8")):
            ours.leftovers.find(
                *(number, ("/no/path", address), 1, signal.SIGUSR1, None),
                lambda *found: seen.append(found),
            )
        ours.leftovers.drain(2)
        assert [*ours.leftovers.orders] == []
        ours.leftovers.drain(1)
        ours.leftovers.order(8, signal.SIGKILL)
        ordered = [sign for _, sign in ours.leftovers.orders]
        assert ordered == [signal.SIGUSR1, signal.SIGKILL]
        until(ours.loop, lambda: len(seen) == 2)
        (process, sign), nothing = seen
        assert process is not None
        assert (process.pid, sign) == (lost.pid, signal.SIGUSR1)
        assert nothing == (None, signal.SIGKILL)
        ours.finish()
        assert log.signals(lost.pid) == []
        process.close()


def test_a_lost_worker_that_no_scan_finds_delays_the_fleet_only_so_long(
    make: Callable[..., Ours], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_SCAN_AGAIN_S", 0.001)
    seen: list[object] = []

    def refused(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    ours = make()
    with monkeypatch.context() as short:
        short.setattr(proc_scan, "Scan", refused)
        ours.leftovers.find(7, (ADDRESS,), 1, 0, None, lambda *found: seen.append(found))
        until(ours.loop, lambda: bool(log.said))
        assert seen == []
        ours.leftovers.order(7, signal.SIGKILL)
        until(ours.loop, lambda: seen == [(None, signal.SIGKILL)])
    ours.finish()
    assert log.said == [("cannot-examine", {"error": "Too many open files"})]
