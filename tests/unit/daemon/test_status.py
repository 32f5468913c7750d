"""Status in words and figures: the phase of the whole, and waits from a histogram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socketprotector.core.events import (
    ChannelBroken,
    Launched,
    ReloadRequested,
    StopRequested,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import Policy
from socketprotector.daemon.control.status import _percentile, phase_of
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


def test_with_nobody_to_serve_it_is_waiting(story: Story) -> None:
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


@pytest.mark.parametrize(
    ("waits", "share", "found"),
    [
        ((0, 0, 0), 0.5, None),
        ((1,), 0.5, 0),  # shorter than a microsecond
        ((0, 1), 0.99, 1),
        ((0, 0, 1), 0.5, 3),
        ((50, 0, 0, 50), 0.5, 0),
        ((49, 0, 0, 51), 0.5, 7),
        ((99, 0, 0, 1), 0.99, 0),
        ((98, 0, 0, 2), 0.99, 7),
        ((0,) * 31 + (1,), 0.5, 2**31 - 1),
        ((2**53,) * 32, 0.99, 2**31 - 1),  # the most that is believed
    ],
)
def test_a_share_of_waits(waits: Sequence[int], share: float, found: int | None) -> None:
    assert _percentile(waits, share) == found


@given(st.lists(st.integers(0, 2**53), min_size=1, max_size=32), st.sampled_from((0.5, 0.99)))
def test_a_share_is_known_wherever_anything_was_counted(waits: list[int], share: float) -> None:
    found = _percentile(waits, share)

    assert (found is None) == (not any(waits))
    if found is not None:
        bucket = found.bit_length()
        assert sum(waits[: bucket + 1]) >= 0.999999 * share * sum(waits)
        assert waits[bucket]
