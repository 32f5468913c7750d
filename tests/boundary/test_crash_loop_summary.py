"""What a crash loop writes: the first deaths, then lines with a count, and the rest at its end."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from types import SimpleNamespace

import pytest

from socketprotector.model.backoff import backoff_s
from socketprotector.model.log_format import as_text
from socketprotector.model.policy import PROVEN_S
from socketprotector.system import crash_loop_summary
from socketprotector.system.crash_loop_summary import (
    FIRST_INTERVAL_S,
    LAST_INTERVAL_S,
    SHOWN,
    CrashLoopFilter,
    Fields,
)
from socketprotector.system.loop import Loop
from tests.pages import page
from tests.running import ROOT


class Clock(Loop):
    """A loop whose timers a test lets run out."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.timers: dict[Hashable, tuple[float, Callable[[], None]]] = {}

    def call_after(self, key: Hashable, seconds: float, callback: Callable[[], None]) -> None:
        self.timers[key] = self.now + seconds, callback

    def due(self, key: Hashable) -> float | None:
        return self.timers[key][0] if key in self.timers else None

    def cancel(self, key: Hashable) -> None:
        self.timers.pop(key, None)

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.timers:
            key, (due, callback) = min(self.timers.items(), key=lambda each: each[1][0])
            if due > until:
                break
            self.now = due
            del self.timers[key]
            callback()
        self.now = until


