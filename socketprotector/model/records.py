"""The records of programs, generations and workers, as values that outlive the resident process.

Pure data, without descriptors, which the next program finds by name.
Times are CLOCK_MONOTONIC seconds, valid until a reboot, unless a comment says otherwise.
"""

from __future__ import annotations

from socketprotector_client import wire

from .handoff_modes import MODES, HandoffMode
from .history import History
from .lazy_dataclass import field, frozen
from .ready_kinds import PROBED
from .settings import Identity, Settings


@frozen
class Program:
    """A fully resolved command, which each new worker executes, and a generation's settings.

    Here each generation keeps the settings that a later reload must not change for it.
    """

    path: str
    argv: tuple[str, ...]
    directory: str
    environment: tuple[tuple[str, str], ...]
    umask: int
    limits: tuple[tuple[str, int], ...]
    nice: int
    identity: Identity | None = None  # the user to run as; None: the protector's
    batch: bool = False  # the caller's scheduling policy was SCHED_BATCH
    listeners: str = ""  # the addresses in its environment; its workers know no others
    handoff: str = "connection"
    ready: str = "notify"
    ready_after_s: float | None = None
    ready_fd: int = -1
    ready_check: str = ""
    ready_question: str = ""
    settle_check: str = ""
    drain_signal: int = 15
    watchdog_s: float = 0.0
    release: str = ""  # its name; "": there are no releases
    drain_spread_s: float = 0.0
    stop_spread_s: float = 0.0

    @property
    def spreads(self) -> bool:
        """Whether workers may have to end their connections evenly; their environment says so."""
        return bool(self.drain_spread_s or self.stop_spread_s)

    @property
    def mode(self) -> HandoffMode:
        """How connections reach its workers."""
        return MODES[self.handoff]

    @property
    def finish_signal(self) -> int:
        """The signal that makes a worker finish; 0: none, the worker reads end of file."""
        return self.drain_signal if self.mode.workers_accept else 0

    @property
    def is_probed(self) -> bool:
        """Whether a new generation is probed before it gets its first client."""
        return self.ready in PROBED


@frozen
class Counts:
    """The workers' counts of their connections."""

    accepted: int = 0
    active: int = 0
    errors: int = 0
    waits: tuple[int, ...] = (0,) * wire.BOARD_WAIT_WORDS  # see docs/protocol.md

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.accepted + other.accepted,
            self.active + other.active,
            self.errors + other.errors,
            tuple(mine + theirs for mine, theirs in zip(self.waits, other.waits, strict=True)),
        )


#: How many failed first programs of --handoff stdio prove that the command does not work.
NO_ACCIDENT = 3


@frozen
class GenerationRecord:
    """An open generation, or a released generation whose queue still has connections."""

    number: int
    program: Program
    knows: frozenset[int] | None = None  # the listeners that its workers know, by index; None: all
    serving_since: float = 0.0
    ended: bool = False  # no more clients are sent: its workers read end of file or got a signal
    released: bool = False
    opened_at: float = 0.0  # this and the next two: seconds since the epoch, for people
    served_at: float | None = None
    drained_at: float | None = None
    past: Counts | None = None  # the counts of ended workers
    lost: int = 0  # connections that were open in workers that ended
    probes: int | None = None  # how many probes its workers accepted; None: no client may come yet
    socket_number: int = 0  # the socket from which its workers accept: see delivery/shared/
    accept_tags: tuple[tuple[int, int], ...] = ()  # by listener's index; empty: unknown
    start: int = 0  # no worker is older: see process.boot_ticks(); 0: unknown
    # For --handoff stdio: whether a program has worked.  Until then: how many programs failed
    # early, how the last of them ended, and its last output.
    programs_work: bool = False
    programs_failed: int = 0
    program_ended: str = ""
    program_words: str = ""

    @property
    def never_works(self) -> bool:
        """Whether the first NO_ACCIDENT programs have failed, and no program has worked."""
        return self.programs_failed >= NO_ACCIDENT

    @property
    def programs_fail(self) -> str:
        """How the first programs have failed, in words; "" if none has failed."""
        count = self.programs_failed
        which = "first program" if count == 1 else f"first {count} programs"
        last = "" if count == 1 else "the last "
        return f"its {which} failed early: {last}{self.program_ended}" if count else ""


