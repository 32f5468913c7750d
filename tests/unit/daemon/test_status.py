"""Status in words: the phase of the whole."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from socketprotector.core.events import (
    ChannelBroken,
    Launched,
    ReloadRequested,
    StopRequested,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Policy
from socketprotector.daemon.control import status
from socketprotector.daemon.control.status import phase_of
from socketprotector.system.log import Log
from tests.unit.conftest import Story


def test_the_first_start_is_starting_until_it_is_ready(story: Story) -> None:
    story.given(Policy())
    story.when(Launched())
    assert phase_of(story.fleet) == "starting"

    story.when(WorkerReady(1))
    assert phase_of(story.fleet) == "serving"


def test_a_reload_is_reloading_then_settling_then_serving(story: Story) -> None:
    story.given_serving(Policy(settle_s=5.0))
    story.when(ReloadRequested())
    assert phase_of(story.fleet) == "reloading"
    story.when(ReloadRequested())  # wished for once more
    assert phase_of(story.fleet) == "reloading"

    story.when(WorkerReady(2))
    assert phase_of(story.fleet) == "settling"


def test_reading_the_configuration_is_reloading(story: Story) -> None:
    story.given_serving()
    story.fleet = replace(story.fleet, configured=True)
    story.when(ReloadRequested())

    assert story.fleet.reading
    assert phase_of(story.fleet) == "reloading"


def test_without_a_generation_that_serves_it_is_waiting(story: Story) -> None:
    story.given_serving()
    story.when(ChannelBroken(1))
    assert phase_of(story.fleet) == "waiting"


def test_stop_first_waits_between_the_old_and_the_new(story: Story) -> None:
    story.given_serving(Policy(stop_first=True))
    story.when(ReloadRequested())

    assert phase_of(story.fleet) == "waiting"


@pytest.mark.parametrize("quick", [False, True])
def test_whatever_else_goes_on_a_stop_is_stopping(story: Story, quick: bool) -> None:
    story.given_serving().when(ReloadRequested())
    story.when(StopRequested(quick))

    assert phase_of(story.fleet) == "stopping"


def test_a_dead_worker_of_one_that_serves_changes_no_phase(story: Story) -> None:
    story.given_serving()
    story.when(WorkerExited(1, "was killed by SIGSEGV"))

    assert phase_of(story.fleet) == "serving"


def test_a_log_whose_reader_stands_still_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    receive, send = os.pipe2(os.O_NONBLOCK)
    monkeypatch.setattr(status, "_STDERR", send)
    log = Log("info")
    assert status.of_log(log, None) == []

    while True:
        try:
            os.write(send, bytes(65_536))
        except BlockingIOError:
            break
    [warning] = status.of_log(log, None)
    assert "the reader of the log is suspended" in warning

    os.close(receive)
    assert status.of_log(log, None) == []  # the lines are lost, and block no worker
    os.close(send)
    log.close()
