"""All that the next program needs to go on where this one stopped, as one value.

Pure data.  Its classes are what the state is written in, by name: one that is renamed or gone
must still be read (system/state_file.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from ..model.frozen import frozen
from ..model.history import Crash, History, Reload
from ..model.records import Counts, GenerationRecord, Program, WorkerRecord
from ..model.settings import Identity
from .events import Deadline, Retire, Signal, Wait, WorkerSignal
from .fleet import Candidate, Fleet, Generation, Next, Phase, Policy, State, Stop, Worker


@frozen
class Snapshot:
    """All that a program needs to go on where another one stopped."""

    fleet: Fleet
    generations: tuple[GenerationRecord, ...] = ()
    workers: tuple[WorkerRecord, ...] = ()
    good: Program | None = None
    due: tuple[tuple[Deadline, float], ...] = ()
    undone: tuple[Signal | Retire, ...] = ()  # ordered, and maybe not carried out
    hand: bytes | None = None  # the header of the connection in hand
    hand_number: int = 0  # and which one that is
    aside: tuple[tuple[int, bytes], ...] = ()  # the same of those that are not for the route
    strays: tuple[str, ...] = ()  # what failed workers left, told to end: by notify address
    forwarded: int = 0
    lost: int = 0
    version: str = ""  # of the program that wrote this
    history: History = field(default_factory=History)
    started_at: float = 0.0  # of the first program, in seconds since the epoch
    restarts: int = 0  # programs before the one that wrote this, killed ones and upgraded
    log_level: str = ""  # asked for meanwhile
    settings: str = ""  # as settings.dump() writes them, where a reload has changed them
    coming: str = ""  # the same of those that were read again and are not used yet
    settings_used: int = 0  # as the fleet had it when `settings` were made to hold
    side: int = 0  # to which new clients come
    unserved: tuple[tuple[int, int], ...] = ()  # generations without a socket
    nonblocking: tuple[int, ...] = ()  # of the listeners whose flags others may change: see effects


#: All classes that a Snapshot is made of.
CLASSES = (
    *(Deadline, Wait, Candidate, Fleet, Generation, Next, Phase, Policy, State, Stop, Worker),
    *(Retire, WorkerSignal, Signal),
    *(Identity, Program, Counts, GenerationRecord, WorkerRecord, Snapshot),
    *(Crash, History, Reload),
)
#: What earlier programs called them.
FORMERLY: Mapping[str, type] = {"Sign": WorkerSignal}
