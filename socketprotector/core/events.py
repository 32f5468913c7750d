"""The events of the lifecycle (facts that happened), and the names of its timers.

Pure data.  An event names generations and workers by number only; daemon/effects.py knows the
process or channel behind a number.
"""

from __future__ import annotations

from enum import Enum

from ..model.lazy_dataclass import frozen
from ..model.policy import Policy
from ..model.share import Canary


class TimerKind(Enum):
    """A kind of deadline.  Its target is the number of a generation or worker; 0: the fleet."""

    START = "start"  # generation: all workers are ready by then, or it fails
    SETTLE = "settle"  # generation: its stage is over; the next stage or its promotion follows
    DRAIN = "drain"  # generation: all workers have exited by then, or get TERM
    KILL = "kill"  # generation: TERM was sent; KILL follows
    WORKER_START = "worker-start"  # worker: a replacement is ready by then, or gets TERM
    WORKER_RESPAWN = "worker-respawn"  # worker: its back-off is over
    WORKER_RETIRE = "worker-retire"  # worker: it has finished by then, or gets TERM
    WORKER_KILL = "worker-kill"  # worker: TERM was sent; KILL follows
    OPEN = "open"  # fleet: the back-off is over; the next generation opens
    HOLD = "hold"  # fleet: the hold ends
    LAME_DUCK = "lame-duck"  # fleet: by now balancers have noticed the lame duck; the stop begins
    LAME_DUCK_IDLE = "lame-duck-idle"  # fleet: no client has come for a while; the stop begins
    STOP = "stop"  # fleet: a graceful stop, or its wait for a rescue, becomes a quick stop
    TURN = "turn"  # fleet: the event loop has turned: start more workers, continue a stop


@frozen
class Deadline:
    """The name of a timer.  At most one timer of each name runs."""

    wait: TimerKind
    target: int = 0


class Event:
    """One fact."""

    __slots__ = ()


@frozen
class Launched(Event):
    """The resident process is set up and may start its first generation."""


@frozen
class ReloadRequested(Event):
    """A reload was requested: a new generation from the command as it is now.

    canary: the share that the generation gets first, instead of the configured share.
    release: a deploy of this release; "": the release that `current` names.
    """

    canary: Canary | None = None
    release: str = ""


@frozen
class PromoteRequested(Event):
    """An operator ends the current stage of a rollout early.

    now: end all stages.  met: how many connections the new generation has had; None: unknown.
    """

    now: bool = False
    met: int | None = 0


@frozen
class RollbackRequested(Event):
    """An operator calls off the reload under way: the previous generation gets all clients."""


@frozen
class DryRunRequested(Event):
    """A dry run was requested: a reload that ends before its switch.

    release: see ReloadRequested.
    """

    release: str = ""


@frozen
class StopRequested(Event):
    """A stop was requested; quick: without waiting for open connections."""

    quick: bool = False


@frozen
class LameDuckRequested(Event):
    """An operator switched the lame duck on or off.

    While it is on, balancers are asked to send no more clients; serving continues.
    """

    on: bool


@frozen
class ScaleRequested(Event):
    """Another number of workers was requested: `change` more (or fewer), or `to` in all."""

    change: int = 0
    to: int | None = None


@frozen
class HoldRequested(Event):
    """A hold was requested: for this many seconds clients are neither accepted nor refused.

    left_s: how much time a settling generation had left; None: no timer ran.
    """

    seconds: float
    left_s: float | None = None


@frozen
class HoldReleased(Event):
    """An operator ended the hold before its time."""


@frozen
class RenewRequested(Event):
    """A replacement of the serving generation by the last good command was requested."""


@frozen
class KillRequested(Event):
    """An operator requested KILL for a draining or abandoned generation."""

    generation: int


@frozen
class ReplaceRequested(Event):
    """A worker must be replaced: it is too old, too large or stuck, or an operator requested it.

    hung: the worker is stuck (it sent no WATCHDOG=1 in time), so it would not react to a message.
    """

    worker: int
    reason: str
    hung: bool = False


@frozen
class WorkerReady(Event):
    """A worker is ready.

    retires: the worker can be made to finish alone, while the rest of its generation serves.
    alone: the worker has declared that it can finish alone, as workers on the client library do.
    """

    worker: int
    retires: bool = False
    alone: bool = True


@frozen
class WorkerExited(Event):
    """A worker's process ended, or could not be spawned.

    served_s: seconds since its READY; 0 if it was not ready.
    waiting: clients in its generation's queue, or at its generation's sockets, at that moment.
    detached: it exited with status 0 before READY.
    orphans: processes that the worker started still run; when they have ended, a second event
    follows.
    lost: the worker may still serve, but our descriptors of it were lost when the earlier program
    was killed.
    """

    worker: int
    reason: str
    served_s: float = 0.0
    waiting: int = 0
    detached: bool = False
    orphans: bool = False
    lost: bool = False


@frozen
class OpenFailed(Event):
    """A generation could not be opened: the command, or a resource for it, is missing.

    orphans: workers that an earlier program may have started.  Each of these workers is an orphan
    until a WorkerExited event.
    """

    generation: int
    reason: str
    orphans: tuple[int, ...] = ()


@frozen
class Quiesced(Event):
    """A generation without new clients has accepted all earlier clients (see Quiesce)."""

    generation: int


@frozen
class Answered(Event):
    """A generation has passed its probe.

    alone: all of its workers have declared that they can finish alone (see WorkerReady).
    """

    generation: int
    alone: bool = True


@frozen
class SettleFailed(Event):
    """A settling generation has failed its check.  reason: a text for people."""

    generation: int
    reason: str


@frozen
class Untaken(Event):
    """Clients wait for a generation, and its workers have accepted none for too long.

    reason: a text for people.
    """

    generation: int
    reason: str


@frozen
class HandingOver(Event):
    """An upgrade hands over to another program, which may be too old to know of dry runs."""


@frozen
class Stranded(Event):
    """Clients wait at a socket from which no generation accepts, or may come to such a socket."""


@frozen
class HeldClientsWait(Event):
    """After a hold, clients wait at a UNIX path whose generations have their own sockets.

    Only a new generation can accept these clients.  So this generation comes before a reload under
    way, and before a graceful stop.
    """


@frozen
class SocketLost(Event):
    """A listening socket was replaced, and a generation's workers do not have the new socket."""

    generation: int


@frozen
class ListenersLost(Event):
    """The last listener was shut down, and no socket can be bound in its place."""


@frozen
class ChannelBroken(Event):
    """A worker shut down the channel that all workers of its generation share."""

    generation: int
    served_s: float = 0.0


@frozen
class TimeExtended(Event):
    """A worker asked for more time (EXTEND_TIMEOUT_USEC)."""

    worker: int
    seconds: float


@frozen
class BacklogEmptied(Event):
    """All clients from before the stop are delivered, and the listeners are closed."""


@frozen
class SettingsRead(Event):
    """The configuration was read again and is valid.  workers: None for no change."""

    policy: Policy
    workers: int | None = None


@frozen
class SettingsFailed(Event):
    """The configuration was read again and is not valid.  reason: a text for people."""

    reason: str


@frozen
class DeadlinePassed(Event):
    """A timer ran out.

    advice: the likely cause of a start that took too long; "": unknown.
    met: at the end of SETTLE, how many connections the generation has had; None: unknown.
    stuck: at the end of SETTLE, clients wait for the generation, but its workers accept none.
    """

    deadline: Deadline
    advice: str = ""
    met: int | None = 0
    stuck: bool = False
