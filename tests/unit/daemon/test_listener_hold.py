"""Whether a hold is possible where workers accept, and how long its clients may still come."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from socketprotector.daemon.delivery.shared import listener_hold as module
from socketprotector.daemon.delivery.shared.listener_hold import ListenerHold
from socketprotector.model.records import HoldRecord
from tests.unit.daemon.shared_world import SharedWorld


class World(SharedWorld):
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, module)
        self.hold = ListenerHold(self.listeners)

    def held_for(self, seconds: float) -> None:
        self.hold.turn(True)
        self.clock.pass_time(seconds)
        self.hold.turn(False)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_hold_begins_and_ends_once(world: World) -> None:
    world.listener()
    assert not world.hold.on
    world.hold.turn(False)
    assert world.hold.record == HoldRecord()
    world.hold.turn(True)
    began = world.hold.record
    world.clock.pass_time(1.0)
    world.hold.turn(True)
    assert world.hold.on
    assert world.hold.record == began
    world.hold.turn(False)
    assert not world.hold.on


@pytest.mark.parametrize(("held_s", "late_s"), [(0.5, 1.5), (3.0, 4.0), (60.0, 10.0)])
def test_tcp_clients_retry_after_a_hold_for_as_long_again_up_to_a_limit(
    world: World, held_s: float, late_s: float
) -> None:
    world.listener()
    world.held_for(held_s)
    assert world.hold.late_s == pytest.approx(late_s)
    world.clock.pass_time(late_s - 0.1)
    assert world.hold.late_s == pytest.approx(0.1)
    world.clock.pass_time(5.0)
    assert world.hold.late_s == 0.0


@pytest.mark.parametrize("how", [{"path": "/run/s"}, {"foreign": True}])
def test_no_client_retries_where_none_was_kept_out_over_tcp(
    world: World, how: dict[str, Any]
) -> None:
    made = world.listener(**how)
    made.can_be_held = bool(made.path)
    world.held_for(5.0)
    assert world.hold.late_s == 0.0


def test_a_shorter_hold_takes_no_time_from_an_earlier_one(world: World) -> None:
    world.listener()
    world.held_for(6.0)
    world.held_for(0.0)
    assert world.hold.late_s == pytest.approx(7.0)
    world.hold.turn(True)
    assert world.hold.late_s == pytest.approx(7.0), "they go on trying during the next hold"


def test_each_socket_for_a_hold_is_made_before_the_hold_begins(world: World) -> None:
    one, two = world.listener(), world.listener()
    two.can_be_held = False
    two.lost = True
    assert world.hold.prepare() is None
    assert one.reserved is not None
    assert two.reserved is None


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (
            {"foreign": True},
            "tcp:127.0.0.1:8000: another program opened this socket",
        ),
        ({"path": "/run/s", "count": 1}, "unix:/run/s has one socket for all generations"),
    ],
)
def test_a_listener_that_cannot_be_held_is_named_and_no_socket_is_made(
    world: World, how: dict[str, Any], why: str
) -> None:
    world.listener(**how).can_be_held = False
    after = world.listener()
    assert (world.hold.prepare() or "").startswith(why)
    assert after.reserved is None
    assert (world.hold.refusal(world.all) or "").startswith(why)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lost", "shared"])
def test_a_listener_from_which_no_worker_accepts_is_no_obstacle(world: World, name: str) -> None:
    made = world.listener()
    made.can_be_held = False
    setattr(made, name, name == "lost")
    assert world.hold.prepare() is None


@pytest.mark.parametrize(
    ("path", "code", "advice"),
    [
        ("", errno.EMFILE, ""),
        ("/run/s", errno.EEXIST, ""),
        ("", errno.EACCES, "; a hold is possible after a restart"),
        (
            "/run/s",
            errno.EACCES,
            "; a hold is possible once files can be made in the socket's directory",
        ),
    ],
)
def test_it_is_said_why_a_socket_cannot_be_made_and_when_it_can(
    world: World, path: str, code: int, advice: str
) -> None:
    made = world.listener(path=path)
    made.reserve_fails = code
    why = world.hold.prepare()
    assert why is not None
    assert why.startswith(made.settings.address + ": ")
    assert why.partition(";")[1:] == tuple(advice.partition(";")[1:])


def test_clients_that_wait_at_a_path_are_lost_with_it(world: World) -> None:
    one, two = world.listener(), world.listener(path="/run/s")
    two.is_reserved_for_clients = True
    listeners: Any = [one]
    assert world.hold.loss(listeners) is None
    listeners.append(two)
    assert world.hold.loss(listeners) == "the clients that wait at unix:/run/s would be reset"
