"""When the serving generation is probed, and which changes of its health are reported."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon import health as module
from socketprotector.daemon.health import Health
from socketprotector.daemon.verdicts import (
    BAD,
    CANNOT,
    GOOD,
    UNHEALTHY,
    UNKNOWN,
    UNMADE,
    UNTAKEN,
    Verdict,
)
from socketprotector.model.history import HEALTHY, History
from socketprotector.model.settings import Settings

from .clock import Clock

EVERY_S = 10.0


class Probe:
    """A probe that gets its verdict from the test."""

    def __init__(self, *_: object, **__: object) -> None:
        self.probed: list[int] = []
        self.heard: Callable[[Verdict], None] | None = None
        self.connection = None

    @property
    def is_pending(self) -> bool:
        return self.heard is not None

    def send(
        self, generation: Any, _spec: object, _limit_s: float, heard: Callable[[Verdict], None]
    ) -> None:
        self.probed.append(generation.record.number)
        self.heard = heard

    def end(self) -> None:
        self.heard = None

    close = end

    def answer(self, kind: str, why: str = "") -> None:
        heard, self.heard = self.heard, None
        assert heard is not None
        heard(Verdict(kind, why))


class World:
    """A health check, its probe and its time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock, self.probe = Clock(), Probe()
        patch.setattr(module, "Probe", lambda *_, **__: self.probe)
        runtime = self.clock.use_in(patch, module)
        patch.setattr(module, "time", SimpleNamespace(time=lambda: self.clock.now))
        self.history = History()
        self.settings = Settings(
            name="x",
            command=("w",),
            directory="/",
            health="http:/",
            health_every_s=EVERY_S,
            health_failures=2,
        )
        self.delivery = SimpleNamespace(is_silent=False)
        self.ready = {1, 2}  # the generations with a ready worker
        self.health = Health(
            runtime,
            settings=lambda: self.settings,
            delivery=cast("Any", self.delivery),
            remember=self._remember,
            has_ready=lambda number: number in self.ready,
        )

    def _remember(self, change: Callable[[History], History]) -> None:
        self.history = change(self.history)

    def serve(self, number: int) -> None:
        generation = SimpleNamespace(record=SimpleNamespace(number=number))
        self.health.set_serving(cast("Any", generation))
        self.clock.pass_time(0.0)

    def answer(self, *kinds: str) -> None:
        """Answer the present probe, and one for each further kind."""
        for each in kinds:
            self.probe.answer(each, "" if each == GOOD else "why")
            self.clock.pass_time(EVERY_S)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_each_change_of_the_health_is_logged_once_and_remembered(world: World) -> None:
    world.serve(1)
    world.answer(GOOD, GOOD, BAD)
    assert world.clock.lines == ["healthy"]

    world.answer(BAD, BAD, GOOD, CANNOT, CANNOT)

    assert world.clock.lines == ["healthy", "unhealthy", "healthy", "health-unknown"]


@pytest.mark.parametrize("kind", [UNMADE, UNTAKEN])
def test_a_probe_that_waits_is_a_failure_only_while_no_worker_is_ready(
    world: World, kind: str
) -> None:
    world.serve(1)
    world.answer(GOOD, kind, kind, kind)
    assert world.health.results.state == HEALTHY

    world.ready = {2}
    world.answer(kind, kind)
    known = world.health.results
    assert (known.state, known.failures, known.last) == (UNHEALTHY, 2, "no worker is ready")

    world.ready = {1}
    world.answer(kind)
    assert world.health.results.last.startswith("busy")
    world.answer(GOOD)
    assert world.clock.lines == ["healthy", "unhealthy", "healthy"]


def test_no_second_probe_is_sent_while_one_has_no_answer(world: World) -> None:
    world.serve(1)
    world.clock.pass_time(5 * EVERY_S)
    assert world.probe.probed == [1]

    world.probe.answer(GOOD)
    world.clock.pass_time(EVERY_S)

    assert world.probe.probed == [1, 1]


def test_a_hold_suspends_the_probes_and_not_their_schedule(world: World) -> None:
    world.delivery.is_silent = True
    world.serve(1)
    world.clock.pass_time(2 * EVERY_S)
    assert world.probe.probed == []

    world.delivery.is_silent = False
    world.clock.pass_time(EVERY_S)

    assert world.probe.probed == [1]


def test_the_health_of_the_next_generation_is_unknown_at_first(world: World) -> None:
    world.serve(1)
    world.answer(GOOD)
    assert world.health.results.state == HEALTHY

    world.serve(2)

    assert world.health.results.state == UNKNOWN
    assert world.probe.probed[-1] == 2
    world.answer(GOOD)
    assert world.clock.lines == ["healthy", "healthy"]


def test_only_a_reload_that_changes_an_option_begins_again(world: World) -> None:
    world.serve(1)
    world.answer(GOOD)
    world.health.apply_settings()
    assert world.health.results.state == HEALTHY

    world.settings = Settings(
        name="x", command=("w",), directory="/", health="http:/", health_every_s=2 * EVERY_S
    )
    world.health.apply_settings()

    assert world.health.results.state == UNKNOWN


def test_a_reload_without_the_option_ends_the_probes(world: World) -> None:
    world.serve(1)
    world.settings = Settings(name="x", command=("w",), directory="/")
    world.health.apply_settings()

    assert not world.probe.is_pending
    assert not world.clock.waits


def test_after_a_failed_upgrade_the_probes_go_on_and_the_health_is_kept(world: World) -> None:
    world.serve(1)
    world.answer(GOOD)
    world.health.suspend()
    asked = len(world.probe.probed)
    world.clock.pass_time(3 * EVERY_S)
    assert len(world.probe.probed) == asked

    world.health.resume()
    world.clock.pass_time(0.0)

    assert len(world.probe.probed) == asked + 1
    assert world.health.results.state == HEALTHY


def test_a_verdict_that_comes_when_no_generation_serves_is_not_reported(world: World) -> None:
    world.serve(1)
    heard = world.probe.heard
    assert heard is not None
    world.health.set_serving(None)
    heard(Verdict(GOOD))

    assert world.clock.lines == []
    assert not world.clock.waits
