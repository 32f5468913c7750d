"""When a settling generation is probed, and when it has failed or may serve alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.events import Event, SettleFailed
from socketprotector.daemon import settle_check as module
from socketprotector.daemon.runtime import Runtime
from socketprotector.daemon.settle_check import SettleCheck
from socketprotector.daemon.verdicts import BAD, CANNOT, GOOD, Verdict
from socketprotector.system.check_command import LIMIT_S

from .clock import Clock


class World:
    """A settle check whose probe gets its verdicts from the test."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.heard: list[Callable[[Verdict], None]] = []
        self.limits_s: list[float] = []
        self.ended: list[object] = []
        self.posted: list[Event] = []
        self.counts: dict[int, dict[str, object]] = {}
        self.reads: Callable[[int], bytes] = lambda _: b""
        patch.setattr(module, "Probe", self._make)
        runtime = self.clock.use_in(patch, module)
        self.check = SettleCheck(
            Runtime(runtime.loop, runtime.log, self.posted.append, bool),
            cast("Any", None),
            cast("Any", SimpleNamespace(release=self.ended.append)),
            lambda: self.counts,
        )

    def _make(self, *_: object, input_of: Callable[[int], bytes], **__: object) -> object:
        self.reads = input_of
        return SimpleNamespace(send=self._send, end=lambda: None)

    def _send(self, *args: Any) -> None:
        self.limits_s.append(args[2])
        self.heard.append(args[3])

    def begin(self, text: str = "http:/") -> None:
        generation = SimpleNamespace(
            record=SimpleNamespace(number=2),
            program=SimpleNamespace(settle_check=text),
            note_probe=lambda: None,
        )
        self.check.begin(cast("Any", generation))

    def answer(self, kind: str) -> None:
        self.heard[-1](Verdict(kind, "why"))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_generation_fails_with_the_first_bad_answer_and_is_probed_no_more(world: World) -> None:
    world.begin()
    world.answer(GOOD)
    world.clock.pass_time(1.0)
    world.answer(BAD)

    assert world.posted == [SettleFailed(2, "--settle-check: why")]
    assert not world.clock.waits
    assert not world.check.is_due


def test_only_a_good_answer_after_the_time_of_settling_ends_it(world: World) -> None:
    world.begin()
    world.answer(GOOD)
    assert not world.check.is_due

    assert world.check.note_settle_over(2)
    assert world.check.is_due
    world.clock.pass_time(1.0)
    world.answer(GOOD)

    assert not world.check.note_settle_over(2)
    assert not world.check.is_due


def test_each_stage_of_a_canary_awaits_an_answer_after_its_own_time(world: World) -> None:
    world.begin()
    assert world.check.note_settle_over(2)
    world.answer(GOOD)
    assert not world.check.note_settle_over(2)
    world.clock.pass_time(1.0)
    world.answer(GOOD)
    assert not world.check.is_due

    assert world.check.note_settle_over(2)
    assert world.check.is_due
    world.clock.pass_time(1.0)
    world.answer(BAD)

    assert world.posted == [SettleFailed(2, "--settle-check: why")]


def test_no_other_generation_is_awaited(world: World) -> None:
    assert not world.check.note_settle_over(2)
    world.begin()

    assert not world.check.note_settle_over(1)
    assert not world.check.is_due


@pytest.mark.parametrize(("text", "limit_s"), [("http:/", 5.0), ("check:true", LIMIT_S)])
def test_a_command_has_more_time_than_an_http_probe(
    world: World, text: str, limit_s: float
) -> None:
    world.begin(text)

    assert world.limits_s == [limit_s]


def test_a_command_runs_once_a_second_however_long_it_takes(world: World) -> None:
    world.begin("check:true")
    world.clock.pass_time(0.7)
    world.answer(GOOD)
    world.clock.pass_time(0.2)
    assert len(world.heard) == 1
    world.clock.pass_time(0.15)
    assert len(world.heard) == 2

    world.clock.pass_time(3.0)
    world.answer(GOOD)
    world.clock.pass_time(0.0)
    assert len(world.heard) == 3


def test_the_time_of_a_suspension_counts_for_no_missing_verdict(world: World) -> None:
    world.begin()
    world.answer(CANNOT)
    world.check.suspend()
    world.clock.pass_time(60.0)
    assert len(world.heard) == 1

    world.check.resume()
    world.answer(CANNOT)

    assert world.posted == []
    assert len(world.heard) == 2


def test_a_stopped_check_is_not_resumed(world: World) -> None:
    world.begin()
    world.check.stop()
    world.check.resume()

    assert len(world.heard) == 1
    assert world.ended == [2]


def test_a_command_reads_the_counts_of_the_new_and_of_the_serving_generation(world: World) -> None:
    world.begin("check:true")
    world.counts = {n: {"phase": p} for n, p in ((1, "serving"), (2, "settling"), (3, "draining"))}

    assert json.loads(world.reads(2)) == {"new": {"phase": "settling"}, "old": {"phase": "serving"}}
    del world.counts[1]
    assert json.loads(world.reads(4)) == {"new": None, "old": None}
