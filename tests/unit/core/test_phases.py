"""The phases of a generation: what each event makes of each, and how they are drawn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from socketprotector.core.events import (
    Answered,
    BacklogEmptied,
    ChannelBroken,
    Deadline,
    DeadlinePassed,
    DryRunRequested,
    Event,
    HandingOver,
    HeldClientsWait,
    HoldReleased,
    HoldRequested,
    KillRequested,
    LameDuckRequested,
    Launched,
    ListenersLost,
    OpenFailed,
    PromoteRequested,
    Quiesced,
    ReloadRequested,
    RenewRequested,
    ReplaceRequested,
    RollbackRequested,
    ScaleRequested,
    SettingsFailed,
    SettingsRead,
    SettleFailed,
    SocketLost,
    StopRequested,
    Stranded,
    TimeExtended,
    TimerKind,
    Untaken,
    WorkerExited,
    WorkerReady,
)
from socketprotector.core.fleet import PHASES, Phase, Policy
from tests.together import together
from tests.unit.conftest import Story

ROOT = Path(__file__).parents[3]
STARTING, SETTLING, SERVING, DRAINING, ABANDONED = Phase

#: How generation 2 gets into each phase; generation 1 serves before it.  Its worker is number 2.
HISTORIES: dict[Phase, list[Event]] = {
    STARTING: [],
    SETTLING: [WorkerReady(2)],
    SERVING: [WorkerReady(2), DeadlinePassed(Deadline(TimerKind.SETTLE, 2))],
    DRAINING: [WorkerReady(2), ChannelBroken(2)],
    ABANDONED: [DeadlinePassed(Deadline(TimerKind.START, 2))],
}

#: What becomes of generation 2 (None: it is gone).  Where a phase is not named it stays.
ANSWERS: list[tuple[Event, dict[Phase, Phase | None]]] = [
    (Launched(), {}),
    (ReloadRequested(), {}),
    (DryRunRequested(), {}),
    (PromoteRequested(), {SETTLING: SERVING}),
    (RollbackRequested(), {STARTING: ABANDONED, SETTLING: DRAINING}),
    (ScaleRequested(+1), {}),
    (ScaleRequested(-1), {}),
    (HoldRequested(3.0), {}),
    (HoldReleased(), {}),
    (LameDuckRequested(True), {}),
    (RenewRequested(), {}),
    (KillRequested(2), {}),
    (ReplaceRequested(2, "too old"), {}),
    (ReplaceRequested(2, "silent", hung=True), {SETTLING: DRAINING}),
    (StopRequested(), {STARTING: ABANDONED, SETTLING: SERVING}),
    (
        StopRequested(quick=True),
        {STARTING: ABANDONED, SETTLING: DRAINING, SERVING: DRAINING},
    ),
    (WorkerReady(2), {STARTING: SETTLING}),
    (
        WorkerExited(2, "exited with status 1"),
        {STARTING: None, SETTLING: None, DRAINING: None, ABANDONED: None},
    ),
    # That nothing could be opened can be known only after a stop has given the start up.
    (OpenFailed(2, "command not found"), {STARTING: None, ABANDONED: None}),
    (Quiesced(2), {}),
    (Answered(2), {STARTING: SETTLING}),
    (SettleFailed(2, "GET /: 500"), {SETTLING: DRAINING}),
    (Untaken(2, "no worker has accepted a connection"), {}),  # a plain reload goes on
    (SocketLost(2), {STARTING: ABANDONED}),
    (Stranded(), {}),
    (HeldClientsWait(), {STARTING: ABANDONED, SETTLING: DRAINING}),
    (HandingOver(), {}),
    (ListenersLost(), {STARTING: ABANDONED, SETTLING: SERVING}),
    (ChannelBroken(2), {STARTING: ABANDONED, SETTLING: DRAINING, SERVING: DRAINING}),
    (TimeExtended(2, 7.0), {}),
    (BacklogEmptied(), {}),
    (SettingsRead(Policy(), 2), {}),
    (SettingsFailed("line 1: not TOML"), {}),
    (DeadlinePassed(Deadline(TimerKind.START, 2)), {STARTING: ABANDONED}),
    (DeadlinePassed(Deadline(TimerKind.SETTLE, 2)), {SETTLING: SERVING}),
    (DeadlinePassed(Deadline(TimerKind.DRAIN, 2)), {}),
    (DeadlinePassed(Deadline(TimerKind.KILL, 2)), {}),
    (DeadlinePassed(Deadline(TimerKind.WORKER_START, 2)), {}),
    (DeadlinePassed(Deadline(TimerKind.WORKER_RESPAWN, 2)), {}),
    (DeadlinePassed(Deadline(TimerKind.WORKER_RETIRE, 2)), {}),
    (DeadlinePassed(Deadline(TimerKind.WORKER_KILL, 2)), {}),
    (DeadlinePassed(Deadline(TimerKind.OPEN)), {}),
    (DeadlinePassed(Deadline(TimerKind.HOLD)), {}),
    (DeadlinePassed(Deadline(TimerKind.LAME_DUCK)), {}),
    (DeadlinePassed(Deadline(TimerKind.LAME_DUCK_IDLE)), {}),
    (DeadlinePassed(Deadline(TimerKind.STOP)), {}),
    (DeadlinePassed(Deadline(TimerKind.TURN)), {}),
]


@together("phase", Phase)
@together(("event", "answers"), ANSWERS)
def test_every_event_is_answered_in_every_phase(
    phase: Phase, event: Event, answers: dict[Phase, Phase | None]
) -> None:
    story = Story()
    story.given_serving(Policy(settle_s=5.0))
    story.and_also(ReloadRequested(), *HISTORIES[phase])
    assert story.numbers(phase) >= {2}

    story.when(event)

    generation = story.fleet.generation(2)
    assert (generation.phase if generation else None) is answers.get(phase, phase)


def test_no_event_is_missing_from_the_answers() -> None:
    events = [event for event, _ in ANSWERS]

    # By name: a class with slots was made twice.
    assert {type(e).__name__ for e in events} == {c.__name__ for c in Event.__subclasses__()}
    assert {e.deadline.wait for e in events if isinstance(e, DeadlinePassed)} == set(TimerKind)


@together("event", [event for event, _ in ANSWERS])
def test_events_about_what_never_was_are_answered_too(event: Event) -> None:
    story = Story()

    story.when(event)

    assert story.fleet.generation(2) is None


@together("phase", Phase)
def test_a_generation_moves_only_along_the_table(phase: Phase) -> None:
    story = Story()
    story.given_serving(Policy(settle_s=5.0))
    story.and_also(ReloadRequested(), *HISTORIES[phase])

    for other in set(Phase) - set(PHASES[phase]):
        with pytest.raises(ValueError, match="generation 2 cannot become"):
            story.fleet.moved(2, other)


def test_the_diagram_in_architecture_md_is_the_one_drawn_from_the_table() -> None:
    command = [sys.executable, str(ROOT / "docs/draw_phases.py")]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    text = (ROOT / "ARCHITECTURE.md").read_text()

    _, begin, rest = text.partition("<!-- phases -->")
    shown, end, _ = rest.partition("<!-- /phases -->")

    assert begin, "ARCHITECTURE.md has no line `<!-- phases -->`"
    assert end, "ARCHITECTURE.md has no line `<!-- /phases -->` after `<!-- phases -->`"
    assert shown.strip() == drawn, (
        "ARCHITECTURE.md shows another diagram of the phases than fleet.PHASES: put what "
        "`python docs/draw_phases.py` prints between its `phases` markers"
    )
