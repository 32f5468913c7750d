"""The events of the lifecycle: facts that happened; and the names of its timers.

Pure data.  An event names generations and workers by number only; what a number
stands for (a process, a channel) is the business of effects.
"""

from __future__ import annotations

from enum import Enum

from ..model.lazy_dataclass import frozen
from ..model.policy import Policy


class TimerKind(Enum):
    """What a deadline is about; the target is a generation's or a worker's number."""

    START = "start"  # generation: all workers ready
    SETTLE = "settle"  # generation: has lived long enough
    DRAIN = "drain"  # generation: last worker gone
    KILL = "kill"  # generation: was sent TERM
    WORKER_START = "worker-start"  # worker: a replacement's READY
    WORKER_RESPAWN = "worker-respawn"  # worker: back-off is over
    WORKER_RETIRE = "worker-retire"  # worker: was asked to leave
    WORKER_KILL = "worker-kill"  # worker: was sent TERM
    OPEN = "open"  # fleet: back-off before the next generation is over
    HOLD = "hold"  # fleet: accepting again
    LAME_DUCK = "lame-duck"  # fleet: balancers know by now, and it stops
    LAME_DUCK_IDLE = "lame-duck-idle"  # fleet: no client has come for so long, so they do
    STOP = "stop"  # fleet: graceful stop takes too long
    TURN = "turn"  # fleet: the loop has turned, so more workers may be started


@frozen
class Deadline:
    """The name of a timer; starting it again replaces it."""

    wait: TimerKind
    target: int = 0


class Event:
    """A fact."""

    __slots__ = ()


@frozen
class Launched(Event):
    """The program stands and may start its first generation."""


@frozen
class ReloadRequested(Event):
    """A reload was requested: a generation of the command as it is now."""


@frozen
class DryRunRequested(Event):
    """The same was requested up to the switch, which is left out."""


@frozen
class StopRequested(Event):
    """A stop was requested; quick: without waiting for what is being served."""

    quick: bool = False


@frozen
class LameDuckRequested(Event):
    """Balancers are to send clients elsewhere, or here again, while all is served as before."""

    on: bool


@frozen
class ScaleRequested(Event):
    """So many workers more (or fewer) were requested; with `to`, so many in all."""

    change: int = 0
    to: int | None = None


@frozen
class HoldRequested(Event):
    """A hold was requested: nothing accepted, and nothing refused, for so long."""

    seconds: float


@frozen
class HoldReleased(Event):
    """The hold is to end before its time."""


@frozen
class RenewRequested(Event):
    """The serving generation is to be replaced by one of the same program."""


@frozen
class KillRequested(Event):
    """A generation on its way out is to be killed, not waited for."""

    generation: int


@frozen
class ReplaceRequested(Event):
    """A worker is to make room for another one: it is too old or large, or was asked for.

    hung: it has stopped saying WATCHDOG=1, so it can be asked for nothing.
    """

    worker: int
    reason: str
    hung: bool = False


@frozen
class WorkerReady(Event):
    """A worker said READY, or its timer said so for it."""

    worker: int
    retires: bool = False


@frozen
class WorkerExited(Event):
    """A worker's process ended, or could not be spawned.

    `served_s`: seconds since its READY, 0 without one.  `waiting`: connections in its
    generation's queue then.  `detached`: ended with status 0 before READY.  `orphans`: what it
    had started lives on; when that has ended it is said again, without.
    """

    worker: int
    reason: str
    served_s: float = 0.0
    waiting: int = 0
    detached: bool = False
    orphans: bool = False


@frozen
class OpenFailed(Event):
    """A generation could not be opened: the command or what it needs is not there."""

    generation: int
    reason: str


@frozen
class Quiesced(Event):
    """A generation whose workers accept has accepted all clients that had come to it."""

    generation: int


@frozen
class Answered(Event):
    """A generation that was asked has answered as it should."""

    generation: int


@frozen
class SettleFailed(Event):
    """What a settling generation was asked shows that it must not go on; reason is for people."""

    generation: int
    reason: str


@frozen
class HandingOver(Event):
    """Another program takes over; an older program may not know of dry runs."""


@frozen
class Stranded(Event):
    """Clients wait where no generation accepts any more."""


@frozen
class HeldClientsWait(Event):
    """Clients of a hold that is over wait at a UNIX path, and each generation has its own socket.

    The next generation accepts them, so no existing generation may be in its way.
    """


@frozen
class SocketLost(Event):
    """A listening socket was replaced, and a generation's workers do not have the new one."""

    generation: int


@frozen
class ListenersLost(Event):
    """The last listener was shut down, and none can be bound instead."""


@frozen
class ChannelBroken(Event):
    """A worker shut down the channel that all of its generation share."""

    generation: int
    served_s: float = 0.0


@frozen
class TimeExtended(Event):
    """A worker asked for more time for what it is doing (EXTEND_TIMEOUT_USEC)."""

    worker: int
    seconds: float


@frozen
class BacklogEmptied(Event):
    """What had connected before the stop is sent; the listeners are closed."""


@frozen
class SettingsRead(Event):
    """The configuration was read again and is valid.  workers: None for as many as before."""

    policy: Policy
    workers: int | None = None


@frozen
class SettingsFailed(Event):
    """The configuration was read again and is not valid; reason is for people."""

    reason: str


@frozen
class DeadlinePassed(Event):
    """A timer ran out; advice: what is known of why nothing came before it did, for people."""

    deadline: Deadline
    advice: str = ""
