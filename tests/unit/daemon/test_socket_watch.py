"""When clients at a shared socket need another generation: sockets in memory, and no process."""

from __future__ import annotations

import errno
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from socketprotector.core.events import Stranded, Untaken
from socketprotector.daemon.delivery import NEVER_TAKEN_S
from socketprotector.daemon.delivery.shared import (
    accept_watch,
    canary_watch,
    open_counts,
    socket_watch,
)
from socketprotector.daemon.delivery.shared.socket_watch import (
    FIRST_RESCUE_S,
    LAST_RESCUE_S,
    SocketWatch,
)
from socketprotector.daemon.delivery.shared.turns import Share
from socketprotector.system.loop import READ, SHUT
from tests.unit.daemon.shared_world import MemoryListener, MemorySocket, SharedWorld


class Probes:
    """Probes that wait at sockets without a worker."""

    def __init__(self) -> None:
        self.at: list[MemorySocket] = []  # where a probe waits
        self.unknown: set[tuple[int, int]] = set()

    def discard(self) -> set[tuple[int, int]]:
        for each in self.at:
            del each.line[0]
        self.at.clear()
        return self.unknown

    def clients_wait(self, listener: MemoryListener, number: int) -> bool:
        return listener.has_waiting(number)


class World(SharedWorld):
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, socket_watch, accept_watch, canary_watch)
        self.open: Counter[int] = Counter()  # the accepted connections, by tag
        tags = SimpleNamespace(
            tag_of=lambda one: one.tag, connections=lambda *_: (self.open, Counter[int]())
        )
        patch.setattr(open_counts, "accept_tags", tags)
        self.probes = Probes()
        probes: Any = self.probes
        self.watch = SocketWatch(self.listeners, self.turns, probes, self.steering)

    def connect(self, listener: MemoryListener, number: int = 0, client: bytes = b"a") -> None:
        """Have a client come, and the loop wake us if it watches for that."""
        listener.socket_for(number).line.append(client)
        self.turn(listener, number)

    def turn(self, listener: MemoryListener, number: int) -> None:
        one = listener.socket_for(number)
        events = self.clock.watched_for.get(one.fileno(), 0)
        if one.fileno() in self.clock.watched and (
            (events & READ and one.line) or (events & SHUT and not one.listens)
        ):
            self.clock.watched[one.fileno()]()

    def reads(self, listener: MemoryListener, number: int) -> bool:
        """Whether a client at this socket wakes us."""
        fd = listener.socket_for(number).fileno()
        return fd in self.clock.watched and bool(self.clock.watched_for[fd] & READ)

    @property
    def rescues(self) -> int:
        return self.clock.posted.count(Stranded())


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def pair(world: World) -> MemoryListener:
    """Generation 1 serves at socket 0."""
    made = world.listener()
    world.serving(1)
    return made


def replaced(world: World, pair: MemoryListener) -> None:
    """Have another socket in the place of the serving generation's."""
    pair.bind_anew(0)
    world.turns.note_replaced(world.listeners.all[0], 0)


# -- what wakes us -----------------------------------------------------------------------


def test_clients_that_are_accepted_do_not_wake_us(world: World, pair: MemoryListener) -> None:
    world.watch.watch()
    assert set(world.clock.watched) == {each.fileno() for each in pair.sockets}
    assert not world.reads(pair, 0)
    world.connect(pair, 0)
    world.clock.pass_time(100.0)
    assert not world.clock.posted


def test_the_first_client_of_a_generation_wakes_us(world: World, pair: MemoryListener) -> None:
    world.watch.accept_watch.begin(served_before=False)
    assert world.reads(pair, 0)
    world.connect(pair, 0)
    assert not world.reads(pair, 0)
    world.clock.pass_time(NEVER_TAKEN_S + 2)
    [(seconds, waiting, ever, listen)] = world.host.untaken
    assert (waiting, ever, listen) == (1, False, pair.settings.address)
    assert seconds >= NEVER_TAKEN_S


def test_it_is_no_longer_watched_for_once_no_generation_has_the_socket(
    world: World, pair: MemoryListener
) -> None:
    world.watch.accept_watch.begin(served_before=False)
    world.turns.leave(1, world.clock.now)
    world.watch.watch()
    assert not world.watch.accept_watch.runs


