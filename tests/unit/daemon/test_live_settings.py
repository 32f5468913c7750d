"""When read settings become the candidate, come into force or are dropped, with their listeners."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.actions import UseSettings
from socketprotector.core.events import SettingsFailed, SettingsRead
from socketprotector.core.fleet import Candidate, Fleet
from socketprotector.core.snapshot import Snapshot
from socketprotector.daemon import live_settings as module
from socketprotector.daemon.config_reader import ConfigAnswer
from socketprotector.daemon.live_settings import LiveSettings
from socketprotector.model.lazy_dataclass import replace
from socketprotector.model.policy import Policy
from socketprotector.model.records import SettingsRecord
from socketprotector.model.settings import ListenerSettings, Settings

from .clock import Clock

HTTP, EXTRA = ListenerSettings("tcp:127.0.0.1:80"), ListenerSettings("tcp:127.0.0.1:81")
OLD = Settings("name", ("sh",), "/", listeners=(HTTP,))


class Reader:
    """A reader of the configuration whose answer comes from the test."""

    def __init__(self, *_: object) -> None:
        self.done: Callable[[ConfigAnswer], None] | None = None
        self.read_settings: list[Settings] = []
        self.dry = False
        self.called_off = 0

    @property
    def busy(self) -> bool:
        return self.done is not None

    def read(
        self, settings: Settings, done: Callable[[ConfigAnswer], None], *, dry: bool = False
    ) -> None:
        self.read_settings.append(settings)
        self.done, self.dry = done, dry

    def call_off(self, answer: ConfigAnswer | None = None) -> None:
        self.called_off += 1
        if answer is not None:
            self.answer(answer)

    def answer(self, answer: ConfigAnswer) -> None:
        done, self.done = self.done, None
        assert done is not None
        done(answer)


class World:
    """Live settings, and what became of them in the pool, the delivery and the log."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.readers: dict[str, Reader] = {}
        self.applied: list[Settings] = []
        self.listeners = [self.listener(0, HTTP)]
        self.added: list[tuple[int, bool]] = []
        self.removed: list[int] = []
        self.closed: list[int] = []
        self.levels: list[str] = []
        self.refusal: str | None = None
        self.changes: list[list[int]] = []
        self.no_memory = False
        runtime = self.clock.use_in(patch)
        cast("Any", runtime.log).set_level = self.levels.append
        patch.setattr(
            module,
            "config_reader",
            SimpleNamespace(ConfigReader=self._reader, ConfigAnswer=ConfigAnswer),
        )
        self.live = LiveSettings(
            OLD,
            runtime,
            pool=cast("Any", SimpleNamespace(apply_settings=self.applied.append)),
            delivery=cast("Any", self),
            command=(),
        )

    def _reader(self, _command: object, _loop: object, purpose: str) -> Reader:
        if self.no_memory:
            raise MemoryError
        self.readers[purpose] = Reader()
        return self.readers[purpose]

    def listener(self, index: int, settings: ListenerSettings) -> Any:
        return SimpleNamespace(
            index=index, settings=settings, close=lambda: self.closed.append(index)
        )

    # as a Delivery

    def make_listener(self, index: int, settings: ListenerSettings, fds: object, **_: Any) -> Any:
        assert fds == (50 + index, -1, -1)
        return self.listener(index, settings)

    def cannot_change(self, added: list[Any], removed: list[Any]) -> str | None:
        self.changes = [[each.index for each in listeners] for listeners in (added, removed)]
        return self.refusal

    def add(self, listener: Any, *, dry_run: bool) -> None:
        self.listeners.append(listener)
        self.added.append((listener.index, dry_run))

    def remove(self, listener: Any) -> None:
        self.listeners.remove(listener)
        self.removed.append(listener.index)

    # what the tests do

    def cannot_share(self, listeners: list[Any]) -> str | None:
        names = [each.settings.address for each in listeners]
        return next((f"{each} cannot" for each in names if each.startswith("unix:")), None)

    def read(self, answer: ConfigAnswer, *, dry_run: bool = False, canary: bool = False) -> None:
        self.live.read(dry_run=dry_run, canary=canary)
        self.readers["reader"].answer(answer)

    def read_new(self, new: Settings, *, dry_run: bool = False, canary: bool = False) -> None:
        there = len(self.live.settings.listeners)
        added = {n: 50 + n for n in range(there, len(new.listeners))}
        self.read(ConfigAnswer(settings=new, listeners=added), dry_run=dry_run, canary=canary)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_read_settings_are_a_candidate_until_they_are_used(world: World) -> None:
    new = replace(OLD, workers=3, policy=Policy(stop_timeout_s=7.0), log_level="debug")
    world.read_new(new)
    assert world.live.record == SettingsRecord(OLD, new)
    assert world.clock.posted == [SettingsRead(new.policy, 3)]
    assert (world.applied, world.levels) == ([], [])

    world.live.use()

    assert world.live.record == SettingsRecord(new)
    assert (world.applied, world.levels) == ([new], ["debug"])


