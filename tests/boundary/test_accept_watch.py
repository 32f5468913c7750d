"""Whether waiting clients are accepted: what is asked, and when; the clock is moved by hand."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest

from socketprotector.daemon.delivery import NEVER_TAKEN_S, UNTAKEN_S
from socketprotector.daemon.delivery.shared.accept_watch import AcceptWatch, Backlogs
from socketprotector.daemon.delivery.shared.shared_delivery import SharedDelivery
from socketprotector.system.loop import Loop
from socketprotector.system.sock_diag import Line, none_accepted, unaccepted
from tests.boundary import ending
from tests.boundary.deliveries import PathWorld, SharedWorld
from tests.boundary.listening import KINDS, listening

A, B, C = (bytes([each]) for each in b"abc")
FIRST_LOOK_S, LOOK_S = NEVER_TAKEN_S / 4, UNTAKEN_S / 2  # the pauses between two looks


class World(Backlogs):
    """Who waits at which listener, and the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.loop = Loop()
        self.lines: dict[int, Line] = {}
        self.asked = 0
        self.open: set[int] = set()  # where an accepted client is still open
        self.asked_open: list[int] = []
        self.said: list[tuple[float, int, bool, frozenset[int]]] = []
        self.untaken = AcceptWatch(self.loop, self)

    def waiting_clients(self) -> dict[int, Line]:
        self.asked += 1
        return self.lines

    def has_open(self, index: int) -> bool:
        self.asked_open.append(index)
        return index in self.open

    def watch(self) -> None:
        pass

    def report_untaken(self, seconds: float, waiting: int, ever: bool, at: frozenset[int]) -> None:
        self.said.append((seconds, waiting, ever, at))

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + 0.25, until)
            ending.turn(self.loop)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch)
    made.untaken.begin(served_before=False)
    yield made
    made.loop.close()


def come(world: World, line: Line, index: int = 0) -> None:
    world.lines = {**world.lines, index: line}
    if world.untaken.awaits:
        world.untaken.note_client(index)


def test_the_limits_may_be_others(world: World) -> None:
    """A canary's workers have less time: its clients could have gone elsewhere."""
    world.untaken.end()
    world.untaken = AcceptWatch(world.loop, world, limits_s=(2.0, 10.0), timer="another")
    world.untaken.begin(served_before=False)
    come(world, frozenset({A}))
    world.pass_time(2.25)
    assert world.said == []
    world.pass_time(0.25)
    assert [each[1:] for each in world.said] == [(1, False, frozenset({0}))]

    world.untaken.begin(served_before=False)
    come(world, frozenset({A}))
    world.pass_time(0.5)
    come(world, frozenset({B}))
    world.pass_time(0.5)
    world.lines = {}  # all accepted
    world.pass_time(5.0)
    come(world, frozenset({C}))
    world.pass_time(10.0)
    assert len(world.said) == 1
    world.pass_time(5.0)
    assert [each[1:] for each in world.said[1:]] == [(1, True, frozenset({0}))]


def test_a_generation_that_never_accepted_is_reported_once(world: World) -> None:
    come(world, frozenset({A}))
    world.pass_time(FIRST_LOOK_S + NEVER_TAKEN_S - 0.5)
    assert world.said == []
    assert world.untaken.untaken_s is None

    world.pass_time(0.5)
    [(seconds, *what)] = world.said
    assert seconds == pytest.approx(NEVER_TAKEN_S)
    assert what == [1, False, frozenset({0})]
    come(world, frozenset({A, B}))
    world.pass_time(1000.0)
    assert len(world.said) == 1
    assert world.untaken.untaken_s == pytest.approx(1000 + NEVER_TAKEN_S)


def test_a_report_that_ends_the_watch_is_its_last_look(world: World) -> None:
    """A canary that fails is not watched any more."""
    report = world.report_untaken

    def end(seconds: float, waiting: int, ever: bool, at: frozenset[int]) -> None:
        report(seconds, waiting, ever, at)
        world.untaken.end()

    world.report_untaken = end  # type: ignore[method-assign]
    come(world, frozenset({A}))
    world.pass_time(FIRST_LOOK_S + NEVER_TAKEN_S)
    asked = world.asked
    world.pass_time(1000.0)
    assert (len(world.said), world.asked) == (1, asked)
    assert not world.untaken.runs


def test_one_that_has_accepted_is_reported_later_and_in_other_words(world: World) -> None:
    come(world, frozenset({A}))
    world.lines = {0: ()}
    world.pass_time(FIRST_LOOK_S)
    come(world, frozenset({B}))
    world.pass_time(LOOK_S + UNTAKEN_S - 1.0)
    assert world.said == []

    world.pass_time(1.0)
    [(seconds, *what)] = world.said
    assert seconds == pytest.approx(UNTAKEN_S)
    assert what == [1, True, frozenset({0})]


