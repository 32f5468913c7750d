"""When accepting is retried after a shortage, and when the reserve is opened and spent."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon.delivery.queue import shortage as module
from socketprotector.daemon.delivery.queue.shortage import FIRST_WAIT_S, LAST_WAIT_S, Shortage

from .clock import Clock

ENFILE = OSError(errno.ENFILE, os.strerror(errno.ENFILE))


class World:
    """A shortage, a kernel that has descriptors or none, and the calls in their order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.calls: list[str] = []
        self.open_fds: set[int] = set()
        self.has_room = True
        self.retry_fails = False
        kernel = SimpleNamespace(
            devnull="", O_RDONLY=0, O_CLOEXEC=0, open=self._open, close=self.open_fds.remove
        )
        patch.setattr(module, "os", kernel)
        runtime = self.clock.use_in(patch, module)
        self.shortage = Shortage(runtime, stop=lambda: self.calls.append("stop"), retry=self._retry)

    def _open(self, *_: object) -> int:
        if not self.has_room:
            raise ENFILE
        self.open_fds.add(9)
        return 9

    def _retry(self) -> None:
        self.calls.append("retry")
        if self.retry_fails:
            self.shortage.begin("accept", ENFILE)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_each_wait_in_a_row_is_twice_the_one_before_and_only_the_first_is_logged(
    world: World,
) -> None:
    world.retry_fails = True
    began = world.clock.now
    world.shortage.begin("accept", ENFILE)
    world.clock.pass_time(15 * FIRST_WAIT_S)  # 1 + 2 + 4 + 8

    assert world.calls.count("retry") == 4
    assert world.clock.now == began + 15 * FIRST_WAIT_S
    world.clock.pass_time(20 * LAST_WAIT_S)
    calls = world.calls.count("retry")
    world.clock.pass_time(4 * LAST_WAIT_S)
    assert world.calls.count("retry") == calls + 4
    assert world.clock.lines == ["resources-exhausted"]


def test_a_pause_leaves_no_shortage_unsaid(world: World) -> None:
    world.retry_fails = True
    world.shortage.pause()  # the state cannot be written
    world.clock.pass_time(20 * LAST_WAIT_S)

    assert world.calls.count("retry") > 20
    assert world.clock.lines == ["resources-exhausted"]


def test_a_later_shortage_begins_with_the_first_wait_and_is_logged_again(world: World) -> None:
    world.shortage.begin("accept", ENFILE)
    world.clock.pass_time(FIRST_WAIT_S)
    world.clock.pass_time(3 * LAST_WAIT_S)

    world.shortage.begin("accept", ENFILE)
    world.clock.pass_time(FIRST_WAIT_S)

    assert world.calls == ["stop", "retry"] * 2
    assert world.clock.lines == ["resources-exhausted"] * 2
    assert not world.shortage.lasts


def test_the_reserve_is_restored_only_when_a_retry_succeeds(world: World) -> None:
    world.shortage.spend_reserve()
    assert world.open_fds == set()
    world.retry_fails = True
    world.shortage.begin("accept", ENFILE)
    world.clock.pass_time(FIRST_WAIT_S)
    assert world.shortage.reserve == -1

    world.retry_fails = False
    world.clock.pass_time(2 * FIRST_WAIT_S)

    assert world.open_fds == {world.shortage.reserve}


def test_without_a_reserve_no_connection_is_taken_out_of_a_channel(world: World) -> None:
    world.shortage.spend_reserve()
    world.has_room = False

    assert world.shortage.take_back(cast("Any", None)) is None

    assert world.calls == ["stop"]
    assert world.shortage.lasts


@pytest.mark.parametrize(("taken", "reserve"), [((b"", 5), -1), (None, 9)])
def test_the_reserve_is_open_after_a_take_only_if_there_was_no_connection(
    world: World, taken: tuple[bytes, int] | None, reserve: int
) -> None:
    open_at_take: list[int] = []

    def take_back() -> tuple[bytes, int] | None:
        open_at_take.extend(world.open_fds)
        return taken

    found = world.shortage.take_back(cast("Any", SimpleNamespace(take_back=take_back)))

    assert (found, open_at_take, world.shortage.reserve) == (taken, [], reserve)


def test_a_failed_take_waits_for_room(world: World) -> None:
    def fail() -> None:
        raise ENFILE

    assert world.shortage.take_back(cast("Any", SimpleNamespace(take_back=fail))) is None
    assert world.shortage.reserve == -1
    world.clock.pass_time(FIRST_WAIT_S)

    assert world.calls == ["stop", "retry"]
    assert world.shortage.reserve == 9


def test_a_closed_shortage_retries_no_more(world: World) -> None:
    world.shortage.begin("accept", ENFILE)
    world.shortage.close()
    world.clock.pass_time(LAST_WAIT_S)

    assert world.calls == ["stop"]
    assert world.open_fds == set()