def test_the_number_of_workers_is_reported_only_if_it_changed(world: World) -> None:
    """Otherwise a reload would undo what an operator has set by `scale`."""
    world.read_new(replace(OLD, watchdog_s=9.0))

    assert world.clock.posted == [SettingsRead(OLD.policy, None)]


def test_a_log_level_that_the_file_did_not_change_is_not_set_again(world: World) -> None:
    world.read_new(replace(OLD, watchdog_s=9.0))
    world.live.use()

    assert world.levels == []


def test_without_a_candidate_use_and_forget_change_nothing(world: World) -> None:
    world.live.use()
    world.live.forget()

    assert (world.live.record, world.applied) == (SettingsRecord(OLD), [])


def test_a_failure_is_logged_line_by_line_and_changes_nothing(world: World) -> None:
    world.read(ConfigAnswer("workers: -1\nlisten: none"))

    assert world.clock.posted == [SettingsFailed("workers: -1 (and 1 more)\nlisten: none")]
    assert world.clock.lines == ["not-configured"] * 2
    assert world.live.record == SettingsRecord(OLD)


def test_without_memory_for_the_reader_the_reload_fails(world: World) -> None:
    world.no_memory = True
    world.live.read(dry_run=False)

    [failed] = world.clock.posted
    assert isinstance(failed, SettingsFailed)
    assert "out of memory" in failed.reason


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_added_listener_is_opened_at_once_and_closed_if_its_release_fails(
    world: World, dry_run: bool
) -> None:
    world.read_new(replace(OLD, listeners=(HTTP, EXTRA)), dry_run=dry_run)
    assert world.added == [(1, dry_run)]
    assert world.changes == [[1], []]

    world.live.forget()

    assert world.removed == [1]
    gone = replace(EXTRA, removed=True)  # its index is never used again
    assert world.live.record == SettingsRecord(replace(OLD, listeners=(HTTP, gone)))
    assert world.applied == [world.live.settings]


def test_a_change_of_listeners_that_the_delivery_refuses_fails_the_reload(world: World) -> None:
    world.refusal = "no second socket"
    world.read_new(replace(OLD, listeners=(replace(HTTP, removed=True), EXTRA)))

    assert world.changes == [[1], [0]]
    assert world.clock.posted == [SettingsFailed("no second socket")]
    assert (world.closed, world.added) == ([1], [])
    assert world.live.record == SettingsRecord(OLD)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (replace(OLD, policy=Policy(stop_first=True)), "it does not work with --reload-order stop"),
        (replace(OLD, policy=Policy(surge=1)), "it does not work with --reload-order rolling"),
        (replace(OLD, listeners=(HTTP, ListenerSettings("unix:/s"))), "unix:/s cannot"),
    ],
)
def test_a_requested_canary_without_a_place_in_the_new_settings_fails_the_reload(
    world: World, new: Settings, said: str
) -> None:
    """Otherwise all clients would meet the new release at once."""
    world.read_new(new, canary=True)

    [failed] = world.clock.posted
    assert isinstance(failed, SettingsFailed)
    assert failed.reason.startswith(f"no canary: {said}")
    assert world.live.record.candidate is None


def test_a_removed_listener_accepts_until_the_settings_are_used(world: World) -> None:
    world.read_new(replace(OLD, listeners=(replace(HTTP, removed=True),)))
    assert world.removed == []

    world.live.use()

    assert world.removed == [0]
    assert world.clock.lines[-1] == "listener-removed"


