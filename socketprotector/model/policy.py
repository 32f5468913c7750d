"""The operator's policy for generations and their limits, as one frozen value.

Pure.  This is not in core/fleet.py: fleet.py imports core/events.py, and an event has a policy.
"""

from __future__ import annotations

from .lazy_dataclass import frozen
from .ready_kinds import NEED_ANSWER, PROBED
from .reload_orders import ROLLING, START_FIRST, STOP_FIRST, ReloadOrder
from .share import Canary

#: The death of a worker (or generation) that has served this long is not a quick death.
PROVEN_S = 10.0
#: A generation may be ready only because it has accepted a connection, without any message.  It is
#: rolled back if one of its workers dies this soon.
STANDBY_S = 1.0
#: With stop-first no generation serves while the old one drains, so the drain must have a limit.
STOP_FIRST_DRAIN_S = 30.0


@frozen
class Policy:
    """The operator's policy.  Times in seconds; 0: no limit.  settings.ADDED names newer fields."""

    start_tries: int = 3
    start_timeout_s: float = 60.0
    settle_s: float = 0.0
    drain_timeout_s: float = 0.0
    max_draining: int = 0
    stop_timeout_s: float = 30.0
    kill_timeout_s: float = 5.0
    stop_first: bool = False
    workers_accept: bool = False  # --handoff listener: only workers know what they have accepted
    ready: str = "notify"  # the kind of --ready (settings.py), which a failed start names
    lame_duck_s: float = 0.0  # from a stop's request to the stop; 0: no lame duck
    lame_duck_idle_s: float = 0.0  # the stop comes earlier if no client has come for this long
    settle_check: str = ""  # the check of a settling generation: see probe_spec.py; "": none
    canary: Canary | None = None  # the share that each new release gets first; None: all
    surge: int = 0  # --reload-order rolling: how many workers a reload may add; 0: another order
    surge_is_percent: bool = False  # of the workers, rounded up
    drain_spread_s: float = 0.0  # the time in which workers on the client library end connections
    stop_spread_s: float = 0.0  # the same at a stop

    @property
    def probes(self) -> bool:
        """Whether a new generation is probed before it gets its first client."""
        return self.ready in PROBED

    @property
    def answer_decides(self) -> bool:
        """Whether only the probe's answer makes a generation ready, not its workers' messages."""
        return self.ready in NEED_ANSWER

    @property
    def quiesces(self) -> bool:
        """Whether a replaced generation may have clients that it has not accepted or not read."""
        return self.workers_accept

    @property
    def has_two_places(self) -> bool:
        """Whether only two generations can accept at once, each until its last worker ends."""
        return self.workers_accept

    @property
    def any_worker_retires(self) -> bool:
        """Whether each worker can be made to finish separately, whatever it has declared."""
        return self.workers_accept

    @property
    def queues(self) -> bool:
        """Whether clients may wait in a generation's queue when its workers must finish."""
        return not self.workers_accept

    @property
    def rolls(self) -> bool:
        """Whether a reload replaces the workers a few at a time."""
        return self.surge > 0

    @property
    def spreads(self) -> bool:
        """Whether workers may be ordered to end their connections evenly."""
        return bool(self.drain_spread_s or self.stop_spread_s)

    @property
    def order(self) -> ReloadOrder:
        """The value of --reload-order."""
        return ROLLING if self.rolls else STOP_FIRST if self.stop_first else START_FIRST

    @property
    def surge_text(self) -> str:
        """The value of --surge; "none" under another order."""
        return f"{self.surge}{'%' * self.surge_is_percent}" if self.rolls else "none"

    @property
    def finish_alone(self) -> bool:
        """Whether each worker must use the client library, to finish while others still accept."""
        return self.rolls and self.workers_accept

    @property
    def relies_on_library(self) -> bool:
        """Whether only workers on the client library count clients, and can finish alone."""
        return self.workers_accept

    def surge_of(self, workers: int) -> int:
        """Return how many processes a rolling reload of this many workers may add."""
        return -(-workers * self.surge // 100) if self.surge_is_percent else self.surge

    def spread_part_s(self, leaving: int, workers: int) -> float:
        """Return over how long workers that leave together end their connections at a drain.

        A rolling reload as a whole takes --drain-spread, so each of its steps gets only a part.
        leaving: how many workers leave together.  workers: how many the generation should have.
        """
        if not self.rolls:
            return self.drain_spread_s
        together = max(leaving, self.surge_of(workers))
        return self.drain_spread_s * min(1.0, together / max(1, workers))

    @property
    def drain_limit_s(self) -> float:
        """How long a replaced generation may drain; 0: no limit."""
        return self.drain_timeout_s or (STOP_FIRST_DRAIN_S if self.stop_first else 0.0)
