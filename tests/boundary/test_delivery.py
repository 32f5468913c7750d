"""What each delivery promises to all that know only the contract: the same stories in five worlds.

The worlds: deliveries.py.  Stories of one implementation alone are at the end.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from socketprotector.core.events import BacklogEmptied, HeldClientsWait, Stranded
from socketprotector.daemon import inherited_listeners
from socketprotector.daemon.delivery.probe_target import ProbeTarget
from socketprotector.daemon.delivery.shared import quiescing, shared_delivery
from socketprotector.daemon.delivery.shared.shared_delivery import SharedDelivery
from socketprotector.daemon.generation import OpenGeneration
from socketprotector.launch.bind_unix import give_away
from socketprotector.model.lazy_dataclass import replace
from socketprotector.model.settings import ListenerSettings
from socketprotector.system import inherited, reuseport, socket_file
from socketprotector.system.inherited import Inherited
from socketprotector.system.listener import Listener
from socketprotector.system.listeners import listener_of
from socketprotector.system.polling import events_of
from tests.boundary.deliveries import WORLDS, PathWorld, QueueWorld, SharedWorld, World, except_in
from tests.running import DEADLINE_S


@pytest.fixture(params=[False, True], ids=["lives", "killed"])
def kills(request: pytest.FixtureRequest) -> bool:
    """Whether the protector is killed after each order, and the next program goes on."""
    return bool(request.param)


@pytest.fixture(params=[*WORLDS])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = WORLDS[request.param]()
    yield made
    made.close()


def test_clients_come_to_the_generation_with_the_route_alone(world: World) -> None:
    world.serving(1)
    world.open(2)
    client = world.connect()

    world.until(lambda: client in world.taken[1], 1, 2)

    assert world.taken == {1: [client], 2: []}


def test_clients_wait_for_a_route(world: World) -> None:
    world.open(1)
    client = world.connect()

    world.route_to(1)
    world.until(lambda: client in world.taken[1], 1)


def test_each_client_around_a_switch_is_taken_once(world: World, kills: bool) -> None:
    world.kills = kills
    world.serving(1)
    clients = [world.connect() for _ in range(3)]
    world.replace(1, 2)
    clients += [world.connect() for _ in range(3)]

    world.until(lambda: all(world.count(each, 1, 2) for each in clients), 2)

    assert [world.count(each, 1, 2) for each in clients] == [1] * 6
    assert {*clients[3:]} <= {*world.taken[2]}


def test_generations_follow_each_other_without_end(world: World) -> None:
    world.serving(1)
    for number in range(2, 6):
        world.replace(number - 1, number)
        client = world.connect()
        world.until(lambda n=number, c=client: c in world.taken[n], number)  # type: ignore[misc]
        assert not world.delivery.keeps(number - 1)


def test_a_release_that_fails_leaves_the_route_where_it_is(world: World) -> None:
    world.serving(1)
    world.open(2)
    world.end(2)
    client = world.connect()

    world.until(lambda: client in world.taken[1], 1)


def test_the_route_goes_back_to_one_that_has_had_it(world: World, kills: bool) -> None:
    world.kills = kills
    world.serving(1)
    world.serving(2)
    world.route_to(1)
    client = world.connect()

    world.until(lambda: client in world.taken[1], 1, 2)

    assert world.taken[2] == []


def test_a_generation_that_is_aborted_while_it_starts_takes_no_client_along(
    world: World, kills: bool
) -> None:
    world.kills = kills
    world.serving(1)
    world.open(2)
    client = world.connect()
    world.drain(2)
    world.release(2)
    world.serving(3)

    world.until(lambda: bool(world.count(client, 1, 3)), 1, 3)
    assert not world.delivery.keeps(2)


def test_a_client_of_a_released_generation_waits_for_the_next(world: World, kills: bool) -> None:
    world.kills = kills
    generation = world.serving(1)
    client = world.connect()
    world.until(lambda: world.delivery.waiting(generation) == 1)
    world.route_to(None)
    world.drain(1)
    world.release(1)
    [listener] = world.delivery.listeners
    at_listener, _ = world.delivery.backlog(listener) or (0, 0)
    assert [world.delivery.keeps(1), bool(at_listener)].count(True) == 1

    world.serving(2)
    world.until(lambda: client in world.taken[2], 2)
    assert not world.delivery.keeps(1)


def test_it_is_known_how_many_clients_a_generation_has_not_taken(world: World) -> None:
    generation = world.serving(1)
    clients = [world.connect() for _ in range(2)]
    world.until(lambda: world.delivery.waiting(generation) == len(clients))

    world.take(1)
    assert world.delivery.waiting(generation) == 1


def test_an_order_that_is_carried_out_twice_is_carried_out(world: World) -> None:
    world.serving(1)
    world.open(2)
    for _ in range(2):
        world.route_to(2)
        world.delivery.drain(world.generations[1])
        world.delivery.hold(False)
    client = world.connect()

    world.until(lambda: client in world.taken[2], 2)


def test_no_worker_gets_the_clients_of_a_hold_before_it_ends(world: World, kills: bool) -> None:
    world.kills = kills
    world.serving(1)
    assert world.delivery.cannot_hold() is None
    world.hold(True)
    client = world.connect()
    world.turn()
    assert not world.take(1)

    end_hold(world, 1)
    world.until(lambda: bool(world.count(client, 1, 2)), *world.generations)

    assert world.count(client, 1, 2) == 1


def test_a_reload_during_a_hold_does_not_end_it(world: World, kills: bool) -> None:
    world.kills = kills
    world.serving(1)
    world.hold(True)
    client = world.connect()
    world.replace(1, 2)
    world.turn()
    assert not world.take(2)

    end_hold(world, 2)
    world.until(lambda: bool(world.count(client, 2, 3)), *world.generations)

    assert world.count(client, 1, 2, 3) == 1


def end_hold(world: World, serving: int) -> None:
    """End a hold, with a generation for the clients that waited if they need one."""
    world.hold(False)
    if world.renews:
        world.until(lambda: Stranded() in world.posted, serving)
        world.replace(serving, serving + 1)


def test_it_is_known_whether_a_client_of_a_hold_gets_an_answer(world: World, kills: bool) -> None:
    world.kills = kills
    world.serving(1)
    found = [world.delivery.is_silent]
    for on in (True, False):
        world.hold(on)
        found.append(world.delivery.is_silent)

    assert found == [False, world.is_silent_on_hold, False]


def test_a_probe_reaches_a_generation_that_gets_no_clients(world: World) -> None:
    world.serving(1)
    tried = world.open(2)
    assert world.delivery.can_probe("")
    assert world.delivery.reach(tried, "no such listener") is None
    target = world.delivery.reach(tried, "")
    assert target is not None
    probe = world.probe(target)
    assert world.waits(target, probe)

    world.until(lambda: probe in world.taken[2], 1, 2)

    assert not world.waits(target, probe)
    assert target.is_unchanged()
    assert world.taken[1] == []
    target.close()


def test_a_probe_reaches_the_serving_generation_as_clients_do(world: World) -> None:
    target = world.delivery.reach(world.serving(1), "", as_client=True)
    assert target is not None
    probe = world.probe(target)

    world.until(lambda: probe in world.taken[1], 1)
    target.close()


def probed(world: World) -> tuple[OpenGeneration, ProbeTarget]:
    """Open generation 2 and let a probe wait there."""
    tried = world.open(2)
    target = world.delivery.reach(tried, "")
    assert target is not None
    world.probe(target)
    world.until(lambda: world.delivery.waiting(tried) == 1)
    return tried, target


def test_no_client_is_among_the_probes_that_wait(world: World) -> None:
    world.serving(1)
    tried, target = probed(world)
    assert world.delivery.waiting(tried, clients_only=True) == 0

    world.take(2)
    target.close()
    world.route_to(2)
    world.connect()
    world.until(lambda: world.delivery.waiting(tried, clients_only=True) == 1)


def test_clients_of_an_added_listener_come_to_the_first_that_knows_it(
    world: World, kills: bool
) -> None:
    world.kills = kills
    world.serving(1)
    world.add(world.listener(1))
    client = world.connect(1)
    world.turn()
    assert not world.take(1)

    world.serving(2)
    world.until(lambda: client in world.taken[2], 1, 2)


def test_a_dry_run_gets_no_client_of_the_listener_that_it_alone_knows(
    world: World, kills: bool
) -> None:
    world.kills = kills
    world.serving(1)
    assert world.delivery.cannot_dry_run() is None
    world.add(world.listener(1), dry_run=True)
    world.open(2)
    world.connect(1)
    client = world.connect()
    world.until(lambda: client in world.taken[1], 1, 2)

    world.end(2)
    assert world.taken[2] == []


def test_clients_of_a_removed_listener_are_served_that_had_connected(
    world: World, kills: bool
) -> None:
    world.kills = kills
    world.add(world.listener(1))
    world.serving(1)
    client = world.connect(1)
    world.until(lambda: bool(world.delivery.waiting(world.generations[1])))

    world.remove(1)
    assert [each.index for each in world.delivery.listeners] == [0]
    world.until(lambda: client in world.taken[1], 1)


@except_in(
    queue="workers take from the queue until its end",
    queue_unix="workers take from the queue until its end",
    memory="workers take from the queue until its end",
)
def test_a_generation_finishes_after_it_has_accepted_the_clients_of_a_removed_listener(
    world: World, kills: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order to finish would reset them: no other generation knows that listener."""
    monkeypatch.setattr(quiescing, "_LOOK_SOON_S", 0.0)
    monkeypatch.setattr(quiescing, "QUERY_SHARE", float("inf"))  # a look at each turn of the loop
    quiet: list[int] = []
    world.add(world.listener(1))
    old = world.serving(1)
    clients = [world.connect(1) for _ in range(2)]
    world.until(lambda: world.delivery.waiting(old) == 2)
    world.open(2, without=1)
    world.route_to(2)
    world.kills = kills
    world.remove(1)
    world.delivery.begin_drain(old, lambda: quiet.append(1), reads_on=True)
    for _ in range(10):
        world.turn()
    assert quiet == []

    world.until(lambda: bool(quiet), 1, 2)
    assert sorted(world.taken[1]) == clients
    world.end(1)
    assert "clients-lost" not in world.events
    assert not {inherited.LISTENER + "1", inherited.SIBLING + "1"} & {*world.delivery.descriptors()}


