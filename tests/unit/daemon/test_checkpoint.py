"""What is saved before each action, in which order, and what happens if that fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.fleet import Fleet
from socketprotector.core.snapshot import CODEC, Snapshot
from socketprotector.daemon import checkpoint as module
from socketprotector.daemon.checkpoint import Checkpoint
from socketprotector.model.records import SettingsRecord
from socketprotector.model.settings import Settings
from socketprotector.system import inherited
from socketprotector.system.state_file import StateError, StateFile

SETTINGS = SettingsRecord(Settings("name", ("sh",), "/"))


class File:
    """A state file that notes what is written to it."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.takes_changes = True
        self.fails = False
        self.payload = b""

    def _write(self, kind: str, payload: bytes) -> None:
        self.calls.append(kind)
        if self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.payload = payload

    def write(self, payload: bytes) -> None:
        self._write("whole", payload)

    def write_change(self, payload: bytes) -> None:
        self._write("change", payload)


class World:
    """A checkpoint, with a store and a file in memory."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stored: list[tuple[dict[str, int], dict[str, int]]] = []
        self.lines: list[str] = []
        self.file = File(self.calls)
        self.store = SimpleNamespace(
            keeps=True, left_out=(), flushed=True, complete=True, kept={}, sync=self._sync, has=None
        )
        self.snapshot = Snapshot(Fleet(), SETTINGS)
        self.workers = {"worker.1.process": 9}
        self.effects = SimpleNamespace(
            pool=SimpleNamespace(descriptors=self.workers),
            own_descriptors=lambda: {"listener.0": 5},
            descriptors=lambda: {"listener.0": 5, **self.workers},
        )
        self.checkpoint = Checkpoint(
            cast("Any", self.file),
            cast("Any", self.store),
            cast("Any", SimpleNamespace(write=lambda _, event, **__: self.lines.append(event))),
            lambda: {inherited.GUARD: 3, inherited.STATE: 4},
        )

    def _sync(
        self,
        few: dict[str, int],
        many: dict[str, int],
        write_state: Callable[[], bool] = lambda: True,
    ) -> bool:
        self.calls.append("store")
        self.stored.append((few, {**many}))
        return write_state()

    def begin(self) -> None:
        self.checkpoint.begin(cast("Any", self.effects), lambda: self.snapshot)

    def change(self) -> None:
        self.snapshot = Snapshot(Fleet(next_worker=self.snapshot.fleet.next_worker + 1), SETTINGS)


@pytest.fixture
def world() -> World:
    made = World()
    made.begin()
    return made


def test_before_the_parts_exist_nothing_is_saved() -> None:
    world = World()

    assert world.checkpoint.save()
    assert world.calls == []


def test_descriptors_are_stored_before_the_state_mentions_them(world: World) -> None:
    assert world.checkpoint.save()

    assert world.calls == ["store", "whole"]
    assert world.stored == [({inherited.STATE: 4, "listener.0": 5}, {"worker.1.process": 9})]
    assert CODEC.decode(world.file.payload) == world.snapshot


def test_after_the_first_time_only_changes_are_written(world: World) -> None:
    for _ in range(2):
        assert world.checkpoint.save()
    world.change()
    assert world.checkpoint.save()
    world.file.takes_changes = False
    world.change()
    assert world.checkpoint.save()

    assert [each for each in world.calls if each != "store"] == ["whole", "change", "whole"]


def test_without_a_store_no_state_is_written(world: World) -> None:
    """A kill would close all descriptors, so no program could resume."""
    world.store.keeps = False

    assert world.checkpoint.save()
    assert world.calls == ["store"]
    assert world.stored == [({}, {"worker.1.process": 9})]


def test_a_failed_write_is_logged_once_and_the_next_one_is_whole(world: World) -> None:
    world.checkpoint.save()
    world.file.fails = True
    for _ in range(2):
        world.change()
        assert not world.checkpoint.save()
    assert world.lines == ["state-not-written"]

    world.file.fails = False
    assert world.checkpoint.save()

    assert world.calls[-1] == "whole"
    world.file.fails = True
    world.change()
    assert not world.checkpoint.save()
    assert world.lines == ["state-not-written"] * 2


def test_a_store_that_lags_is_logged_until_it_has_caught_up(world: World) -> None:
    for flushed, complete in ((False, True), (True, True), (True, False), (True, False)):
        world.store.flushed, world.store.complete = flushed, complete
        assert world.checkpoint.save()

    assert world.lines == ["keeper-behind"] * 2


def test_a_full_store_is_logged_once_and_the_next_program_knows_what_it_lacks(world: World) -> None:
    world.store.left_out = ("worker.1.process",)
    world.checkpoint.save()
    world.checkpoint.save()

    assert world.lines == ["store-full"]
    assert CODEC.decode(world.file.payload).left_out == ("worker.1.process",)


def test_an_upgrade_needs_the_state_and_every_descriptor_in_the_store(world: World) -> None:
    wanted: list[set[str]] = []

    def has(names: set[str]) -> bool:
        wanted.append(names)
        return len(wanted) > 1

    world.store.has = has
    assert not world.checkpoint.write()
    assert world.checkpoint.write()
    world.file.fails = True
    world.change()
    assert not world.checkpoint.write()

    # The guard makes a new line for each program, so its line is not stored.
    assert wanted[0] == {inherited.STATE, "listener.0", "worker.1.process"}


def test_an_upgrade_leaves_nothing_in_the_store_that_the_next_program_would_not_know(
    world: World,
) -> None:
    """After a failed write the store has kept what was to be removed."""
    world.store.has = lambda names: True
    world.file.fails = True
    assert not world.checkpoint.save()
    assert not world.checkpoint.write()

    world.file.fails = False
    world.calls.clear()
    assert world.checkpoint.write()
    assert world.calls == ["store", "whole"]


def test_the_next_program_reads_the_last_state_and_refuses_what_is_none() -> None:
    file = StateFile.make()
    try:
        assert module.read(file.fd) is None
        checkpoint = Checkpoint(
            file,
            cast("Any", SimpleNamespace(keeps=True, left_out=(), flushed=True, complete=True,
                                        sync=lambda *given: given[-1]())),
            cast("Any", None),
            dict,
        )  # fmt: skip
        world = World()
        checkpoint.begin(cast("Any", world.effects), lambda: world.snapshot)
        for _ in range(3):
            world.change()
            assert checkpoint.save()

        assert module.read(file.fd) == world.snapshot

        file.write(CODEC.encode(SETTINGS))
        with pytest.raises(StateError, match="no snapshot"):
            module.read(file.fd)
        file.write(b"neither")
        with pytest.raises(StateError, match="the state"):
            module.read(file.fd)
    finally:
        os.close(file.fd)