def test_one_that_has_a_client_open_has_accepted_though_no_look_has_seen_it(world: World) -> None:
    """Its workers accepted their first clients at once, and are busy with them."""
    world.open = {0}
    come(world, frozenset({B}))
    world.pass_time(FIRST_LOOK_S + NEVER_TAKEN_S - 0.5)
    assert world.asked_open == [], "a connection costs no such query"
    world.pass_time(LOOK_S + 0.5)
    assert world.said == []
    assert world.untaken.has_accepted

    world.pass_time(UNTAKEN_S - NEVER_TAKEN_S)
    assert [each[1:] for each in world.said] == [(1, True, frozenset({0}))]
    assert world.asked_open == [0]


def test_a_client_that_is_open_at_one_listener_says_nothing_of_another(world: World) -> None:
    world.open = {0}
    come(world, frozenset({A}), 0)
    come(world, frozenset({C}), 1)
    world.pass_time(2 * FIRST_LOOK_S + NEVER_TAKEN_S)
    assert [each[1:] for each in world.said] == [(1, False, frozenset({1}))]


def test_one_that_is_busy_is_not_reported(world: World) -> None:
    come(world, frozenset({A}))
    for each in range(200):
        world.lines = {0: frozenset({bytes([each]), bytes([each + 1])})}
        world.pass_time(1.0)
    assert world.said == []
    assert world.untaken.untaken_s is None


def test_one_that_had_its_turn_before_is_not_said_to_have_accepted_none(world: World) -> None:
    world.untaken.begin(served_before=True)
    come(world, frozenset({A}))
    world.pass_time(LOOK_S + UNTAKEN_S)
    assert [ever for _, _, ever, _ in world.said] == [True]


def test_another_generation_starts_afresh(world: World) -> None:
    come(world, frozenset({A}))
    world.pass_time(FIRST_LOOK_S + NEVER_TAKEN_S)
    world.untaken.begin(served_before=False)
    assert world.untaken.untaken_s is None

    come(world, frozenset({A}))
    world.pass_time(FIRST_LOOK_S + NEVER_TAKEN_S)
    assert len(world.said) == 2


def test_a_listener_that_is_ignored_beside_one_that_is_served_is_reported(world: World) -> None:
    come(world, (), 0)
    come(world, frozenset({C}), 1)
    world.pass_time(2 * FIRST_LOOK_S + NEVER_TAKEN_S)
    [(_, *what)] = world.said
    assert what == [1, False, frozenset({1})]


def test_where_the_kernel_does_not_say_nothing_is_reported(world: World) -> None:
    for _ in range(10):
        come(world, frozenset({A}))
        world.lines = {}
        world.pass_time(UNTAKEN_S)
    assert world.said == []
    assert world.untaken.untaken_s is None


def test_the_kernel_is_not_asked_while_no_client_comes_and_seldom_while_all_is_well(
    world: World,
) -> None:
    world.pass_time(600.0)
    assert world.asked == 0

    for _ in range(600):
        come(world, ())
        world.pass_time(1.0)
    assert world.asked <= 600 / LOOK_S + 2


# -- what the kernel reports -------------------------------------------------------


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_a_waiting_client_is_known_until_it_is_accepted(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with listening(family, host, both=both) as listener, ExitStack() as clients:
        assert unaccepted(listener) == frozenset()
        for each in (*hosts, *hosts):
            address = (each, listener.getsockname()[1])
            clients.enter_context(socket.create_connection(address)).send(b"words")
        all_wait = unaccepted(listener)
        assert len(all_wait) == 2 * len(hosts)

        clients.enter_context(listener.accept()[0])
        now = unaccepted(listener)

        assert len(now) == 2 * len(hosts) - 1
        assert none_accepted(now, all_wait)
        assert not none_accepted(all_wait, now)


def test_clients_waiting_elsewhere_on_the_same_port_are_not_counted() -> None:
    with listening(socket.AF_INET, "127.0.0.1") as listener, socket.socket() as other:
        other.bind(("127.0.0.2", listener.getsockname()[1]))
        other.listen()
        with socket.create_connection(other.getsockname()):
            assert len(unaccepted(other)) == 1
            assert unaccepted(listener) == frozenset()


def test_clients_waiting_at_a_unix_socket_are_known_and_those_that_give_up_are_not_accepted(
    tmp_path: Path,
) -> None:
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as clients:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        assert unaccepted(listener) == ()
        made = [clients.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        for each in made:
            each.connect(listener.getsockname())
        all_wait = unaccepted(listener)
        assert len(all_wait) == 3

        made[0].close()
        assert none_accepted(all_wait, unaccepted(listener))
        clients.enter_context(listener.accept()[0])
        assert not none_accepted(all_wait, unaccepted(listener))


@pytest.mark.parametrize("kind", [SharedWorld, PathWorld])
def test_a_client_is_open_from_its_acceptance_on_until_the_worker_closes_it(
    kind: type[SharedWorld],
) -> None:
    world = kind()
    try:
        world.serving(1)
        watch = cast("SharedDelivery", world.delivery).steering.accept_watch
        world.connect()
        assert not watch.backlogs.has_open(0)
        connection = world.accept(world.handed[1][0])
        assert connection is not None
        with connection:
            assert watch.backlogs.has_open(0)
            assert not watch.backlogs.has_open(1)
        assert not watch.backlogs.has_open(0)
    finally:
        world.close()