class Story:
    """Lines as the protector gives them, and what is written of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = Clock()
        self.written: list[tuple[str, Fields]] = []
        self.filter = CrashLoopFilter(
            lambda level, event, fields: self._put(event, fields), self.loop
        )
        self.number = 0
        monkeypatch.setattr(
            crash_loop_summary, "time", SimpleNamespace(monotonic=lambda: self.loop.now)
        )

    def _put(self, event: str, fields: Fields) -> None:
        self.written.append((event, fields))

    def say(self, event: str, **fields: object) -> None:
        if not self.filter.suppresses("info", event, fields):
            self._put(event, fields)

    def spawn(self, generation: int = 1, slot: int = 0) -> int:
        self.number += 1
        self.say("spawned", generation=generation, worker=self.number, slot=slot, pid=self.number)
        return self.number

    def ready(self, worker: int, generation: int = 1) -> None:
        self.say("worker-ready", generation=generation, worker=worker)

    def end(self, worker: int, generation: int = 1, how: str = "exited with status 1") -> None:
        self.say("exited", generation=generation, worker=worker, how=how)
        self.say("exited", generation=generation, reason=how)

    def live_and_die(self, times: int, **more: int) -> None:
        for _ in range(times):
            worker = self.spawn(**more)
            self.ready(worker, more.get("generation", 1))
            self.end(worker, more.get("generation", 1))

    def events(self) -> list[str]:
        """What was written since this was asked the last time."""
        found = [event for event, _ in self.written]
        self.seen = [fields for _, fields in self.written]
        self.written.clear()
        return found


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    told = Story(monkeypatch)
    yield told
    told.loop.close()


LIFE = ["spawned", "worker-ready", "exited", "exited"]


def test_the_first_deaths_are_logged_as_they_are_and_then_a_count(story: Story) -> None:
    story.live_and_die(SHOWN)
    assert story.events() == LIFE * SHOWN
    assert story.loop.timers == {}

    story.live_and_die(20)
    assert story.events() == []
    story.loop.pass_time(FIRST_INTERVAL_S)

    assert story.events() == ["crash-loop"]
    assert story.seen == [
        {
            "generation": 1,
            "slot": 0,
            "deaths": SHOWN + 20,
            "unreported": 20,
            "for_s": FIRST_INTERVAL_S,
            "worker": SHOWN + 20,
            "how": "exited with status 1",
            "reason": "exited with status 1",
        }
    ]


def test_the_log_of_a_daemon_that_dies_at_once_has_the_line_of_the_document(story: Story) -> None:
    lines = set[str]()
    for deaths in range(1, 13):
        worker = story.spawn()
        story.loop.pass_time(0.1)
        story.ready(worker)
        story.end(worker, how="exited with status 7")
        story.loop.pass_time(backoff_s(deaths))
        lines |= {
            as_text("warning", event, fields, 0.0).partition(" ")[2]
            for event, fields in story.written
        }

    [shown] = [each.text for each in page.blocks(ROOT / "docs/log.md") if each.kind == "line"]
    assert shown in lines, sorted(each for each in lines if "crash-loop" in each)


def test_the_intervals_grow_and_no_timer_runs_without_need(story: Story) -> None:
    story.live_and_die(SHOWN)
    story.events()

    for number in range(15):
        story.live_and_die(3)
        wanted = min(FIRST_INTERVAL_S * 2**number, LAST_INTERVAL_S)
        story.loop.pass_time(wanted - 0.01)
        assert story.events() == []
        story.loop.pass_time(0.02)
        assert story.events() == ["crash-loop"]
        assert story.loop.timers == {}


def test_a_worker_that_has_proved_itself_ends_the_loop(story: Story) -> None:
    story.live_and_die(SHOWN + 1)
    worker = story.spawn()
    story.ready(worker)
    story.events()
    story.loop.pass_time(PROVEN_S)

    assert story.events() == ["crash-loop", "spawned", "worker-ready"]
    assert story.seen[1] == {
        "generation": 1, "worker": worker, "slot": 0, "pid": worker, "ago_s": PROVEN_S
    }  # fmt: skip
    assert story.loop.timers == {}
    story.end(worker)
    story.live_and_die(1)
    assert story.events() == ["exited", "exited", *LIFE]


def test_deaths_that_are_far_apart_are_no_loop(story: Story) -> None:
    for _ in range(SHOWN * 3):
        worker = story.spawn()
        story.ready(worker)
        story.loop.pass_time(PROVEN_S)
        story.end(worker)

    assert story.events() == LIFE * SHOWN * 3
    assert story.loop.timers == {}


@pytest.mark.parametrize("word", ["retired", "signalled"])
def test_workers_that_are_replaced_again_and_again_are_no_loop(story: Story, word: str) -> None:
    for _ in range(SHOWN * 3):
        worker = story.spawn()
        story.ready(worker)
        story.say(word, worker=worker)
        story.say("exited", generation=1, worker=worker, how="exited with status 0")

    assert story.events() == ["spawned", "worker-ready", word, "exited"] * SHOWN * 3


def test_workers_that_are_never_ready_and_told_to_go_are_a_loop(story: Story) -> None:
    for _ in range(SHOWN * 3):
        worker = story.spawn()
        story.say("signalled", worker=worker, signal="TERM")
        story.end(worker)

    assert story.events() == ["spawned", "signalled", "exited", "exited"] * SHOWN


def test_a_worker_that_is_told_to_go_in_the_middle_of_a_loop_is_logged(story: Story) -> None:
    story.live_and_die(SHOWN + 2)
    worker = story.spawn()
    story.ready(worker)
    story.events()

    story.say("retired", worker=worker)
    story.say("exited", generation=1, worker=worker, how="exited with status 0")

    assert story.events() == ["crash-loop", "spawned", "worker-ready", "retired", "exited"]
    assert story.loop.timers == {}


def test_each_place_is_counted_for_itself(story: Story) -> None:
    for slot in range(SHOWN * 3):
        story.live_and_die(1, slot=slot)

    assert story.events() == LIFE * SHOWN * 3


def test_a_stop_logs_the_rest_and_what_comes_after_it(story: Story) -> None:
    story.live_and_die(SHOWN + 2)
    worker = story.spawn()
    story.events()

    story.say("stopping")
    story.say("signalled", worker=worker, signal="TERM")
    story.end(worker)

    assert story.events() == ["crash-loop", "spawned", "stopping", "signalled", "exited", "exited"]
    assert story.loop.timers == {}


def test_the_end_of_the_generation_ends_the_loop(story: Story) -> None:
    story.live_and_die(SHOWN + 2)
    worker = story.spawn()
    story.events()

    story.say("reloaded", generation=2)
    story.say("exited", generation=1, worker=worker, how="exited with status 0")
    story.say("drained", generation=1)

    assert story.events() == ["reloaded", "crash-loop", "drained"]
    assert story.seen[1]["deaths"] == SHOWN + 3
    assert story.seen[1]["how"] == "exited with status 0"


def test_workers_that_cannot_be_spawned_have_one_limit_for_each_generation(story: Story) -> None:
    for slot in range(3):
        story.spawn(slot=slot)
    story.events()
    for _ in range(SHOWN + 4):
        story.say("exited", generation=1, reason="cannot start: No such file")
        story.loop.pass_time(1)

    assert story.events() == ["exited"] * SHOWN
    story.spawn()
    assert story.events() == ["crash-loop", "spawned"]
    assert story.seen[0]["reason"] == "cannot start: No such file"
    assert story.seen[0]["unreported"] == 4
    story.say("exited", generation=1, reason="cannot start: No such file")
    assert story.events() == ["exited"]


def test_what_is_no_death_is_logged_however_often_it_is_said(story: Story) -> None:
    for _ in range(SHOWN * 3):
        story.say("check-unreachable", generation=1, reason="no route to host")
        story.say("command-failed", command="status", error="KeyError")

    assert story.events() == ["check-unreachable", "command-failed"] * SHOWN * 3
    assert story.loop.timers == {}


def test_workers_of_an_earlier_program_are_logged_as_they_are(story: Story) -> None:
    for worker in range(1, SHOWN * 3):
        story.say("exited", generation=1, worker=worker, how="exited with status 1")
        story.say("exited", generation=1, reason="exited with status 1")

    assert story.events() == ["exited"] * 2 * (SHOWN * 3 - 1)


def test_generations_that_are_retried_one_after_the_other_are_suppressed(story: Story) -> None:
    def fail(generation: int) -> None:
        worker = story.spawn(generation)
        story.say("exited", generation=generation, worker=worker, how="exited with status 1")
        story.say("retrying", generation=generation, reason=f"reason {generation}")
        story.say("drained", generation=generation)

    for generation in range(1, SHOWN + 1):
        fail(generation)
    assert story.events() == ["spawned", "exited", "retrying", "drained"] * SHOWN
    for generation in range(SHOWN + 1, SHOWN + 8):
        fail(generation)
    assert story.events() == []
    story.loop.pass_time(FIRST_INTERVAL_S)
    assert story.events() == ["crash-loop"]
    assert story.seen[0] == {
        "generation": SHOWN + 7,
        "deaths": SHOWN + 7,
        "unreported": 7,
        "for_s": FIRST_INTERVAL_S,
        "reason": f"reason {SHOWN + 7}",
    }

    worker = story.spawn(SHOWN + 8)
    story.ready(worker, SHOWN + 8)
    story.say("route", generation=SHOWN + 8)
    story.say("recovered", generation=SHOWN + 8)
    assert story.events() == []
    story.loop.pass_time(PROVEN_S)

    assert story.events() == ["drained", "spawned", "worker-ready", "route", "recovered"]
    assert story.loop.timers == {}


def test_a_generation_that_breaks_again_and_again_is_suppressed(story: Story) -> None:
    for generation in range(1, SHOWN + 3):
        worker = story.spawn(generation)
        story.ready(worker, generation)
        story.say("route", generation=generation)
        story.say("recovered", generation=generation)
        story.say("channel-broken", generation=generation, reason="a worker shut down the channel")
    story.events()

    story.say("reloaded", generation=SHOWN + 3)

    assert story.events() == ["crash-loop", "reloaded"]
    assert story.seen[0]["unreported"] == 2
    assert story.loop.timers == {}


def test_what_is_known_stays_bounded(story: Story) -> None:
    for generation in range(1, 50):
        story.live_and_die(SHOWN + 20, generation=generation)
        story.say("drained", generation=generation)

    kept = story.filter
    assert [kept._crashing, kept._slot_of] == [{}, {}]
    assert story.loop.timers == {}
