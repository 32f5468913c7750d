"""In which order an exited worker's last words, status and processes are found, and reported."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.events import WorkerExited
from socketprotector.daemon import post_mortem as module
from socketprotector.daemon.post_mortem import PostMortem
from socketprotector.model.handoff_modes import MODES
from socketprotector.model.history import History
from socketprotector.model.lazy_dataclass import replace
from socketprotector.model.records import WorkerRecord
from socketprotector.system.process import End

from .clock import Clock

PIDFD = 40
CRASH, CLEAN = End(False, "exit status 1"), End(True, "exit status 0")


class World:
    """Worker 1 of generation 3, and what was done with it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.calls: list[str] = []
        self.history = History()
        self.ended: list[int] = []
        self.answers: list[Callable[[str], None]] = []  # to requests of last words
        self.has_group = False
        self.left: dict[str, Any] = {}
        self.leftovers_of: list[object] = []
        self.recorded: dict[str, int] = {}
        self.process = SimpleNamespace(
            pid=7,
            pidfd=PIDFD,
            has_ended=lambda: True,
            reap=self._reap,
            has_group=lambda: self.has_group,
            close=lambda: self.calls.append("close process"),
        )
        self.reaps: list[End | type[Exception] | None] = [CRASH]
        self.generation = SimpleNamespace(
            is_finishing=False,
            program=SimpleNamespace(argv=("serve",), finish_signal=15, mode=MODES["connection"]),
            board=None,
            record=SimpleNamespace(lost=1),
            update_record=self.recorded.update,
            take_counts=lambda slot, kept: 2 if slot == 4 else None,
        )
        self.worker: Any = SimpleNamespace(
            record=WorkerRecord(1, 3, 7, 0, slot=4, start=70),
            generation=self.generation,
            process=self.process,
            line=None,
            became_ready=False,
            ended=False,
            last_words=None,
            end_from_guard=None,
            awaits_end=False,
            close=lambda: self.calls.append("close sockets"),
        )
        patch.setattr(
            module,
            "known_servers",
            SimpleNamespace(
                detached=lambda _: "does it detach itself?",
                advice=lambda _, said, unseen, proved_ready: (
                    "run it by hand" if unseen and not proved_ready else ""
                ),
            ),
        )
        runtime = self.clock.use_in(patch, module)
        self.post_mortem = PostMortem(
            runtime,
            cast("Any", self),
            delivery=cast(
                "Any", SimpleNamespace(waiting=self._waiting, sockets_of=lambda _: frozenset({8}))
            ),
            groups=cast("Any", SimpleNamespace(keep=self._keep)),
            leftovers=cast("Any", SimpleNamespace(end=self.leftovers_of.append)),
            ended=self.ended.append,
            remember=self._remember,
            why_killed=lambda: BY_LIMIT,
        )
        self.clock.watch(PIDFD, lambda: None)

    def _remember(self, change: Callable[[History], History]) -> None:
        self.history = change(self.history)

    def _reap(self) -> End | None:
        self.calls.append("reap")
        found = self.reaps.pop(0)
        if isinstance(found, type):
            raise found
        return found

    def _waiting(self, _: object, *, clients_only: bool) -> int:
        assert clients_only
        return 5

    def _keep(
        self, record: WorkerRecord, _process: object, sign: int, ended: object, _line: object
    ) -> None:
        assert (record.number, sign) == (1, 15)
        self.left["ended"] = ended

    # as Output

    def last_words(self, number: int, start: int, done: Callable[[str], None]) -> None:
        assert (number, start) == (1, 0)
        self.calls.append("words")
        self.answers.append(done)

    def where_to_look(self) -> str:
        return "look at the log"

    # what the tests do

    def serves(self) -> None:
        self.worker.became_ready = True
        self.worker.record = replace(self.worker.record, ready_at=990.0, ready_by="notify")

    def end_of(self, *, guarded: bool = False) -> End | None:
        return self.post_mortem.end_of(self.worker, guarded=guarded)

    def close(self, end: End = CRASH, *, proved_ready: bool = False) -> WorkerExited:
        return self.post_mortem.close(self.worker, end, proved_ready=proved_ready)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_worker_that_never_served_is_reaped_only_after_its_last_words(world: World) -> None:
    """Until then a program that replaces us finds it exited, and asks again."""
    assert world.end_of() is None
    assert world.end_of() is None
    assert (world.calls, world.clock.watched) == (["words"], {})

    world.answers[0]("no such table")

    assert world.ended == [1]
    assert world.end_of() == CRASH
    assert world.calls == ["words", "reap"]


