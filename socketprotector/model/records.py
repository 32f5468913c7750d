"""The records of programs, generations and workers, as values that can outlive the program.

Pure data.  Descriptors are not in here: they have names under which the next program finds them
again.  Times are CLOCK_MONOTONIC seconds where nothing else is said: they hold until a reboot.
"""

from __future__ import annotations

from socketprotector_client import wire

from .handoff_modes import MODES, HandoffMode
from .history import History
from .lazy_dataclass import field, frozen
from .settings import Identity, Settings


@frozen
class Program:
    """What to execute, wholly resolved: the same again for a respawn."""

    path: str
    argv: tuple[str, ...]
    directory: str
    environment: tuple[tuple[str, str], ...]
    umask: int
    limits: tuple[tuple[str, int], ...]
    nice: int
    identity: Identity | None = None  # the user to run as, if not ours
    batch: bool = False  # the scheduling policy that the caller had (SCHED_BATCH)
    listeners: str = ""  # as the environment tells them; those are all that it ever knows of
    handoff: str = "connection"
    ready: str = "notify"
    ready_after_s: float | None = None
    ready_fd: int = -1
    ready_check: str = ""
    ready_question: str = ""
    settle_check: str = ""
    drain_signal: int = 15
    watchdog_s: float = 0.0

    @property
    def mode(self) -> HandoffMode:
        """How connections reach its workers."""
        return MODES[self.handoff]

    @property
    def finish_signal(self) -> int:
        """What has a worker finish; 0: no signal, it reads end of file."""
        return self.drain_signal if self.mode.workers_accept else 0


@frozen
class Counts:
    """What workers have counted of their connections."""

    accepted: int = 0
    active: int = 0
    errors: int = 0
    waits: tuple[int, ...] = (0,) * wire.BOARD_WAIT_WORDS  # see docs/protocol.md

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.accepted + other.accepted,
            self.active + other.active,
            self.errors + other.errors,
            tuple(one + another for one, another in zip(self.waits, other.waits, strict=True)),
        )


#: So many first programs, as --handoff stdio runs them.
NO_ACCIDENT = 3


@frozen
class GenerationRecord:
    """An open generation, or one that is released and not yet empty."""

    number: int
    program: Program
    serving_since: float = 0.0
    ended: bool = False  # its workers get no more: they read end of file, or were told to finish
    released: bool = False
    opened_at: float = 0.0  # these three in seconds since the epoch, for people
    served_at: float | None = None
    drained_at: float | None = None
    past: Counts | None = None  # of workers that have ended
    lost: int = 0  # connections that were open in those
    socket_number: int = 0  # where its workers accept, if they do: see delivery/shared/
    marks: tuple[tuple[int, int], ...] = ()  # of what they accept, by listener; none: unknown
    # Of --handoff stdio: whether a program has worked; until then how many failed at once, how the
    # last of them ended, and what was its last output.
    programs_work: bool = False
    programs_failed: int = 0
    program_ended: str = ""
    program_words: str = ""

    @property
    def never_works(self) -> bool:
        """Whether so many of its first programs have failed, and none has worked: no accident."""
        return self.programs_failed >= NO_ACCIDENT

    @property
    def programs_fail(self) -> str:
        """How the first programs have failed, in words; "": they have not."""
        count = self.programs_failed
        which = "first program" if count == 1 else f"first {count} programs"
        last = "" if count == 1 else "the last "
        return f"its {which} failed at once: {last}{self.program_ended}" if count else ""


@frozen
class WorkerRecord:
    """A worker's process and what it has said."""

    number: int
    generation: int
    pid: int
    output_start: int  # where the output stood when it began; -1: others have written since
    ready_at: float | None = None
    slot: int = 0
    started_at: float = 0.0  # seconds since the epoch, for people
    asked_to_exit: bool = False
    watched: bool = False  # it has said WATCHDOG=1
    status: str = ""
    aborted: bool = False  # it hung, so its end was not asked for
    ready_by: str = ""  # what said that it is ready
    orphaned: bool = False  # its process has ended; what that has left is looked after
    killed: bool = False  # its process group was sent KILL
    retires: bool = False  # it leaves when its RETURN line ends


@frozen
class ForwarderRecord:
    """What was forwarded, and the connections that were accepted and are in no channel."""

    forwarded: int = 0
    lost: int = 0
    pending: bytes | None = None  # the header of the one whose send failed
    number: int = 0  # the highest that was ever used; that of the pending one, if there is one
    parked: tuple[tuple[int, bytes], ...] = ()  # numbers and headers of those not for the route


@frozen
class HoldRecord:
    """A hold where workers accept, and those that it has kept out."""

    began_at: float = 0.0  # 0: there is none
    tried_until: float = 0.0  # clients of this one, or of one before, try to connect until then


@frozen
class SteeringRecord:
    """Which socket of each address gets new clients, and which generations lack one."""

    socket_number: int = 0
    unserved: tuple[tuple[int, int], ...] = ()  # a generation, and a listener without its socket
    expected: tuple[
        tuple[int, int], ...
    ] = ()  # a listener of a candidate, and where its clients go
    leaving: tuple[tuple[int, int, float], ...] = ()  # told to finish: with its socket, and when
    hold: HoldRecord = field(default_factory=HoldRecord)
    asked: tuple[
        tuple[int, int], ...
    ] = ()  # listeners and sockets: questions by IPv6 alone wait there
    asked_from: tuple[tuple[int, int, str], ...] = ()  # of IPv4: from where they come
    #: A generation (0: none yet), a listener, and its socket's options then.
    options: tuple[tuple[int, int, str], ...] = ()
    partly_served: tuple[tuple[int, int], ...] = ()  # of the unserved: later workers have it
    lost: tuple[int, ...] = ()  # listeners whose clients come to the other socket: see Turns


@frozen
class DeliveryRecord:
    """What the next program's delivery has to know; the state has each of these by itself."""

    forwarder: ForwarderRecord = field(default_factory=ForwarderRecord)
    steering: SteeringRecord = field(default_factory=SteeringRecord)
    nonblocking: tuple[int, ...] = ()  # listeners: see delivery/shared/listener_flags.py


@frozen
class SettingsRecord:
    """The settings that hold, and those that are tried."""

    current: Settings
    candidate: Settings | None = None  # read again, and not used yet


@frozen
class RunRecord:
    """What outlives the programs that follow each other, for people."""

    started_at: float = 0.0  # of the first program, in seconds since the epoch
    restarts: int = 0  # programs before this one, killed ones and upgraded
    history: History = field(default_factory=History)