@except_in(
    queue="the clients are accepted at once",
    queue_unix="the clients are accepted at once",
    memory="its clients cannot be lost",
)
def test_clients_of_a_removed_listener_that_a_quick_end_resets_are_counted(world: World) -> None:
    world.add(world.listener(1))
    old = world.serving(1)
    clients = [world.connect(1) for _ in range(2)]
    world.until(lambda: world.delivery.waiting(old) == len(clients))
    world.open(2, without=1)
    world.route_to(2)
    world.remove(1)
    assert "clients-lost" not in world.events

    world.drain(1)

    assert world.lines["clients-lost"]["lost"] == len(clients)


def test_a_graceful_end_serves_those_who_have_connected(world: World) -> None:
    generation = world.serving(1)
    client = world.connect()

    world.delivery.close_listeners(generation, quick=False)
    world.until(lambda: BacklogEmptied() in world.posted and client in world.taken[1], 1)

    assert world.delivery.listeners == ()
    assert world.posted.count(BacklogEmptied()) == 1


def test_clients_that_come_after_a_stop_wait_for_the_next_start(world: World) -> None:
    generation = world.serving(1)
    client = world.connect()

    world.delivery.close_listeners(generation, quick=False, stay=True)
    world.until(lambda: BacklogEmptied() in world.posted and client in world.taken[1], 1)
    [listener] = world.delivery.listeners
    later = world.connect()
    world.until(lambda: (world.delivery.backlog(listener) or (0, 0))[0] == 1, 1)

    assert world.count(later, 1) == 0