def test_a_worker_that_served_is_reaped_at_once(world: World) -> None:
    world.serves()

    assert world.end_of() == CRASH
    assert world.calls == ["reap"]


def test_a_wake_up_without_an_exit_changes_nothing(world: World) -> None:
    world.process.has_ended = lambda: False

    assert world.end_of() is None
    assert not world.worker.ended
    assert world.calls == []


def test_a_worker_that_a_tracer_holds_is_reaped_again_later(world: World) -> None:
    world.serves()
    world.reaps = [None, CRASH]
    assert world.end_of() is None
    assert (world.ended, world.clock.watched) == ([], {})

    world.clock.pass_time(0.15)

    assert world.ended == [1]
    assert world.end_of() == CRASH


UNKNOWN = End(False, "ended with an unknown status")


def test_the_guard_tells_how_a_worker_that_is_not_our_child_ended(world: World) -> None:
    world.serves()
    world.reaps = [ChildProcessError] * 3
    assert world.end_of(guarded=True) is None
    assert world.worker.awaits_end

    world.worker.end_from_guard = CLEAN

    assert world.end_of(guarded=True) == CLEAN
    assert not world.clock.waits


def test_what_the_guard_said_before_the_exit_was_seen_is_used_at_once(world: World) -> None:
    world.serves()
    world.reaps = [ChildProcessError]
    world.worker.end_from_guard = CLEAN

    assert world.end_of(guarded=True) == CLEAN
    assert not world.clock.waits


def test_a_guard_that_says_nothing_is_not_awaited_for_ever(world: World) -> None:
    world.serves()
    world.reaps = [ChildProcessError] * 3
    assert world.end_of(guarded=True) is None
    world.clock.pass_time(0.9)
    assert world.ended == []
    world.clock.pass_time(0.2)

    assert world.ended == [1]
    assert world.end_of(guarded=True) == UNKNOWN


def test_without_a_guard_the_status_of_anothers_child_is_unknown(world: World) -> None:
    world.serves()
    world.reaps = [ChildProcessError]

    assert world.end_of() == UNKNOWN


def test_a_crash_while_serving_is_remembered_and_its_last_words_follow(world: World) -> None:
    world.serves()
    event = world.close()
    assert event == WorkerExited(1, "exit status 1", served_s=10.0, waiting=5)
    [crash] = world.history.crashes
    assert (crash.generation, crash.how, crash.when, crash.lost) == (
        3,
        "exit status 1",
        "serving",
        2,
    )
    assert crash.last_words == ""

    world.answers[0]("out of memory")

    assert world.history.crashes[0].last_words == "out of memory"
    assert world.leftovers_of == []
    assert world.clock.fields[0]["lost"] == 2


def test_a_forked_child_that_failed_is_remembered_with_its_parent(world: World) -> None:
    world.serves()

    world.post_mortem.child_failed(world.worker, "3 99 256 2")
    world.answers[0]("its words")
    world.post_mortem.child_failed(world.worker, "3 100 9 -")

    first, second = world.history.crashes
    assert (first.pid, first.worker, first.lost, first.last_words) == (99, 1, 2, "its words")
    assert first.how == "child 3 of 7: exited with status 1"
    assert (second.pid, second.lost, second.how) == (
        100,
        None,
        f"child 3 of 7: {BY_LIMIT}",
    )
    assert world.recorded == {"lost": 3}


@pytest.mark.parametrize("text", ["", "1 2 3", "1 2 x 4", "1 2 3 4 5", "1 9999999999 256 0"])
def test_a_senseless_report_on_a_child_is_ignored(world: World, text: str) -> None:
    world.post_mortem.child_failed(world.worker, text)

    assert not world.history.crashes


