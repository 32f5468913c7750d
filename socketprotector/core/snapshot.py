"""All that the next program needs to resume where this one stopped, as one value.

Pure data.  Its classes are what the state is written in, by name: one that is renamed must still be
read (RENAMED), and so must what is arranged otherwise than before (_from_format_2).

An older program can be started again, too: it leaves out a field that it does not know, but cannot
read a class or a value that it does not know.  So what is new has a field of its own.
"""

from __future__ import annotations

import json
from dataclasses import field

from ..model import settings
from ..model.codec import Codec
from ..model.history import Crash, History, Reload
from ..model.lazy_dataclass import frozen
from ..model.records import (
    Counts,
    ForwarderRecord,
    GenerationRecord,
    HoldRecord,
    Program,
    RunRecord,
    SettingsRecord,
    SteeringRecord,
    WorkerRecord,
)
from .events import (
    Deadline,
    Report,
    ReportKind,
    Retire,
    Signal,
    TimerKind,
    UseSettings,
    WorkerSignal,
)
from .fleet import Candidate, Fleet, Generation, LameDuck, Next, Phase, State, Stop, Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What another program has to do that finds it ordered, as the fleet does not tell.
Undone = Signal | Retire | UseSettings


@frozen
class Snapshot:
    """Made of the records that their owners keep; each gets its own back."""

    fleet: Fleet
    unfinished: tuple[Undone, ...] = ()  # ordered; maybe not carried out
    timers: tuple[tuple[Deadline, float], ...] = ()  # and when each runs out
    generations: tuple[GenerationRecord, ...] = ()
    last_good: Program | None = None  # what served last, to be opened again
    workers: tuple[WorkerRecord, ...] = ()
    orphans: tuple[str, ...] = ()  # what failed workers left, told to end: by notify address
    forwarder: ForwarderRecord = field(default_factory=ForwarderRecord)
    steering: SteeringRecord = field(default_factory=SteeringRecord)
    nonblocking: tuple[int, ...] = ()  # listeners: see daemon/listener_flags.py
    settings: SettingsRecord = field(default_factory=SettingsRecord)
    run: RunRecord = field(default_factory=RunRecord)
    log_level: str = ""  # asked for meanwhile
    version: str = ""  # of the program that wrote this
    unsaid: tuple[Report, ...] = ()  # ordered like what is unfinished


#: All classes that a Snapshot is made of.
CLASSES = (
    *(Deadline, TimerKind, Candidate, Fleet, Generation, LameDuck, Next, Phase, State, Stop),
    *(Worker, Retire, WorkerSignal, Signal, UseSettings, Report, ReportKind),
    *(Program, Counts, GenerationRecord, WorkerRecord, ForwarderRecord, SteeringRecord),
    *(HoldRecord, SettingsRecord, RunRecord, Crash, History, Reload, Snapshot),
    *settings.CLASSES,
)
#: Classes and fields (`Class`, `Class.field`) that an older program calls otherwise.
RENAMED: dict[str, str] = {
    "Sign": "WorkerSignal",
    "Wait": "TimerKind",
    "Signal.sign": "signal",
    "Generation.parting": "quiescing",
    "GenerationRecord.side": "socket_number",
    "WorkerRecord.mark": "output_start",
    "WorkerRecord.told_to_go": "asked_to_exit",
    "Snapshot.undone": "unfinished",
    "Snapshot.due": "timers",
    "Snapshot.good": "last_good",
    "Snapshot.strays": "orphans",
    **settings.RENAMED,
}
#: What a snapshot of format 2 has side by side: the record that it is in now, and its name there.
_GROUPED = {
    "forwarded": ("forwarder", "forwarded"),
    "lost": ("forwarder", "lost"),
    "hand": ("forwarder", "pending"),
    "hand_number": ("forwarder", "number"),
    "aside": ("forwarder", "parked"),
    "side": ("steering", "socket_number"),
    "unserved": ("steering", "unserved"),
    "settings": ("settings", "current"),
    "coming": ("settings", "candidate"),
    "started_at": ("run", "started_at"),
    "restarts": ("run", "restarts"),
    "history": ("run", "history"),
}
_RECORDS = {
    "forwarder": "ForwarderRecord",
    "steering": "SteeringRecord",
    "settings": "SettingsRecord",
    "run": "RunRecord",
}


def _from_format_2(written: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a snapshot that an older program may have written, grouped as now."""
    if not written.keys().isdisjoint(_RECORDS.keys() - _GROUPED.keys()):
        return written  # it has records
    found = {name: value for name, value in written.items() if name not in _GROUPED}
    for record, kind in _RECORDS.items():
        found[record] = {"c": kind, "f": {}}
    for name in written.keys() & _GROUPED.keys():
        record, called = _GROUPED[name]
        value = written[name]
        if record == "settings":  # text in the text
            value = settings.from_format_2(json.loads(value)) if value else None
        found[record]["f"][called] = value
    # It counted how often the fleet had come to others, and how often they were made to hold.
    if written["fleet"]["f"].get("settings_used", 0) > written.get("settings_used", 0):
        found["undone"] = [*written.get("undone", ()), {"c": "UseSettings", "f": {}}]
    return found


CODEC = Codec(
    CLASSES,
    renamed=RENAMED,
    rearranged={"Snapshot": _from_format_2},
    strict=settings.CLASSES,
    added=settings.ADDED,
    said=settings.SAID,
)
