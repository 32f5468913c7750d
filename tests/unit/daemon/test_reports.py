"""What each report sends to the log, systemd, the launching process and the history."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.actions import Report, ReportKind
from socketprotector.core.fleet import Fleet, LameDuck, Next, Stop
from socketprotector.daemon.reports import Reports
from socketprotector.model.policy import Policy
from socketprotector.model.records import RunRecord


class World:
    """Reports, and what each of their readers got."""

    def __init__(self) -> None:
        self.sent: list[dict[str, str]] = []
        self.lines: list[tuple[str, str, dict[str, object]]] = []
        self.levels: list[str] = []
        self.started = 0
        systemd = SimpleNamespace(
            pid=7,
            send=lambda **fields: self.sent.append(fields),
            reloading=lambda: self.sent.append({"RELOADING": "1"}),
        )
        self.start_report = SimpleNamespace(failure="", started=self._started)
        log = SimpleNamespace(
            write=lambda level, event, **fields: self.lines.append((level, event, fields)),
            set_level=self.levels.append,
        )
        self.policy = Policy(stop_timeout_s=30.0, kill_timeout_s=10.0, lame_duck_s=60.0)
        self.reports = Reports(
            cast("Any", log),
            cast("Any", systemd),
            cast("Any", self.start_report),
            policy=lambda: self.policy,
        )

    def _started(self) -> None:
        self.started += 1

    def write(self, *kinds: ReportKind, reason: str = "") -> list[dict[str, str]]:
        """Write reports; return what systemd got."""
        self.sent.clear()
        for each in kinds:
            self.reports.write(Report(each, 2, reason))
        return [*self.sent]


@pytest.fixture
def world() -> World:
    return World()


def test_the_first_ready_report_informs_systemd_and_the_launching_process(world: World) -> None:
    status = "generation 2 is serving"

    assert world.write(ReportKind.READY) == [{"READY": "1", "MAINPID": "7", "STATUS": status}]
    assert world.started == 1


def test_a_failed_reload_ends_the_reload_of_systemd_with_its_first_line(world: World) -> None:
    sent = world.write(ReportKind.RELOADING, ReportKind.RELOAD_FAILED, reason="exited\nlast words")

    assert sent == [{"RELOADING": "1"}, {"READY": "1", "STATUS": "reload failed: exited"}]
    level, event, fields = world.lines[-1]
    assert (level, event) == ("error", ReportKind.RELOAD_FAILED.value)
    assert (fields["reason"], fields["last_words"]) == ("exited", "last words")


@pytest.mark.parametrize(
    "kind",
    [
        ReportKind.RELOADING,
        ReportKind.RELOADED,
        ReportKind.RECOVERED,
        ReportKind.RELOAD_FAILED,
    ],
)
@pytest.mark.parametrize(
    "before", [ReportKind.STOPPING, ReportKind.LAME_DUCK, ReportKind.START_FAILED]
)
def test_systemd_gets_no_report_of_a_reload_after_the_stop_began(
    world: World, before: ReportKind, kind: ReportKind
) -> None:
    assert world.write(kind)
    world.write(before)

    assert world.write(kind) == []
    assert world.lines[-1][1] == kind.value


def test_a_lame_duck_without_a_stop_lets_reloads_report(world: World) -> None:
    assert len(world.write(ReportKind.LAME_DUCK_ON, ReportKind.LAME_DUCK_OFF)) == 2

    assert world.write(ReportKind.RELOADED) == [{"READY": "1", "STATUS": "generation 2 is serving"}]


def test_a_stop_requests_the_time_that_it_may_take(world: World) -> None:
    [sent] = world.write(ReportKind.STOPPING, reason="TERM\nmore")
    assert sent["STATUS"] == "stopping: TERM"
    assert sent["EXTEND_TIMEOUT_USEC"] == str(45 * 1_000_000)  # 30 + 10 + 5

    [sent] = world.write(ReportKind.LAME_DUCK)
    assert sent["EXTEND_TIMEOUT_USEC"] == str(105 * 1_000_000)


def test_the_launching_process_gets_the_whole_reason_of_a_failed_start(world: World) -> None:
    [sent] = world.write(ReportKind.START_FAILED, reason="exited\nlast words")

    assert sent == {"STATUS": "start failed: exited"}
    assert world.start_report.failure == "exited\nlast words"
    assert world.started == 0


def test_the_next_program_keeps_when_the_first_one_started_and_counts_itself(world: World) -> None:
    began = world.reports.run.started_at
    world.reports.adopt(RunRecord(started_at=0.0, restarts=0), "")
    assert (world.reports.run.started_at, world.reports.run.restarts) == (began, 1)
    assert world.levels == []

    world.reports.adopt(RunRecord(started_at=5.0, restarts=3), "debug")

    assert (world.reports.run.started_at, world.reports.run.restarts) == (5.0, 4)
    assert world.levels == ["debug"]


def test_the_next_program_says_nothing_to_systemd_before_the_first_generation_serves(
    world: World,
) -> None:
    world.reports.repeat_messages(Fleet())

    assert world.sent == []
    assert world.started == 0


@pytest.mark.parametrize(
    ("fleet", "keys"),
    [
        (Fleet(served=True), [{"READY", "MAINPID", "STATUS"}]),
        (Fleet(served=True, reading=True), [{"READY", "MAINPID", "STATUS"}, {"RELOADING"}]),
        (Fleet(served=True, to_open=Next.FRESH), [{"READY", "MAINPID", "STATUS"}, {"RELOADING"}]),
        (Fleet(served=True, reading=True, dry_run=True), [{"READY", "MAINPID", "STATUS"}]),
        (Fleet(served=True, stopping=Stop.QUICK), [{"STOPPING", "STATUS", "EXTEND_TIMEOUT_USEC"}]),
        (
            Fleet(served=True, lame_duck=LameDuck.STOPPING),
            [{"STOPPING", "STATUS", "EXTEND_TIMEOUT_USEC"}],
        ),
    ],
)
def test_the_next_program_repeats_to_systemd_what_holds(
    world: World, fleet: Fleet, keys: list[set[str]]
) -> None:
    world.reports.repeat_messages(fleet)

    assert [set(each) for each in world.sent] == keys


def test_a_lost_listener_is_an_error_and_the_status(world: World) -> None:
    world.reports.listener_lost("tcp:1", "shut down")

    assert world.lines[0][:2] == ("error", "listener-lost")
    assert world.sent[0]["STATUS"].startswith("tcp:1 no longer accepts")
