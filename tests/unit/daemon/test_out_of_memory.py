"""Which kill of the kernel explains the end of a worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon import out_of_memory as module
from socketprotector.daemon.out_of_memory import MemoryWatch
from socketprotector.model.exit_text import KILLED
from socketprotector.system.memory_group import OutOfMemory
from tests.unit.daemon.clock import Clock

BY_LIMIT = "was killed by SIGKILL: out of memory (the service's limit of 512M)"
BY_OTHER = "was killed by SIGKILL: out of memory (the service reached no limit of its own)"
FD, WORKER, CHILD = 7, 4711, 4712


class World:
    """A cgroup of two kills so far, and one worker."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.counted = OutOfMemory(kills=2, at_limit=7)
        self.limit: int | None = 512 << 20
        self.ending: set[int] = set()
        self.taken = 0
        self.closed = False
        events = SimpleNamespace(fd=FD, awaited=2, take=self._take, close=self._close)
        memory = SimpleNamespace(
            counts=lambda: self.counted,
            limit=lambda: self.limit,
            Events=SimpleNamespace(open=lambda: events),
        )
        patch.setattr(module, "memory_group", memory)
        patch.setattr(module, "procfs", SimpleNamespace(is_ending=self.ending.__contains__))
        runtime = cast("Any", SimpleNamespace(loop=self.clock, log=self))
        children = SimpleNamespace(children_of=lambda *_: [SimpleNamespace(pid=CHILD)])
        patch.setattr(module, "forked_children", children)
        worker = SimpleNamespace(process=SimpleNamespace(pid=WORKER), record=None, generation=None)
        self.watch = MemoryWatch(runtime, cast("Any", {1: worker}))

    def write(self, level: str, event: str, **fields: object) -> None:
        self.clock._write(level, event, **fields)

    def _take(self) -> None:
        self.taken += 1

    def _close(self) -> None:
        self.closed = True

    def report(self) -> None:
        """The kernel reports events, and the time to look comes."""
        self.clock.watched[FD]()
        assert FD not in self.clock.watched
        self.clock.pass_time(1.0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_the_limit_of_the_service_is_the_cause_only_if_it_left_no_memory(world: World) -> None:
    world.counted = OutOfMemory(kills=3, at_limit=8)
    assert world.watch.why_killed() == BY_LIMIT
    world.counted = OutOfMemory(kills=4, at_limit=8)
    assert world.watch.why_killed() == BY_OTHER
    world.limit, world.counted = None, OutOfMemory(kills=5, at_limit=9)
    assert world.watch.why_killed() == BY_OTHER


def test_each_kill_that_the_kernel_has_counted_explains_one_end(world: World) -> None:
    world.counted = OutOfMemory(kills=4, at_limit=9)

    assert [world.watch.why_killed() for _ in range(3)] == [BY_LIMIT, BY_LIMIT, KILLED]


def test_a_kill_after_which_no_worker_ends_is_logged_and_explains_nothing(world: World) -> None:
    world.counted = OutOfMemory(kills=3, at_limit=8)
    world.report()

    assert world.clock.lines == ["out-of-memory"]
    assert world.clock.fields[0]["killed"] == 1
    assert world.watch.why_killed() == KILLED
    assert world.taken == 1
    assert FD in world.clock.watched


@pytest.mark.parametrize("pid", [WORKER, CHILD])
def test_a_worker_that_ends_slowly_is_waited_for(world: World, pid: int) -> None:
    world.ending.add(pid)
    world.counted = OutOfMemory(kills=3, at_limit=8)
    world.report()
    world.clock.pass_time(1.0)

    assert world.clock.lines == []
    assert world.watch.why_killed() == BY_LIMIT
    world.clock.pass_time(1.0)
    assert world.clock.lines == []
    assert FD in world.clock.watched


def test_an_event_without_a_kill_is_not_logged(world: World) -> None:
    world.counted = OutOfMemory(kills=2, at_limit=9)
    world.report()
    assert world.clock.lines == []

    world.counted = OutOfMemory(kills=3, at_limit=10)
    assert world.watch.why_killed() == BY_LIMIT


def test_without_events_each_kill_explains_the_next_end(world: World) -> None:
    world.clock.cannot_watch = True
    world.report()
    assert world.closed

    world.counted = OutOfMemory(kills=3, at_limit=8)
    world.clock.pass_time(1.0)
    assert world.watch.why_killed() == BY_LIMIT
