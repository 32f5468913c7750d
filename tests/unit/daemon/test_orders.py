"""Orders of the lifecycle reach the delivery: one in memory, and no process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.actions import CloseListeners, Drain, Hold, Quiesce, Release, RouteTo
from socketprotector.core.events import BacklogEmptied, Event, Quiesced
from socketprotector.daemon.delivery.host import Host
from socketprotector.daemon.effects import Effects
from socketprotector.daemon.generation import OpenGeneration
from socketprotector.daemon.runtime import Runtime
from socketprotector.model.records import GenerationRecord, Program
from socketprotector.model.settings import Settings
from socketprotector.system import memory_group
from tests import memory_delivery
from tests.memory_delivery import MemoryDelivery

SETTINGS = Settings(name="x", command=("w",), directory="/", listeners=())
PROGRAM = Program("/w", ("w",), "/", (), 0, (), 0)


class World:
    def __init__(self) -> None:
        self.posted: list[Event] = []
        self.listener = memory_delivery.listener(0)
        nothing = SimpleNamespace(
            write=lambda *_, **__: None,
            cancel=lambda _: None,
            named={},
        )
        runtime = Runtime(cast("Any", nothing), cast("Any", nothing), self.posted.append, bool)
        self.effects = Effects(
            SETTINGS,
            self._build,
            runtime,
            output=cast("Any", nothing),
            systemd=cast("Any", nothing),
            start_report=cast("Any", nothing),
        )

    def _build(self, host: Host) -> MemoryDelivery:
        self.delivery = MemoryDelivery(host, [self.listener])
        return self.delivery

    def open(self, number: int) -> None:
        made = OpenGeneration(GenerationRecord(number, PROGRAM))
        self.effects.generations[number] = made
        self.delivery.open(made, 1, fresh=True)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(memory_group.Events, "open", lambda: None)
    made = World()
    made.open(7)
    made.effects.perform(RouteTo(7))
    return made


def test_a_reload_brings_the_new_one_what_the_old_one_has_not_taken(world: World) -> None:
    world.delivery.connect(world.listener, 1)
    world.open(8)
    for action in (RouteTo(8), Quiesce(7), Drain(7), Release(7)):
        world.effects.perform(action)
    world.delivery.connect(world.listener, 2)

    assert world.posted == [Quiesced(7)]
    assert world.delivery.queues == {8: [1, 2]}
    assert [*world.effects.generations] == [8]


def test_what_is_ordered_of_a_generation_that_is_gone_changes_nothing(world: World) -> None:
    for action in (Quiesce(6), Drain(6), Release(6)):
        world.effects.perform(action)

    assert world.posted == [Quiesced(6)]
    assert world.delivery.queues == {7: []}


def test_a_hold_and_a_stop_are_the_deliverys(world: World) -> None:
    world.effects.perform(Hold(True))
    world.delivery.connect(world.listener, 1)
    assert world.delivery.queues == {7: []}

    world.effects.perform(Hold(False))
    world.effects.perform(CloseListeners(quick=False))
    assert world.delivery.queues == {7: [1]}
    assert world.posted == [BacklogEmptied()]


def test_the_workers_of_a_generation_that_a_kill_lost_are_drained(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    drained: list[int] = []
    monkeypatch.setattr(world.effects.pool, "drain", drained.append)

    world.effects.perform(Drain(6))

    assert drained == [6]
