"""The state from which the next program resumes, as one value.

Pure data.  The state records these classes by name, so a renamed class must still be readable
(`renamed` of the codec).

An older program may read this state, too.  It ignores an unknown field, but cannot read an
unknown class or value.  So new content gets a new field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..model import settings
from ..model.codec import Codec
from ..model.history import Crash, History, Reload
from ..model.lazy_dataclass import field, frozen
from ..model.log_format import LEVELS
from ..model.records import (
    Counts,
    DeliveryRecord,
    ForwarderRecord,
    GenerationRecord,
    HoldRecord,
    Program,
    RunRecord,
    SettingsRecord,
    SteeringRecord,
    WorkerRecord,
)
from .actions import (
    Action,
    Report,
    ReportKind,
    Retire,
    Signal,
    StartTimer,
    UseSettings,
    WorkerSignal,
)
from .events import Deadline, TimerKind
from .fleet import (
    Candidate,
    Fleet,
    Generation,
    LameDuck,
    Next,
    Phase,
    Rollout,
    State,
    Stop,
    Worker,
)

#: Actions that the state must list for the next program, because the fleet does not imply them.
Undone = Signal | Retire | UseSettings


@frozen
class Snapshot:
    """All records of one moment; at recovery each owner gets its own record back."""

    fleet: Fleet
    settings: SettingsRecord
    unfinished: tuple[Undone, ...] = ()  # actions that were ordered; perhaps not carried out
    timers: tuple[tuple[Deadline, float], ...] = ()  # each with the time at which it runs out
    generations: tuple[GenerationRecord, ...] = ()
    last_good: Program | None = None  # the last program that served, for a recovery
    workers: tuple[WorkerRecord, ...] = ()
    #: (a socket's inode, a generation that is gone or has failed, a start): see Leftovers.
    condemned: tuple[tuple[int, int, int], ...] = ()
    orders: tuple[tuple[str, int], ...] = ()  # notify address of a lost worker -> signal to send
    forwarder: ForwarderRecord = field(default_factory=ForwarderRecord)
    steering: SteeringRecord = field(default_factory=SteeringRecord)
    nonblocking: tuple[int, ...] = ()  # see DeliveryRecord
    run: RunRecord = field(default_factory=RunRecord)
    log_level: str = ""  # set by an operator at run time
    version: str = ""  # of the program that wrote this
    unsaid: tuple[Report, ...] = ()  # reports that were ordered; perhaps not made
    current_due: str = ""  # the release to which `current` could not be moved yet
    named_at_begin: str = ""  # the release that `current` named when the last reload began
    left_out: tuple[str, ...] = ()  # descriptors for which the fd store has no room

    @property
    def delivery(self) -> DeliveryRecord:
        """The delivery's records."""
        return DeliveryRecord(self.forwarder, self.steering, self.nonblocking)


def due_after(
    actions: Iterable[Action], running: Mapping[Deadline, tuple[Deadline, float]], now: float
) -> list[tuple[Deadline, float]]:
    """Return when the timers that these actions start or extend will run out.

    running: each timer that runs already, by its deadline, and when it runs out.
    """
    due: dict[Deadline, float] = {}
    for each in actions:
        if isinstance(each, StartTimer):
            ends, deadline = now + each.seconds, each.deadline
            if each.extend:
                ends = max(ends, due.get(deadline) or running.get(deadline, (deadline, ends))[1])
            due[deadline] = ends
    return [*due.items()]


#: All classes that a Snapshot is made of.
CLASSES = (
    *(Deadline, TimerKind, Candidate, Fleet, Generation, LameDuck, Next, Phase, Rollout, State),
    *(Stop, Worker, Retire, WorkerSignal, Signal, UseSettings, Report, ReportKind),
    *(Program, Counts, GenerationRecord, WorkerRecord, ForwarderRecord, SteeringRecord),
    *(HoldRecord, SettingsRecord, RunRecord, Crash, History, Reload, Snapshot),
    *settings.CLASSES,
)
#: `Class.field` of an older program -> the name today.
RENAMED = {"GenerationRecord.marks": "accept_tags"}
CODEC = Codec(
    CLASSES,
    renamed=RENAMED,
    strict=settings.CLASSES,
    added=settings.ADDED,
    said=settings.SAID,
    checks={
        **settings.CHECKS,
        **settings.PROGRAM_CHECKS,
        "Snapshot.log_level": ("", *LEVELS).__contains__,
    },
)