def test_a_socket_that_is_shut_down_is_repaired(world: World, pair: MemoryListener) -> None:
    world.watch.watch()
    pair.sockets[1].listens = False
    world.turn(pair, 1)
    assert world.steering.calls == [("repair", pair, 1)]


def test_a_socket_that_is_shut_down_again_and_again_is_watched_by_a_timer(
    world: World, pair: MemoryListener
) -> None:
    world.watch.watch_later()
    assert not world.clock.watched
    world.clock.pass_time(0.2)
    assert len(world.clock.watched) == 2


def test_each_listener_remembers_its_backlog(world: World, pair: MemoryListener) -> None:
    world.watch.watch()
    assert pair.noted == 1


def test_without_memory_for_epoll_watching_is_repeated(world: World, pair: MemoryListener) -> None:
    world.watch.watch()
    world.clock.cannot_watch = True
    world.watch.watch()
    assert not world.clock.watched
    world.clock.cannot_watch = False
    world.clock.pass_time(0.2)
    assert len(world.clock.watched) == 2


def test_without_memory_for_epoll_stranded_clients_are_looked_for_by_a_timer(
    world: World, pair: MemoryListener
) -> None:
    replaced(world, pair)
    pair.sockets[0].line.append(b"a")
    world.clock.cannot_watch = True
    world.watch.watch()
    world.clock.pass_time(0.5 * FIRST_RESCUE_S)
    assert world.rescues == 1


# -- stranded clients --------------------------------------------------------------------


def test_a_client_where_no_worker_accepts_needs_a_generation_at_once(
    world: World, pair: MemoryListener
) -> None:
    replaced(world, pair)
    world.watch.watch()
    assert world.reads(pair, 0)
    assert not world.clock.posted
    world.connect(pair, 0)
    assert world.clock.posted == [Stranded()]
    assert world.clock.lines == ["stranded"]
    assert world.clock.fields == [{"listen": pair.settings.address, "hint": None}]


def wait_behind_finishing_workers(world: World, pair: MemoryListener) -> None:
    """A client comes to a socket that only finishing workers may still accept from."""
    world.turns.leave(1, world.clock.now)
    world.turns.accepting[2] = 1
    world.turns.current = 1
    world.watch.watch()
    world.connect(pair, 0)


def test_workers_that_are_finishing_may_still_accept_it(world: World, pair: MemoryListener) -> None:
    wait_behind_finishing_workers(world, pair)
    assert not world.clock.posted
    assert not world.reads(pair, 0), "it would wake us all the time"
    world.clock.pass_time(0.9 * FIRST_RESCUE_S)
    assert not world.clock.posted
    world.clock.pass_time(0.2 * FIRST_RESCUE_S)
    assert world.clock.posted == [Stranded()]


def test_a_client_that_finishing_workers_accept_is_no_reason(
    world: World, pair: MemoryListener
) -> None:
    wait_behind_finishing_workers(world, pair)
    pair.sockets[0].line.clear()
    world.clock.pass_time(2 * FIRST_RESCUE_S)
    assert not world.clock.posted
    assert world.reads(pair, 0), "the next client may be stranded"


def test_one_that_waits_where_no_worker_finishes_is_not_delayed_by_one_that_may_be_accepted(
    world: World, pair: MemoryListener
) -> None:
    other = world.listener()
    world.turns.leaving[9] = 0, world.clock.now
    world.turns.unserved = frozenset({(1, pair.index), (1, other.index)})
    world.turns.accepting[2] = 1
    world.turns.unserved |= {(2, other.index)}
    other.sockets[1].line.append(b"b")
    pair.sockets[0].line.append(b"a")
    world.watch.watch()
    world.turn(pair, 0)
    assert world.clock.posted == [Stranded()]