def test_it_says_how_many_wait_at_a_listener_and_how_many_can(world: World) -> None:
    [listener] = world.delivery.listeners
    world.connect()
    world.until(lambda: (world.delivery.backlog(listener) or (0, 0))[0] == 1)
    found = world.delivery.backlog(listener)

    assert found is not None
    assert found[1] > 1


def test_a_quick_end_waits_for_nobody(world: World) -> None:
    generation = world.serving(1)
    world.connect()

    world.delivery.close_listeners(generation, quick=True)

    assert world.delivery.listeners == ()
    assert world.posted == []


def test_the_next_program_serves_those_who_wait(world: World) -> None:
    world.serving(1)
    waiting = world.connect()
    world.until(lambda: bool(world.delivery.waiting(world.generations[1])))

    world.go_on()
    world.route_to(1)
    later = world.connect()
    world.until(lambda: {waiting, later} <= {*world.taken[1]}, 1)

    assert world.count(waiting, 1) == 1
    world.replace(1, 2)
    client = world.connect()
    world.until(lambda: client in world.taken[2], 2)


def test_the_next_program_goes_on_with_a_switch(world: World) -> None:
    """It was killed when the new one had the route, and the old one had yet to finish."""
    world.serving(1)
    world.serving(2)
    world.go_on()
    world.route_to(2)
    quiet: list[int] = []
    world.delivery.begin_drain(world.generations[1], lambda: quiet.append(1), reads_on=True)
    world.until(lambda: quiet == [1], 1, 2)
    world.end(1)
    client = world.connect()

    world.until(lambda: client in world.taken[2], 2)


