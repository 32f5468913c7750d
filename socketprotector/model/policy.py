"""What the operator chose about generations and their limits, as one frozen value.

Pure.  Separate from core/fleet.py, which imports events, because an event carries a new policy.
"""

from __future__ import annotations

from . import question
from .lazy_dataclass import frozen

#: A worker (or generation) that served this long has proved itself; its death is not a quick one.
PROVEN_S = 10.0
#: A generation that is ready because it has accepted a connection, and said nothing, is replaced by
#: the one before it if one of its workers dies this soon.
STANDBY_S = 1.0
#: With stop-first no generation serves while the old one drains: never without an end.
STOP_FIRST_DRAIN_S = 30.0


@frozen
class Policy:
    """What the operator chose.  Times in seconds; 0 means no limit where one is named."""

    start_tries: int = 3
    start_timeout_s: float = 60.0
    settle_s: float = 0.0
    drain_timeout_s: float = 0.0
    max_draining: int = 0
    stop_timeout_s: float = 30.0
    kill_timeout_s: float = 5.0
    stop_first: bool = False
    workers_accept: bool = False  # --handoff listener: only they know what they have taken
    ready: str = "notify"  # what says that a worker is ready (settings.py): a failed start names it
    lame_duck_s: float = 0.0  # from a stop's request to the stop; 0: none
    lame_duck_idle_s: float = 0.0  # the stop comes earlier when no client has come for so long
    settle_check: str = ""  # what a settling generation is asked: see question.py; "": nothing

    @property
    def probes(self) -> bool:
        """Whether a generation is asked as a client would ask it, before it gets the first one."""
        return self.ready in question.ASKED

    @property
    def answer_decides(self) -> bool:
        """Whether only the answer makes a generation ready, whatever its workers say."""
        return self.ready in question.KINDS

    @property
    def quiesces(self) -> bool:
        """Whether a replaced generation may have clients that it has not accepted, or read from."""
        return self.workers_accept

    @property
    def has_two_places(self) -> bool:
        """Whether two generations at most can accept, each to the end of its last worker."""
        return self.workers_accept

    @property
    def any_worker_retires(self) -> bool:
        """Whether any worker can be told separately to finish, whatever it has declared."""
        return self.workers_accept

    @property
    def queues(self) -> bool:
        """Whether clients may wait in a generation's queue when its workers are to finish."""
        return not self.workers_accept

    @property
    def drain_limit_s(self) -> float:
        """How long a generation may drain when another replaces it, or will."""
        return self.drain_timeout_s or (STOP_FIRST_DRAIN_S if self.stop_first else 0.0)