@frozen
class WorkerRecord:
    """A worker's process, and the messages that it has sent."""

    number: int
    generation: int
    pid: int
    output_start: int  # the log file's size at the worker's start; -1: unknown, or shared
    ready_at: float | None = None
    slot: int = 0
    started_at: float = 0.0  # seconds since the epoch, for people
    asked_to_exit: bool = False
    watched: bool = False  # it has sent WATCHDOG=1
    status: str = ""
    aborted: bool = False  # it got ABRT because it was stuck; its end is a crash
    ready_by: str = ""  # the kind of message or event that made it ready
    orphaned: bool = False  # its process has ended; processes that it started are supervised
    killed: bool = False  # its process group got KILL
    retires: bool = False  # it finishes when its RETURN line ends
    start: int = 0  # it is not older: see process.boot_ticks(); 0: unknown


@frozen
class ForwarderRecord:
    """The counts of forwarded connections, and the accepted connections that are in no channel."""

    forwarded: int = 0
    lost: int = 0
    pending: bytes | None = None  # the header of the connection whose send failed
    number: int = 0  # the highest connection number so far; a pending connection has this number
    parked: tuple[tuple[int, bytes], ...] = ()  # (number, header) of connections that await a drain
    shared: int = 0  # how many connections were counted for the share of a canary
    met: tuple[tuple[int, int], ...] = ()  # (generation, how many new connections it has got)


@frozen
class HoldRecord:
    """A hold in a mode in which workers accept, and how long its clients keep trying to connect."""

    began_at: float = 0.0  # 0: there is no hold
    tried_until: float = 0.0  # clients of this hold or an earlier hold try until this time


#: A listener, and the user, group, mode and access list (in hex) of its path's files.
RightsRecord = tuple[int, int, int, int, str]


@frozen
class SteeringRecord:
    """Which socket of each address gets new clients, and which generations lack a socket."""

    socket_number: int = 0
    unserved: tuple[tuple[int, int], ...] = ()  # (generation, listener for which it has no socket)
    #: (a candidate's listener, the number of the socket that gets its clients).
    expected: tuple[tuple[int, int], ...] = ()
    #: (finishing generation, its socket's number, the time when it began to finish).
    leaving: tuple[tuple[int, int, float], ...] = ()
    hold: HoldRecord = field(default_factory=HoldRecord)
    #: (listener, socket): over IPv6, only probes wait at that socket.
    asked: tuple[tuple[int, int], ...] = ()
    asked_from: tuple[tuple[int, int, str], ...] = ()  # the same with the origin of IPv4 probes
    #: (generation (0: none yet), listener, the options that its socket had).
    options: tuple[tuple[int, int, str], ...] = ()
    partly_served: tuple[tuple[int, int], ...] = ()  # unserved pairs whose later workers can serve
    lost: tuple[int, ...] = ()  # listeners whose clients come to the other socket: see Turns
    #: (listener, its group's members in two orders): see system/reuseport_group.py.
    groups: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = ()
    rights: tuple[RightsRecord, ...] = ()


@frozen
class DeliveryRecord:
    """The records for the next program's delivery; the state stores each in its own field.

    So a field here is also a field of Snapshot, part of Snapshot.delivery, and filled by
    Effects.snapshot().
    """

    forwarder: ForwarderRecord = field(default_factory=ForwarderRecord)
    steering: SteeringRecord = field(default_factory=SteeringRecord)
    nonblocking: tuple[int, ...] = ()  # listeners: see delivery/shared/listener_flags.py


@frozen
class SettingsRecord:
    """The current settings, and the candidate of a reload."""

    current: Settings
    candidate: Settings | None = None  # read by a reload; no generation has served with them


@frozen
class RunRecord:
    """The run of an instance, over all its resident processes, for people."""

    started_at: float = 0.0  # the first program's start, in seconds since the epoch
    restarts: int = 0  # the number of earlier programs, upgraded or killed
    history: History = field(default_factory=History)