@except_in(
    queue_unix="the kernel refuses all clients of a UNIX socket that was shut down",
    shared_path="the kernel refuses all clients of a UNIX socket that was shut down",
    memory="its listeners have no sockets",
)
def test_a_socket_that_a_worker_has_shut_down_gets_clients_again(world: World) -> None:
    world.serving(1)
    world.delivery.listeners[0].socket.shutdown(socket.SHUT_RDWR)
    world.until(lambda: "listens-again" in world.events)
    client = world.connect()

    world.until(lambda: client in world.taken[1], 1)
    assert world.lost == []


@pytest.mark.parametrize(
    ("name", "earlier"),
    [
        (inherited.SIBLING + "0.1", inherited.RESERVED + "0"),
        (inherited.SIBLING + "0.1", inherited.LISTENER + "0"),
    ],
)
def test_a_socket_that_a_killed_program_left_under_two_names_is_one(
    request: pytest.FixtureRequest, name: str, earlier: str
) -> None:
    """Two generations would accept from it."""
    world = SharedWorld()
    request.addfinalizer(world.close)
    [before] = world.delivery.listeners
    before.reserve()
    found = {each: os.dup(fd) for each, fd in before.descriptors().items()}
    found[name] = os.dup(found[earlier])

    left = Inherited(found)
    [listener] = inherited_listeners.adopt(left, [before.settings], SharedDelivery)

    left.close()
    fds = listener.descriptors().values()
    assert len({os.fstat(each).st_ino for each in fds}) == len(fds) == 2
    for each in (*listener.sockets, listener._reserved):
        if each is not None:
            each.close()