def test_in_vain_the_pause_between_two_generations_grows_to_a_limit(
    world: World, pair: MemoryListener
) -> None:
    replaced(world, pair)
    world.watch.watch()
    world.connect(pair, 0)
    at: list[float] = []
    for _ in range(20_000):
        if world.rescues > len(at):
            at.append(world.clock.now)
        world.clock.pass_time(1.0)
        world.turn(pair, 0)
    pauses = [round(after - before) for before, after in pairwise(at)]
    assert pauses[:5] == [1, 2, 4, 8, 16]
    assert max(pauses) == LAST_RESCUE_S


def test_after_a_long_quiet_time_the_next_client_is_helped_at_once(
    world: World, pair: MemoryListener
) -> None:
    replaced(world, pair)
    world.watch.watch()
    for count in range(1, 4):
        world.connect(pair, 0)
        assert world.rescues == count
        pair.sockets[0].line.clear()
        world.clock.pass_time(LAST_RESCUE_S + 1)


def test_after_a_long_quiet_time_the_pauses_are_short_again(
    world: World, pair: MemoryListener
) -> None:
    replaced(world, pair)
    world.watch.watch()
    world.connect(pair, 0)
    while world.rescues < 4:
        world.clock.pass_time(1.0)
        world.turn(pair, 0)
    pair.sockets[0].line.clear()
    world.clock.pass_time(LAST_RESCUE_S + 10)
    world.connect(pair, 0)
    assert world.rescues == 5
    world.clock.pass_time(FIRST_RESCUE_S)
    world.turn(pair, 0)
    assert world.rescues == 6


@pytest.mark.parametrize("how", ["note_new_release", "end_back_off"])
def test_a_new_release_and_the_end_of_a_hold_end_the_pause(
    world: World, pair: MemoryListener, how: str
) -> None:
    replaced(world, pair)
    world.watch.watch()
    world.connect(pair, 0)
    world.clock.pass_time(1.0)
    world.turn(pair, 0)
    assert world.rescues == 2
    getattr(world.watch, how)()
    world.watch.look_again()
    assert world.rescues == 3


def test_it_is_looked_at_once_where_no_process_is_left_that_could_accept(
    world: World, pair: MemoryListener
) -> None:
    wait_behind_finishing_workers(world, pair)
    del world.turns.leaving[1]
    world.watch.look_again()
    assert world.rescues == 1
    pair.sockets[0].line.clear()
    world.clock.pass_time(LAST_RESCUE_S + 1)
    world.watch.look_again()
    assert world.rescues == 1, "no client waits"


def test_where_no_client_waits_any_more_the_next_client_wakes_us_again(
    world: World, pair: MemoryListener
) -> None:
    """No worker is left that could accept the next client, so its time must not run out first."""
    wait_behind_finishing_workers(world, pair)
    assert not world.reads(pair, 0)
    pair.sockets[0].line.clear()
    del world.turns.leaving[1]

    world.watch.look_again()

    assert world.reads(pair, 0)
    world.connect(pair, 0)
    assert world.rescues == 1


def test_a_generation_that_accepts_there_again_ends_the_wait(
    world: World, pair: MemoryListener
) -> None:
    wait_behind_finishing_workers(world, pair)
    world.turns.accepting[3] = 0
    world.watch.watch()
    world.clock.pass_time(10.0)
    assert not world.clock.posted


def test_probes_are_no_reason_for_a_generation(world: World, pair: MemoryListener) -> None:
    replaced(world, pair)
    world.probes.at.append(pair.sockets[0])
    world.watch.watch()
    world.connect(pair, 0)
    assert not world.clock.posted
    assert not world.clock.lines
    world.connect(pair, 0)
    assert world.rescues == 1


def test_a_queue_that_cannot_be_read_now_is_read_again(world: World, pair: MemoryListener) -> None:
    replaced(world, pair)
    world.probes.unknown = {(pair.index, 0)}
    world.watch.watch()
    world.connect(pair, 0)
    assert not world.clock.posted
    world.probes.unknown = set()
    world.clock.pass_time(FIRST_RESCUE_S)
    assert world.rescues == 1


def test_a_file_that_is_mounted_is_named_where_clients_come_by_it(world: World) -> None:
    path = world.listener(path="/run/s")
    world.serving(1)
    replaced(world, path)
    path.passed_by = {0}
    world.watch.watch()
    world.connect(path, 0)
    assert "mount the folder" in str(world.clock.fields[0]["hint"])