def test_a_removed_listener_is_reported_once_although_the_next_program_drains_it_too(
    world: World,
) -> None:
    world.read_new(replace(OLD, listeners=(replace(HTTP, removed=True),)))
    world.live.use()
    world.listeners.append(world.listener(0, HTTP))  # inherited, because clients wait there

    world.live.adopt(Snapshot(Fleet(), world.live.record))

    assert world.removed == [0, 0]
    assert world.clock.lines.count("listener-removed") == 1


def test_only_new_notices_and_warnings_are_logged(world: World) -> None:
    world.read_new(replace(OLD, notices=("a",), warnings=("b",)))
    world.live.use()
    world.clock.fields.clear()
    world.read_new(replace(OLD, notices=("a", "c"), warnings=("b", "d")))

    assert [each["text"] for each in world.clock.fields if "text" in each] == ["c", "d"]


def test_a_comparison_does_not_disturb_a_reload_and_runs_once_at_a_time(world: World) -> None:
    answers: list[ConfigAnswer] = []
    world.live.read(dry_run=False)
    assert world.live.compare(answers.append)
    assert not world.live.compare(answers.append)
    assert world.readers["comparer"].dry
    assert not world.readers["reader"].dry

    world.readers["comparer"].answer(ConfigAnswer(settings=replace(OLD, workers=9)))

    assert len(answers) == 1
    assert world.live.record == SettingsRecord(OLD)
    assert world.live.compare(answers.append)


def test_a_comparison_is_with_the_release_that_a_reload_would_start(world: World) -> None:
    """After exit status 5 of a deploy, `current` still names the release before it."""
    world.live.releases = cast("Any", SimpleNamespace(to_start=lambda: "2"))

    world.live.compare(lambda answer: None)

    [read] = world.readers["comparer"].read_settings
    assert read == replace(OLD, release_wanted="2")


def test_a_forgotten_reload_is_read_no_further(world: World) -> None:
    world.live.read(dry_run=False)
    answers: list[ConfigAnswer] = []
    world.live.compare(answers.append)
    world.live.forget()
    assert [world.readers[each].called_off for each in ("reader", "comparer")] == [1, 0]

    world.live.stop_reading()
    assert [world.readers[each].called_off for each in ("reader", "comparer")] == [2, 1]
    assert [each.code for each in answers] == ["busy"]  # a client waits for it
    assert world.clock.posted == []  # the next program reads again for the reload


def test_a_new_socket_file_is_recorded_in_both_settings(world: World) -> None:
    """We remove a file at the exit only if it is the recorded one."""
    world.read_new(replace(OLD, workers=2))
    bound = replace(HTTP, device=3, inode=4)
    world.live.note_rebound(cast("Any", SimpleNamespace(index=0, settings=bound)))

    current, candidate = world.live.record.current, world.live.record.candidate
    assert candidate is not None
    assert (current.listeners, candidate.listeners) == ((bound,), (bound,))
    assert (current.workers, candidate.workers) == (1, 2)
    assert world.clock.saves == 1


def test_a_file_that_was_bound_while_the_configuration_was_read_is_kept(world: World) -> None:
    world.live.read(dry_run=False)
    bound = replace(HTTP, device=3, inode=4)
    world.live.note_rebound(cast("Any", SimpleNamespace(index=0, settings=bound)))
    world.readers["reader"].answer(ConfigAnswer(settings=replace(OLD, workers=2)))

    candidate = world.live.record.candidate
    assert candidate is not None
    assert candidate.listeners == (bound,)


@pytest.mark.parametrize("state", ["tried", "ordered into force", "dropped"])
def test_the_next_program_keeps_a_candidate_that_the_fleet_still_needs(
    world: World, state: str
) -> None:
    candidate = replace(OLD, workers=2)
    fleet = Fleet(candidate=Candidate(candidate.policy) if state == "tried" else None)
    undone = (UseSettings(),) if state == "ordered into force" else ()
    record = SettingsRecord(OLD, candidate)

    world.live.adopt(Snapshot(fleet, record, unfinished=undone))

    kept = record if state != "dropped" else SettingsRecord(OLD)
    assert world.live.record == kept
