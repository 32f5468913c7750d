"""The actions of the lifecycle: orders that decide() gives, and effects carry out.

Pure data, as events are.
"""

from __future__ import annotations

from enum import Enum

from ..model.lazy_dataclass import frozen
from .events import Deadline


class Action:
    """An order."""

    __slots__ = ()


class WorkerSignal(Enum):
    """The signals the lifecycle sends to workers, by name."""

    TERM = "TERM"
    ABRT = "ABRT"  # to a stuck worker: it may leave a core dump
    KILL = "KILL"


@frozen
class Open(Action):
    """Make a generation's channel; fresh: resolve the command again, not the last good.

    dry_run: it is to get no client, and is ended when it is ready.
    Where this cannot be done its Spawns are left out, and OpenFailed is the answer.
    """

    generation: int
    fresh: bool
    dry_run: bool = False


@frozen
class Spawn(Action):
    """Start a worker's process in an open generation."""

    generation: int
    worker: int
    slot: int


@frozen
class Signal(Action):
    """Send a signal to a worker; KILL, and any to an orphaned one, to its whole process group."""

    worker: int
    signal: WorkerSignal


@frozen
class Retire(Action):
    """Make a worker finish: by the end of its RETURN line, or by the signal of its handoff."""

    worker: int


@frozen
class Ask(Action):
    """Ask a generation, all of whose workers live, until it answers: `Answered`."""

    generation: int


@frozen
class StopAsking(Action):
    """Ask a generation no more; what it was asked and has not taken is forgotten."""

    generation: int


@frozen
class CheckSettling(Action):
    """Ask a generation that settles again and again, until a bad answer: `SettleFailed`.

    The time of SETTLE is over only once a good one has come after it.
    """

    generation: int


@frozen
class StopChecking(Action):
    """Ask that no more."""

    generation: int


@frozen
class RouteTo(Action):
    """Give new connections to this generation; None: hold them."""

    generation: int | None


@frozen
class Quiesce(Action):
    """Wait until a generation without new clients has accepted all that came: `Quiesced`."""

    generation: int


@frozen
class Drain(Action):
    """Reclaim what this generation has not taken, for the route; then end its channel.

    Without a route nothing is reclaimed: its workers finish it.
    """

    generation: int


@frozen
class Release(Action):
    """Close what a generation that is gone has left; what still waits goes to the route.

    Without a route it is held until there is one.
    """

    generation: int


@frozen
class Hold(Action):
    """Accept nothing from now on, or go on accepting."""

    on: bool


@frozen
class CloseListeners(Action):
    """Take no new clients; quick: close at once, else first send on what has connected."""

    quick: bool


@frozen
class ReadSettings(Action):
    """Read the configuration again, for generations that are opened fresh later.

    dry_run: that will get no client, of listeners that are added neither.
    """

    dry_run: bool = False


@frozen
class UseSettings(Action):
    """What was read holds from now on for everything; listeners that it lacks are drained."""


@frozen
class ForgetSettings(Action):
    """Discard the settings that were read or are being read, and their new listeners."""


@frozen
class StartTimer(Action):
    """Run a timer; with `extend` (of one that runs) an earlier end is moved, a later one stays.

    LAME_DUCK_IDLE restarts with each new client.
    """

    deadline: Deadline
    seconds: float
    extend: bool = False


@frozen
class CancelTimer(Action):
    """Forget a timer."""

    deadline: Deadline


class ReportKind(Enum):
    """What a Report announces to the operator, the launching process and systemd."""

    READY = "ready"  # the first generation serves
    RELOADING = "reloading"
    RELOADED = "reloaded"
    RECOVERED = "recovered"  # the last good command serves again, after something failed
    RELOAD_FAILED = "reload-failed"
    DRY_RUN = "dry-run"  # it begins
    DRY_RUN_PASSED = "dry-run-passed"
    DRY_RUN_FAILED = "dry-run-failed"
    START_FAILED = "start-failed"
    RETRYING = "retrying"
    LAME_DUCK = "lame-duck"  # a stop was requested, and begins later
    LAME_DUCK_ON = "lame-duck-on"
    LAME_DUCK_OFF = "lame-duck-off"
    STOPPING = "stopping"
    MANY_DRAINING = "many-draining"
    REFUSED = "refused"
    EXITED = "exited"
    REPLACING = "replacing"
    SCALED = "scaled"
    HELD = "held"
    RELEASED = "released"
    BROKEN = "channel-broken"


@frozen
class Report(Action):
    """Tell what happened; reason is for people."""

    news: ReportKind
    generation: int = 0
    reason: str = ""


@frozen
class Exit(Action):
    """The last action: nothing is left to supervise."""

    status: int
