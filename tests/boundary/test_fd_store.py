"""What the guard or systemd is asked to keep, and what a guard makes of it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from socketprotector.core.fleet import Fleet
from socketprotector.core.snapshot import Snapshot
from socketprotector.daemon.checkpoint import Checkpoint
from socketprotector.daemon.effects import Effects
from socketprotector.daemon.parents import SystemdStore
from socketprotector.model.records import SettingsRecord
from socketprotector.model.settings import Settings
from socketprotector.programs.guard import Guard
from socketprotector.system import inherited
from socketprotector.system.inherited import Named
from socketprotector.system.log import Log
from socketprotector.system.sd_notify import Outbox, Store, parse, room_of
from socketprotector.system.state_file import StateFile

Again = list[Callable[[], None]]


@pytest.fixture
def line() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The protector's end of the line, and the guard's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def guard(line: tuple[socket.socket, socket.socket]) -> Iterator[Guard]:
    guard = Guard(["/nowhere"], {})
    guard.line = line[1]
    yield guard
    for name in list(guard.store):
        guard.forget(name)


def test_a_guard_that_gives_up_leaves_no_socket_file(tmp_path: Path) -> None:
    """But that of a socket on which another process listens, such as a worker that lives on."""
    store, names = {}, [inherited.CONTROL, f"{inherited.LISTENER}0", f"{inherited.LISTENER}1"]
    for name in names:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(tmp_path / name))
            made.listen()
            store[name] = os.dup(made.fileno())
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        store[f"{inherited.LISTENER}2"] = os.dup(tcp.fileno())
    (tmp_path / "notify").mkdir()
    store[inherited.NOTIFY] = os.open(tmp_path / "notify", os.O_RDONLY)
    one = Guard(["/nowhere"], store)

    with socket.socket(fileno=os.dup(store[names[-1]])), pytest.raises(SystemExit):
        one.give_up("exited with status 1", 111)
    for name in list(one.store):
        one.forget(name)

    assert [each.name for each in tmp_path.iterdir()] == [names[-1]]


@pytest.fixture
def files() -> Iterator[list[int]]:
    made = [os.memfd_create(f"file-{number}") for number in range(3)]
    yield made
    for fd in made:
        os.close(fd)


def kept(guard: Guard) -> dict[str, str]:
    guard.hear()
    return {name: os.readlink(f"/proc/self/fd/{fd}") for name, fd in guard.store.items()}


def file(number: int) -> str:
    return f"/memfd:file-{number} (deleted)"


def test_what_is_wanted_is_kept_and_nothing_else(
    line: tuple[socket.socket, socket.socket], guard: Guard, files: list[int]
) -> None:
    outbox = Outbox(lambda again: None, line[0])
    store = Store(outbox)

    store.sync({"sp.a": files[0], "sp.b": files[1]})
    assert kept(guard) == {"sp.a": file(0), "sp.b": file(1)}
    store.sync({"sp.b": files[1], "sp.c": files[2]})
    assert kept(guard) == {"sp.b": file(1), "sp.c": file(2)}
    store.sync({})
    assert kept(guard) == {}


def test_what_came_from_there_is_not_sent_again_but_removed_when_it_is_over(
    line: tuple[socket.socket, socket.socket], guard: Guard, files: list[int]
) -> None:
    guard.store = {"sp.a": os.dup(files[0]), "sp.b": os.dup(files[1])}
    store = Store(Outbox(lambda again: None, line[0]), kept=["sp.a", "sp.b"])

    store.sync({"sp.a": files[0]})

    assert kept(guard) == {"sp.a": file(0)}
    assert not guard.began, "a protector that cannot resume may have sent as much"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_socket_with_another_name_is_stored_by_systemd_too(
    line: tuple[socket.socket, socket.socket], resumed: bool
) -> None:
    """systemd does not store a socket a second time, so its old name must be removed first."""
    ours, theirs = line
    with socket.socket() as held, socket.socket() as serving:
        before = {"sp.listener.0": serving.fileno(), "sp.reserved.0": held.fileno()}
        outbox = Outbox(lambda again: None, ours)
        store = SystemdStore(outbox, before if resumed else {}, most=9)
        if not resumed:
            store.sync(before)
        after = {"sp.listener.0": serving.fileno(), "sp.twin.0.1": held.fileno()}
        for _ in range(2):
            store.sync(after)
        store.sync(dict.fromkeys(after, -1))  # as at the end of a stop
    outbox.finish(0.0)
    said = [parse(data) for data in iter(lambda: theirs.recv(4096), b"")]
    assert [(each["FDNAME"], "FDSTORE" in each) for each in said[-2:]] == [
        ("sp.reserved.0", False),
        ("sp.twin.0.1", True),
    ]
    assert len(said) == (2 if resumed else 4)


def test_a_name_again_stands_for_the_new_descriptor(guard: Guard, files: list[int]) -> None:
    guard.take({"FDSTORE": "1", "FDNAME": "sp.a"}, os.dup(files[0]))
    guard.take({"FDSTORE": "1", "FDNAME": "sp.a"}, os.dup(files[1]))

    assert kept(guard) == {"sp.a": file(1)}


def test_a_descriptor_without_a_name_or_a_wish_is_closed(guard: Guard, files: list[int]) -> None:
    guard.take({"FDSTORE": "1"}, os.dup(files[0]))
    guard.take({"FDNAME": "sp.a"}, os.dup(files[0]))
    guard.take({"FDSTOREREMOVE": "1", "FDNAME": "sp.never"}, -1)

    assert kept(guard) == {}


def test_the_last_words_of_one_that_had_not_read_everything_are_heard(
    line: tuple[socket.socket, socket.socket], guard: Guard, files: list[int]
) -> None:
    ours, theirs = line
    theirs.send(b"X_EXITED=1 0")  # never read: a close then resets the line
    store = Store(Outbox(lambda again: None, ours))
    store.sync({"sp.a": files[0]})
    ours.send(b"EXIT_STATUS=7")
    ours.close()

    assert kept(guard) == {"sp.a": file(0)}
    assert guard.verdict == 7
    assert guard.line is None


def test_while_the_guard_is_behind_nothing_is_lost_nor_waited_for(
    line: tuple[socket.socket, socket.socket], guard: Guard, files: list[int]
) -> None:
    again: Again = []
    outbox = Outbox(again.append, line[0])
    store = Store(outbox)
    wanted = {f"sp.{number}": files[number % 3] for number in range(600)}

    store.sync(wanted)
    assert not store.flushed
    while again:
        guard.hear()
        again.pop()()

    assert kept(guard).keys() == wanted.keys()
    assert store.flushed
    outbox.close()


def test_what_is_dropped_before_the_guard_has_it_is_closed_at_once(
    line: tuple[socket.socket, socket.socket], guard: Guard, files: list[int]
) -> None:
    again: Again = []
    outbox = Outbox(again.append, line[0])
    store = Store(outbox)
    plenty = {f"sp.{number}": files[0] for number in range(600)}
    store.sync(plenty)  # from here on everything waits
    theirs, ours = socket.socketpair()
    with theirs:
        with ours:
            store.sync({**plenty, "sp.hand.1": ours.fileno()})
            store.sync(plenty)
        assert theirs.recv(1, socket.MSG_DONTWAIT) == b""  # no copy is left
    while again:
        guard.hear()
        again.pop()()

    assert kept(guard).keys() == plenty.keys()
    outbox.close()


def test_what_comes_in_the_place_of_another_is_given_before_that_is_dropped(
    line: tuple[socket.socket, socket.socket], files: list[int]
) -> None:
    """Killed between the two the next program would have neither, as of a listener bound anew."""
    store = Store(Outbox(lambda again: None, line[0]))
    store.sync({"sp.listener.0": files[0]})
    store.sync({"sp.listener.0.1": files[1]})

    said = [line[1].recv(4096, socket.MSG_DONTWAIT).decode().split() for _ in range(3)]

    assert [(each[0], each[1]) for each in said] == [
        ("FDSTORE=1", "FDNAME=sp.listener.0"),
        ("FDSTORE=1", "FDNAME=sp.listener.0.1"),
        ("FDSTOREREMOVE=1", "FDNAME=sp.listener.0"),
    ]


@pytest.mark.parametrize("many", [False, True])
def test_what_is_over_is_dropped_once_the_state_does_not_mention_it(
    guard: Guard, line: tuple[socket.socket, socket.socket], files: list[int], many: bool
) -> None:
    """Killed between the two the next program would lack what the state mentions."""
    store, named = Store(Outbox(lambda again: None, line[0])), Named()
    present: list[dict[str, str]] = []

    def sync(wanted: dict[str, int], *, written: bool) -> bool:
        for name in named.keys() - wanted.keys():
            del named[name]
        for name in wanted.keys() - named.keys():
            named[name] = wanted[name]

        def write() -> bool:
            present.append(kept(guard))
            return written

        return store.sync({} if many else wanted, named if many else Named(), write)

    assert sync({"sp.a": files[0], "sp.b": files[1]}, written=True)
    assert not sync({"sp.b": files[1], "sp.c": files[2]}, written=False)
    assert kept(guard) == {"sp.a": file(0), "sp.b": file(1), "sp.c": file(2)}
    assert sync({"sp.b": files[1]}, written=True)

    assert kept(guard) == {"sp.b": file(1)}
    assert [sorted(each) for each in present] == [
        ["sp.a", "sp.b"],
        ["sp.a", "sp.b", "sp.c"],
        ["sp.a", "sp.b", "sp.c"],
    ]


def test_a_signal_is_given_to_the_next_one_unless_it_was_taken(guard: Guard) -> None:
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTTIN):
        guard.signalled(number)
    guard.take({"X_BEGAN": "1"}, -1)
    guard.take({"X_TOOK": f"{signal.SIGHUP:d}"}, -1)
    assert [*guard.untaken] == [signal.SIGTERM, signal.SIGTTIN]

    guard.take({"X_TOOK": f"{signal.SIGTTIN:d}"}, -1)
    guard.take({"X_TOOK": f"{signal.SIGTERM:d}"}, -1)  # it may still be killed before it stops
    assert [*guard.untaken] == [signal.SIGTERM]

    guard.take({"STOPPING": "1"}, -1)
    assert [*guard.untaken] == []


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_so_is_a_second_stop_signal_though_the_first_has_begun_a_stop(
    guard: Guard, second: int
) -> None:
    guard.signalled(signal.SIGTERM)
    guard.take({"X_TOOK": f"{signal.SIGTERM:d}"}, -1)
    guard.signalled(second)
    guard.take({"STOPPING": "1"}, -1)
    guard.take({"X_STATE": "1"}, -1)
    assert [*guard.untaken] == [second]

    guard.take({"X_TOOK": f"{second:d}"}, -1)
    assert [*guard.untaken] == []
    guard.signalled(second)
    guard.take({"X_STATE": "1"}, -1)
    assert [*guard.untaken] == [second]


@pytest.mark.parametrize(("most", "names_bytes"), [(2, 1000), (1000, len("sp.a:sp.b:"))])
def test_what_there_is_no_room_for_is_left_out_until_there_is(
    line: tuple[socket.socket, socket.socket],
    guard: Guard,
    files: list[int],
    most: int,
    names_bytes: int,
) -> None:
    outbox = Outbox(lambda again: None, line[0])
    store = Store(outbox, most=most, names_bytes=names_bytes)
    named = Named()
    for name, fd in zip(("sp.a", "sp.b", "sp.c"), files, strict=True):
        named[name] = fd
        assert not store.left_out
        store.sync({}, named)

    assert store.left_out == ("sp.c",)
    assert store.complete
    assert store.has(named)  # an upgrade in place takes all along
    assert kept(guard) == {"sp.a": file(0), "sp.b": file(1)}
    del named["sp.a"]
    store.sync({}, named)
    assert not store.left_out
    assert kept(guard) == {"sp.b": file(1), "sp.c": file(2)}


def test_a_full_store_has_whole_workers_however_many_are_replaced(
    line: tuple[socket.socket, socket.socket], guard: Guard, files: list[int]
) -> None:
    """A kill loses a worker with a part of its descriptors, too."""
    store, named = Store(Outbox(lambda again: None, line[0]), most=10), Named()
    kinds = ("process", "notify", "line")

    def names(worker: int) -> set[str]:
        return {f"sp.worker.{worker}.{kind}" for kind in kinds}

    def start(worker: int) -> None:
        for name in names(worker):
            named[name] = files[0]

    for worker in range(8):
        start(worker)
    store.sync({"sp.state": files[1]}, named)
    for worker in range(40):
        for name in names(worker):
            del named[name]
        start(worker + 8)
        store.sync({"sp.state": files[1]}, named)

        stored = kept(guard).keys()
        assert len(stored) == 10
        alive = range(worker + 1, worker + 9)
        assert sum(names(each) <= stored for each in alive) == 3, stored


def test_where_none_is_kept_no_name_stays_of_what_has_come_and_gone() -> None:
    """It would grow with each worker, in a protector without systemd and without a guard."""
    named = Named()
    checkpoint = Checkpoint(
        cast(StateFile, None), Store(Outbox(lambda again: None)), cast(Log, None), dict
    )
    pool = SimpleNamespace(descriptors=named)
    snapshot = Snapshot(Fleet(), SettingsRecord(Settings("x", ("x",), "/")))
    checkpoint.begin(cast(Effects, SimpleNamespace(pool=pool)), lambda: snapshot)
    named["sp.worker.1.line"] = 3
    del named["sp.worker.1.line"]

    assert checkpoint.save()

    assert not named.changed


def test_how_much_room_there_is_comes_from_systemd() -> None:
    assert room_of({"FDSTORE": "512"}, 524_288) == 512
    assert room_of({}, 524_288) == room_of({"FDSTORE": "many"}, 524_288) == 524_288 - 64


def test_a_service_manager_cannot_pass_more_than_its_limit_on() -> None:
    assert room_of({"FDSTORE": "8192"}, 1024) == room_of({}, 1024) == 960
    assert room_of({}, 30) == 0