def test_a_child_that_fails_while_its_worker_ends_is_no_crash(world: World) -> None:
    world.generation.is_finishing = True

    world.post_mortem.child_failed(world.worker, "3 99 256 2")

    assert not world.history.crashes


@pytest.mark.parametrize(
    ("ended", "asked", "end", "is_crash"),
    [
        (False, False, CLEAN, True),  # a serving worker must not exit unless ordered to
        (True, False, CLEAN, False),
        (True, False, CRASH, True),
        (False, True, CRASH, False),
    ],
)
def test_only_an_exit_that_was_not_ordered_is_a_crash(
    world: World, ended: bool, asked: bool, end: End, is_crash: bool
) -> None:
    world.serves()
    world.generation.is_finishing = ended
    world.worker.record = replace(world.worker.record, asked_to_exit=asked)

    world.close(end)

    assert bool(world.history.crashes) == is_crash
    assert bool(world.answers) == is_crash
    if is_crash:
        assert world.history.crashes[0].when == ("draining" if ended else "serving")


def test_the_reason_of_a_failed_start_ends_with_its_last_words(world: World) -> None:
    world.worker.last_words = "no such table"
    event = world.close()

    assert event.reason.startswith("serve exit status 1 before it was ready")
    assert event.reason.endswith("\nno such table")
    assert "look at the log" not in event.reason
    assert "by hand" not in event.reason  # the operator sees the words
    assert event.served_s == 0.0
    assert world.leftovers_of == [(3, 70, frozenset({8}))]
    assert world.history.crashes[0].when == "starting"


def test_without_last_words_the_reason_says_where_to_look_and_what_to_do(world: World) -> None:
    world.worker.last_words = ""
    assert world.close().reason == (
        "serve exit status 1 before it was ready; run it by hand; look at the log"
    )
    # A program that has become ready before needs no advice about that.
    assert "by hand" not in world.close(proved_ready=True).reason


def test_a_worker_that_exits_cleanly_before_it_was_ready_may_have_detached(world: World) -> None:
    world.worker.last_words = ""
    event = world.close(CLEAN)

    assert event.detached
    assert "does it detach itself?" in event.reason
    assert "by hand" not in event.reason
    assert not world.close(CRASH).detached


def test_a_worker_that_exits_as_soon_as_it_was_ready_has_not_detached(world: World) -> None:
    world.worker.record = replace(world.worker.record, ready_by="notify")
    world.worker.last_words = ""
    event = world.close(CLEAN)

    assert not event.detached
    assert "as soon as it was ready" in event.reason
    assert world.leftovers_of == []
    assert world.history.crashes[0].when == "serving"


def test_the_processes_that_a_worker_left_are_watched_before_its_sockets_close(
    world: World,
) -> None:
    world.serves()
    world.has_group = True
    assert world.close().orphans
    assert world.calls[0] == "close sockets"  # and not its process: that keeps the pid

    cast("Callable[[], None]", world.left["ended"])()

    assert world.clock.posted == [WorkerExited(1, "orphans gone", waiting=5)]


def test_without_such_processes_the_process_is_closed(world: World) -> None:
    world.serves()

    assert not world.close().orphans
    assert world.calls[:2] == ["close process", "close sockets"]


# -- a SIGKILL that we did not send ------------------------------------------------

KILLED = End(False, "was killed by SIGKILL")
BY_LIMIT = "was killed by SIGKILL: out of memory (the service's limit of 512M)"


@pytest.mark.parametrize(
    ("end", "by_us"), [(KILLED, True), (CRASH, False), (End(False, "was killed by SIGTERM"), False)]
)
def test_another_end_is_not_explained_by_the_memory(world: World, end: End, by_us: bool) -> None:
    world.serves()
    world.worker.record = replace(world.worker.record, killed=by_us)

    assert world.close(end).reason == end.how
    world.worker.record = replace(world.worker.record, killed=False)
    assert world.close(KILLED).reason == BY_LIMIT
