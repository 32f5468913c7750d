"""All that the next program needs to resume where this one stopped, as one value.

Pure data.  The state records these classes by name: a renamed class must still be
read (`renamed` of the codec).

An older program can be started again, too: it leaves out a field that it does not know, but cannot
read a class or a value that it does not know.  So what is new has a field of its own.
"""

from __future__ import annotations

from ..model import settings
from ..model.codec import Codec
from ..model.history import Crash, History, Reload
from ..model.lazy_dataclass import field, frozen
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
from .actions import Report, ReportKind, Retire, Signal, UseSettings, WorkerSignal
from .events import Deadline, TimerKind
from .fleet import Candidate, Fleet, Generation, LameDuck, Next, Phase, State, Stop, Worker

#: What another program has to do that finds it ordered, as the fleet does not tell.
Undone = Signal | Retire | UseSettings


@frozen
class Snapshot:
    """Made of the records that their owners keep; each gets its own back."""

    fleet: Fleet
    settings: SettingsRecord
    unfinished: tuple[Undone, ...] = ()  # ordered; maybe not carried out
    timers: tuple[tuple[Deadline, float], ...] = ()  # and when each runs out
    generations: tuple[GenerationRecord, ...] = ()
    last_good: Program | None = None  # what served last, to be opened again
    workers: tuple[WorkerRecord, ...] = ()
    orphans: tuple[str, ...] = ()  # what failed workers left, told to end: by notify address
    forwarder: ForwarderRecord = field(default_factory=ForwarderRecord)
    steering: SteeringRecord = field(default_factory=SteeringRecord)
    nonblocking: tuple[int, ...] = ()  # see DeliveryRecord
    run: RunRecord = field(default_factory=RunRecord)
    log_level: str = ""  # asked for meanwhile
    version: str = ""  # of the program that wrote this
    unsaid: tuple[Report, ...] = ()  # ordered like what is unfinished

    @property
    def delivery(self) -> DeliveryRecord:
        """What brought clients to workers."""
        return DeliveryRecord(self.forwarder, self.steering, self.nonblocking)


#: All classes that a Snapshot is made of.
CLASSES = (
    *(Deadline, TimerKind, Candidate, Fleet, Generation, LameDuck, Next, Phase, State, Stop),
    *(Worker, Retire, WorkerSignal, Signal, UseSettings, Report, ReportKind),
    *(Program, Counts, GenerationRecord, WorkerRecord, ForwarderRecord, SteeringRecord),
    *(HoldRecord, SettingsRecord, RunRecord, Crash, History, Reload, Snapshot),
    *settings.CLASSES,
)
CODEC = Codec(CLASSES, strict=settings.CLASSES, added=settings.ADDED, said=settings.SAID)
