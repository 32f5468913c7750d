"""The actions of the lifecycle: decide() orders them, daemon/effects.py carries them out.

Pure data, as events are.
"""

from __future__ import annotations

from enum import Enum

from ..model.lazy_dataclass import frozen
from .events import Deadline


class Action:
    """One order to the effects, the part of the protector that acts (daemon/effects.py)."""

    __slots__ = ()


class WorkerSignal(Enum):
    """A signal that the lifecycle sends to workers, by name."""

    TERM = "TERM"
    ABRT = "ABRT"  # to a stuck worker, which may leave a core dump
    KILL = "KILL"


@frozen
class Open(Action):
    """Make a generation's channel, or (under --handoff listener) prepare its sockets.

    fresh: resolve the command again, instead of using the last good command.
    dry_run: the generation gets no client, and ends when it is ready.
    If the generation cannot be opened, effects skip its Spawns and post OpenFailed.
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
    """Send a signal to a worker.

    KILL, and any signal to an orphaned worker, goes to the whole process group.
    """

    worker: int
    signal: WorkerSignal


@frozen
class Retire(Action):
    """Make a worker finish and exit: by end of file on its RETURN line, or the drain signal."""

    worker: int


@frozen
class Probe(Action):
    """Probe a generation whose workers all run.  When the generation passes, post Answered."""

    generation: int


@frozen
class StopProbing(Action):
    """Stop probing a generation, and discard the probes that its workers have not accepted."""

    generation: int


@frozen
class CheckSettling(Action):
    """Check a settling generation repeatedly.  When a check fails, post SettleFailed.

    When the SETTLE timer runs out, await another good check, then post DeadlinePassed.
    """

    generation: int


@frozen
class StopChecking(Action):
    """Stop checking a settling generation."""

    generation: int


@frozen
class RouteTo(Action):
    """Send new connections to this generation, the route; with None, let them wait.

    sharing: another generation, which gets `share` ten-thousandths of these connections instead.
    """

    generation: int | None
    sharing: int | None = None
    share: int = 0


@frozen
class Quiesce(Action):
    """Wait until a generation that gets no new clients has accepted all earlier clients.

    Then post Quiesced.  Ordered only under --handoff listener.
    """

    generation: int


@frozen
class Drain(Action):
    """Reclaim a generation's waiting connections for the route; then end its channel.

    Without a route reclaim nothing: the generation's own workers serve these connections.
    """

    generation: int


@frozen
class EndEvenly(Action):
    """Let workers on the client library end their connections evenly over some time.

    If an earlier order has an earlier deadline, the earlier order stays in force.
    worker: 0 for all workers of the generation.
    seconds: the time over which the connections end; 0: end no connection.
    """

    generation: int
    worker: int
    seconds: float


@frozen
class Release(Action):
    """Close the descriptors of a generation that is gone; its waiting clients go to the route.

    Without a route, these clients wait for the next route.
    """

    generation: int


@frozen
class Hold(Action):
    """Begin a hold, or end it if `on` is False."""

    on: bool


@frozen
class CloseListeners(Action):
    """Accept no new clients.

    quick: close at once; otherwise first deliver the clients that have connected.
    """

    quick: bool


@frozen
class ReadSettings(Action):
    """Read the configuration again, for the next generation that is opened fresh.

    dry_run: this generation will get no client, not even from added listeners.
    canary: the reload was requested with a canary, which the new settings must allow.
    release: the release to start; "": the release that `current` names, or is to name.
    """

    dry_run: bool = False
    canary: bool = False
    release: str = ""


@frozen
class UseSettings(Action):
    """Apply the newly read settings everywhere; drain the listeners that they no longer name."""


@frozen
class ForgetSettings(Action):
    """Discard the settings that were read or are being read, and their new listeners."""


@frozen
class StartTimer(Action):
    """Run a timer.

    extend: the timer is already running; delay its end if necessary.
    LAME_DUCK_IDLE restarts with each new client.
    """

    deadline: Deadline
    seconds: float
    extend: bool = False


@frozen
class CancelTimer(Action):
    """Cancel a timer."""

    deadline: Deadline


class ReportKind(Enum):
    """A kind of news for the operator, the launching process and systemd."""

    READY = "ready"  # the first generation is serving
    RELOADING = "reloading"
    RELOADED = "reloaded"
    RECOVERED = "recovered"  # the last good command serves again, after a failure or a request
    RELOAD_FAILED = "reload-failed"
    DRY_RUN = "dry-run"  # a dry run begins
    DRY_RUN_PASSED = "dry-run-passed"
    DRY_RUN_FAILED = "dry-run-failed"
    START_FAILED = "start-failed"
    RETRYING = "retrying"
    LAME_DUCK = "lame-duck"  # a stop was requested, and begins after the lame duck
    LAME_DUCK_ON = "lame-duck-on"
    LAME_DUCK_OFF = "lame-duck-off"
    STOPPING = "stopping"
    MANY_DRAINING = "many-draining"
    REFUSED = "refused"
    EXITED = "exited"
    REPLACING = "replacing"
    SCALED = "scaled"
    HELD = "held"
    RELEASED = "released"  # a hold has ended
    BROKEN = "channel-broken"


@frozen
class Report(Action):
    """Report what happened.  reason: a text for people."""

    news: ReportKind
    generation: int = 0
    reason: str = ""


@frozen
class Exit(Action):
    """Exit the resident process: nothing is left to supervise."""

    status: int