def test_none_is_tried_while_clients_come_to_the_socket_that_it_would_have(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    world = SharedWorld()
    request.addfinalizer(world.close)
    world.serving(1)
    world.open(2)
    with monkeypatch.context() as patched:
        patched.setattr(reuseport, "steer", fail)
        world.route_to(2)
        world.end(1)
        client = world.connect()
        assert world.delivery.cannot_dry_run()
        world.open(3)
        world.until(lambda: client in world.taken[3], 2, 3)  # else it would be tried with clients

    world.until(lambda: world.delivery.cannot_dry_run() is None)


def test_connections_are_counted_for_no_generation_once_several_share_a_socket(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    world = SharedWorld()
    request.addfinalizer(world.close)
    first, second = world.serving(1), world.serving(2)
    assert [world.delivery.active(each) for each in (first, second)] == [0, 0]
    [listener] = world.delivery.listeners
    monkeypatch.setattr(listener, "bind_anew", fail)
    assert isinstance(world.delivery, SharedDelivery)
    world.delivery.steering._repairs.replace(listener, second.record.socket_number)

    assert [world.delivery.active(each) for each in (first, second)] == [None, None]


def test_a_generation_is_asked_at_a_path_that_had_one_socket_left(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It gets one of its own, so none is refused because it could not be asked."""
    world = SharedWorld()
    request.addfinalizer(world.close)
    path = str(tmp_path / "s")
    one = socket_file.bind(path, 16, socket_file.Rights(-1, -1, 0o600), give_away)
    socket_file.lead_to(path, one, [one])
    found = os.lstat(path)
    settings = ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino, 16)
    left = listener_of(one.detach(), 0, settings, shared=True)
    for each in world.delivery.listeners:
        world.delivery.remove(each)
    world.delivery.add(left, dry_run=False)

    assert world.delivery.can_probe("")
    tried = world.open(1)

    way = world.delivery.reach(tried, "")
    assert way is not None
    way.close()


@pytest.mark.parametrize("first", ["a probe", "a client", "a probe before a client"])
def test_a_probe_that_waits_alone_in_the_queue_of_a_stop_is_no_client(
    request: pytest.FixtureRequest, first: str
) -> None:
    """A stop would start a worker for it."""
    world = QueueWorld()
    request.addfinalizer(world.close)
    serving = world.serving(1)
    target = world.delivery.reach(serving, "")
    assert target is not None
    if first != "a client":
        world.probe(target)
        world.until(lambda: world.delivery.waiting(serving) == 1)
    target.close()
    if first != "a probe":
        world.connect()
        world.until(lambda: world.delivery.waiting(serving) == 1 + ("before" in first))
    world.route_to(None)
    world.drain(1)

    assert bool(world.delivery.waiting(serving, clients_only=True)) == (first != "a probe")


@pytest.fixture
def at_path() -> Iterator[PathWorld]:
    made = PathWorld()
    yield made
    made.close()


def test_a_graceful_end_awaits_no_client_of_a_release_that_was_called_off(
    at_path: PathWorld,
) -> None:
    """No worker accepts from its socket any more."""
    serving = at_path.serving(1)
    tried = at_path.open(2)
    own_file, _ = at_path.delivery.listeners[0].ensure_address(tried.record.socket_number)
    at_path.connect_to(socket.socket(socket.AF_UNIX), own_file)
    at_path.delivery.drain(tried)
    del at_path.generations[2]
    at_path.delivery.release(tried)
    client = at_path.connect()

    at_path.delivery.close_listeners(serving, quick=False)
    at_path.until(lambda: BacklogEmptied() in at_path.posted, 1)

    assert at_path.taken[1] == [client]
    assert at_path.clients[client].recv(1) == b""


def test_the_next_program_does_not_steer_to_listeners_that_a_stop_has_closed(
    at_path: PathWorld,
) -> None:
    serving = at_path.serving(1)
    client = at_path.connect()
    at_path.delivery.close_listeners(serving, quick=False)

    at_path.go_on(closing=True)
    at_path.delivery.close_listeners(serving, quick=False)
    at_path.until(lambda: BacklogEmptied() in at_path.posted, 1)

    assert at_path.taken[1] == [client]
    assert "not-steered" not in at_path.events


@pytest.mark.parametrize("amid", ["", "a reload", "the next program"])
def test_the_end_of_a_hold_says_that_its_clients_need_another_generation(
    at_path: PathWorld, amid: str
) -> None:
    """A graceful stop waits for that generation, so it must know before the loop turns."""
    at_path.serving(1)
    if amid == "a reload":
        at_path.open(2)
    at_path.delivery.hold(True)
    client = at_path.connect()
    at_path.delivery.hold(False)
    assert HeldClientsWait() in at_path.posted
    if amid == "the next program":
        at_path.posted.clear()
        at_path.go_on()
        at_path.route_to(1)
        assert HeldClientsWait() in at_path.posted
    if amid == "a reload":
        at_path.end(2)

    serving = at_path.serving(3)
    at_path.delivery.close_listeners(serving, quick=False)
    at_path.until(lambda: BacklogEmptied() in at_path.posted, 3)

    assert at_path.clients[client].recv(1) == b""
    assert "clients-lost" not in at_path.events


def test_the_end_of_a_hold_without_clients_asks_for_none(at_path: PathWorld) -> None:
    at_path.serving(1)
    at_path.connect()
    at_path.delivery.hold(True)
    at_path.delivery.hold(False)

    assert at_path.posted == []


@pytest.mark.parametrize("quick", [False, True], ids=["graceful", "quick"])
def test_a_client_that_an_end_resets_is_counted(at_path: PathWorld, quick: bool) -> None:
    serving = at_path.serving(1)
    at_path.delivery.hold(True)
    client = at_path.connect()
    at_path.delivery.hold(False)

    at_path.delivery.close_listeners(serving, quick=quick)
    at_path.until(lambda: not at_path.delivery.listeners, 1)

    with pytest.raises(ConnectionResetError):
        at_path.clients[client].recv(1)
    assert at_path.events.count("clients-lost") == 1


@pytest.mark.parametrize("name", [each for each in WORLDS if "shared" in each or "path" in each])
@pytest.mark.parametrize("clients", [0, 2])
def test_a_probe_that_an_end_resets_is_no_lost_client(
    request: pytest.FixtureRequest, name: str, clients: int
) -> None:
    """A probe of a release that never accepts, whose stop is quick; then clients of the service."""
    world = WORLDS[name]()
    request.addfinalizer(world.close)
    serving = world.serving(1)
    _, target = probed(world)
    for _ in range(clients):
        world.connect()
    world.until(lambda: world.delivery.waiting(serving) == clients)

    world.delivery.close_listeners(serving, quick=True)
    world.until(lambda: not world.delivery.listeners)

    target.close()
    assert world.lines.get("clients-lost", {"lost": 0})["lost"] == clients


@pytest.mark.parametrize("name", [n for n in WORLDS if "shared" in n and "path" not in n])
def test_a_probe_beside_a_lost_client_at_one_socket_is_not_counted(
    request: pytest.FixtureRequest, name: str
) -> None:
    world = WORLDS[name]()
    request.addfinalizer(world.close)
    world.serving(1)
    tried, target = probed(world)
    world.delivery.route_to(tried)
    world.connect()
    world.until(lambda: world.delivery.waiting(tried) == 2)

    world.delivery.close_listeners(tried, quick=True)
    world.until(lambda: not world.delivery.listeners)

    target.close()
    assert world.lines["clients-lost"]["lost"] == 1


def test_clients_of_a_hold_at_a_listener_that_is_removed_are_counted(at_path: PathWorld) -> None:
    """A reload that began before the hold removes it; clients at its workers are served."""
    at_path.serving(1)
    served = at_path.connect()
    at_path.delivery.hold(True)
    lost = at_path.connect()
    [listener] = at_path.delivery.listeners
    cannot = at_path.delivery.cannot_change([], [listener])
    assert cannot is not None
    assert "would be reset" in cannot

    at_path.delivery.remove(listener)

    at_path.take(1)
    assert at_path.taken[1] == [served]
    with pytest.raises(ConnectionResetError):
        at_path.clients[lost].recv(1)
    assert at_path.lines["clients-lost"]["lost"] == 1


def test_a_graceful_end_awaits_no_probe_that_has_come_beside_a_client_of_a_hold(
    at_path: PathWorld,
) -> None:
    serving = at_path.serving(1)
    at_path.delivery.hold(True)
    at_path.connect()
    at_path.clients[at_path.connect()].close()  # a probe that was abandoned
    at_path.delivery.hold(False)

    at_path.delivery.close_listeners(serving, quick=False)
    at_path.until(lambda: BacklogEmptied() in at_path.posted, 1)


def pass_in(listener: Listener) -> None:
    """Make a listener's first socket one that another process owns."""
    listener.settings = replace(listener.settings, foreign=True)


def close(world: World) -> tuple[str, ...]:
    """Close the delivery at the end of a stop, when all workers have exited."""
    let_exit(world)
    return world.delivery.close()


def let_exit(world: World) -> None:
    """Close the sockets of all workers, which exit."""
    for handed in world.handed.values():
        for one in handed:
            one.close()


def close_at_the_end(world: World, *, killed: bool) -> tuple[str, ...]:
    """Do the same; killed: this program is killed before that, and the next one does it."""
    if not killed:
        return close(world)
    let_exit(world)
    listeners, record = world.delivery.listeners, world.delivery.record()
    assert isinstance(world.delivery, SharedDelivery)
    world.delivery._listeners.clear()
    return SharedDelivery.leave(listeners, record)


@pytest.mark.parametrize("name", ["shared", "shared_path"])
@pytest.mark.parametrize("clients", [0, 2])
def test_clients_at_the_socket_that_does_not_survive_a_stop_are_counted(
    request: pytest.FixtureRequest, name: str, clients: int
) -> None:
    world = WORLDS[name]()
    request.addfinalizer(world.close)
    old = world.serving(1)
    lost = [world.connect() for _ in range(clients)]
    world.until(lambda: world.delivery.waiting(old) == clients)
    serving = world.serving(2)
    saved = world.connect()
    world.until(lambda: world.delivery.waiting(serving) == 1)
    [listener] = world.delivery.listeners
    kept = listener.socket_for(serving.record.socket_number).dup()

    world.delivery.close_listeners(serving, quick=True, stay=True)
    assert "clients-lost" not in world.events, "workers may still accept"
    assert len(close(world)) == 1

    for each in lost:
        with pytest.raises(ConnectionResetError):
            world.clients[each].recv(1)
    with kept, kept.accept()[0] as connection:
        assert world.names[connection.getpeername()] == saved
    assert world.lines.get("clients-lost", {"lost": 0})["lost"] == clients


@pytest.mark.parametrize("killed", [False, True])
def test_a_stop_leaves_the_socket_at_which_clients_wait_for_the_next_generation(
    at_path: PathWorld, killed: bool
) -> None:
    """The serving generation has lost its own; no other has started yet."""
    serving = at_path.serving(1)
    at_path.handed[1][0].shutdown(socket.SHUT_RDWR)
    at_path.until(lambda: Stranded() in at_path.posted)
    client = at_path.connect()
    [listener] = at_path.delivery.listeners
    copies = [each.dup() for each in listener.sockets]

    at_path.delivery.close_listeners(serving, quick=True, stay=True)
    assert len(close_at_the_end(at_path, killed=killed)) == 1

    [kept] = [each for each in copies if events_of(each, select.POLLIN | select.POLLRDHUP) == 1]
    with kept.accept()[0] as connection:
        assert at_path.names[connection.getpeername()] == client
    for each in copies:
        each.close()
    assert "clients-lost" not in at_path.events


@pytest.mark.parametrize("killed", [False, True])
def test_a_stop_leaves_the_socket_at_which_clients_wait_for_a_release_with_that_listener(
    request: pytest.FixtureRequest, killed: bool
) -> None:
    """A release with another listener was starting."""
    world = SharedWorld()
    request.addfinalizer(world.close)
    serving = world.serving(1)
    world.add(world.listener(1))
    world.connect(1)
    copies = [each.dup() for each in world.delivery.listeners[1].sockets]

    world.delivery.close_listeners(serving, quick=True, stay=True)
    assert len(close_at_the_end(world, killed=killed)) == 2

    assert [events_of(each, select.POLLIN | select.POLLRDHUP) == 1 for each in copies] == [
        False,
        True,
    ]
    for each in copies:
        each.close()


@pytest.mark.parametrize("number", [1, 2])
def test_clients_at_our_socket_beside_one_that_was_passed_in_are_counted(
    request: pytest.FixtureRequest, number: int
) -> None:
    """Generation 1 has the passed-in socket, whose owner accepts from it."""
    world = SharedWorld()
    request.addfinalizer(world.close)
    [listener] = world.delivery.listeners
    pass_in(listener)
    world.serving(1)
    serving = world.serving(2) if number == 2 else world.generations[1]
    client = world.connect()
    world.until(lambda: world.delivery.waiting(serving) == 1)
    owners = listener.socket.dup()

    world.delivery.close_listeners(serving, quick=True)
    close(world)

    assert world.lines.get("clients-lost", {"lost": 0})["lost"] == number - 1
    if number == 1:
        owners.accept()[0].close()
    else:
        with pytest.raises(ConnectionResetError):
            world.clients[client].recv(1)
    owners.close()


def test_an_abandoned_probe_is_subtracted_once_at_a_path_that_is_lost(at_path: PathWorld) -> None:
    serving = at_path.serving(1)
    target = at_path.delivery.reach(serving, "", as_client=True)
    assert target is not None
    probe = at_path.clients[at_path.probe(target)]
    for _ in range(2):
        at_path.connect()
    target.abandon(probe)
    probe.close()
    at_path.delivery.listeners[0].lost = True

    at_path.delivery.close_listeners(serving, quick=True)

    assert at_path.lines["clients-lost"]["lost"] == 2


def test_a_stop_refuses_clients_of_ours_while_it_serves_those_of_a_passed_in_pair(
    request: pytest.FixtureRequest,
) -> None:
    world = SharedWorld()
    request.addfinalizer(world.close)
    world.add(world.listener(1))
    serving = world.serving(1)
    passed, ours = world.delivery.listeners
    pass_in(passed)
    early = world.connect(1)
    world.until(lambda: world.delivery.waiting(serving) == 1)

    world.delivery.close_listeners(serving, quick=False)
    with socket.socket() as late:
        late.settimeout(DEADLINE_S)
        with pytest.raises(ConnectionRefusedError):
            late.connect(ours.local_address)
    world.until(lambda: BacklogEmptied() in world.posted, 1)

    assert world.taken[1] == [early]
    assert "clients-lost" not in world.events


def test_clients_at_our_second_socket_of_a_passed_in_listener_that_is_removed_are_served(
    request: pytest.FixtureRequest,
) -> None:
    """Later clients go to the socket of its owner."""
    world = SharedWorld()
    request.addfinalizer(world.close)
    world.add(world.listener(1))
    world.serving(1)
    passed = world.delivery.listeners[1]
    pass_in(passed)
    world.replace(1, 2)
    early, quiet = world.connect(1), list[int]()
    world.until(lambda: world.delivery.waiting(world.generations[2]) == 1)
    owner, address = passed.socket.dup(), passed.local_address
    request.addfinalizer(owner.close)
    world.open(3, without=1)
    world.route_to(3)

    world.remove(1)
    late = world.connect_to(socket.socket(), address)
    world.delivery.begin_drain(world.generations[2], lambda: quiet.append(2), reads_on=True)
    world.until(lambda: bool(quiet), 2)

    assert world.taken[2] == [early]
    with owner.accept()[0] as accepted:
        assert world.names[accepted.getpeername()] == late


def test_a_stop_that_cannot_refuse_clients_at_one_listener_serves_those_of_another(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = SharedWorld()
    request.addfinalizer(world.close)
    world.add(world.listener(1))
    serving = world.serving(1)
    client, endless = world.connect(1), world.delivery.listeners[0]
    monkeypatch.setattr(endless, "refuse_new", lambda: False)  # as at an abstract name
    monkeypatch.setattr(shared_delivery, "LAST_S", -1.0)

    world.delivery.close_listeners(serving, quick=False)
    assert BacklogEmptied() not in world.posted
    world.until(lambda: BacklogEmptied() in world.posted, 1)

    assert world.taken[1] == [client]
    assert "clients-lost" not in world.events