def test_after_the_end_nothing_is_watched(world: World, pair: MemoryListener) -> None:
    replaced(world, pair)
    world.watch.accept_watch.begin(served_before=False)
    world.turns.leaving[9] = 0, world.clock.now
    world.connect(pair, 0)
    world.watch.watch_later()
    world.watch.end()
    assert not world.clock.watched
    assert not world.clock.waits
    world.watch.watch()
    world.watch.look_again()
    assert not world.clock.watched
    assert not world.clock.waits
    assert not world.clock.posted


def test_a_listener_s_sockets_are_forgotten_before_they_are_replaced(
    world: World, pair: MemoryListener
) -> None:
    other = world.listener()
    world.watch.watch()
    world.watch.unwatch(pair)  # type: ignore[arg-type]
    assert set(world.clock.watched) == {each.fileno() for each in other.sockets}


# -- who waits ---------------------------------------------------------------------------


def test_clients_are_known_by_listener_as_far_as_the_kernel_lists_them(
    world: World, pair: MemoryListener
) -> None:
    empty, unknown = world.listener(), world.listener()
    pair.sockets[0].line += [b"a", b"b"]
    unknown.sockets[0].line.append(b"c")
    world.turns.expected[unknown.index] = 1  # its clients wait for the next generation
    assert world.watch.waiting_clients() == {
        pair.index: frozenset({b"a", b"b"}),
        empty.index: (),
    }
    world.kernel.other_namespace = True
    assert world.watch.waiting_clients() == {empty.index: ()}
    world.kernel.other_namespace = False
    world.kernel.diag_fails = errno.EMFILE
    assert world.watch.waiting_clients() == {empty.index: ()}


def test_clients_without_a_worker_are_none_that_a_generation_neglects(
    world: World, pair: MemoryListener
) -> None:
    replaced(world, pair)
    pair.sockets[0].line.append(b"a")
    assert world.watch.waiting_clients() == {}


def test_the_addresses_where_workers_do_not_accept_are_reported(
    world: World, pair: MemoryListener
) -> None:
    other = world.listener()
    world.watch.report_untaken(7.0, 3, True, frozenset({other.index, 99}))
    assert world.host.untaken == [(7.0, 3, True, other.settings.address)]


# -- a canary ----------------------------------------------------------------------------


def test_a_canary_has_a_watch_of_its_own(world: World, pair: MemoryListener) -> None:
    world.watch.follow_canary()
    assert world.watch.canary is None
    world.starting(2)
    world.turns.share = Share(2, 500, frozenset({pair.index}))
    world.watch.follow_canary()
    assert world.reads(pair, 1)
    assert not world.reads(pair, 0)
    world.connect(pair, 1)
    assert not world.reads(pair, 1)
    world.clock.pass_time(canary_watch.CANARY_NEVER_TAKEN_S + 1)
    [failed] = world.clock.posted
    assert isinstance(failed, Untaken)
    assert failed.generation == 2
    assert not world.host.untaken

    world.turns.share = None
    world.watch.follow_canary()
    assert world.watch.canary is not None
    assert not world.watch.canary.accept_watch.runs
    world.watch.end()
    assert not world.clock.waits


def test_a_client_that_is_open_is_known_by_the_tag_of_the_generation_s_socket(
    world: World, pair: MemoryListener
) -> None:
    world.starting(2)
    world.turns.share = Share(2, 500, frozenset({pair.index}))
    world.watch.follow_canary()
    assert world.watch.canary is not None
    backlogs = world.watch, world.watch.canary
    pair.sockets[0].tag, pair.sockets[1].tag = 1, 2
    assert [each.has_open(pair.index) for each in backlogs] == [False, False]
    world.open[2] = 1
    assert [each.has_open(pair.index) for each in backlogs] == [False, True]
    world.open = Counter({1: 1})
    assert [each.has_open(pair.index) for each in backlogs] == [True, False]
    assert [each.has_open(pair.index + 1) for each in backlogs] == [False, False]

    pair.sockets[0].tag = open_counts.NO_TAG
    world.open[open_counts.NO_TAG] = 1
    assert not world.watch.has_open(pair.index)
