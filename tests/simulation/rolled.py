"""Lives with rollouts: a share of the clients first, or workers that are replaced a few at a time.

Apart from the other lives, so that each of those goes on as it did before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from socketprotector.core.events import PromoteRequested, ReloadRequested, RollbackRequested
from socketprotector.core.fleet import Fleet, Policy
from socketprotector.model.share import WHOLE, Canary
from tests.simulation.handed import Handed
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from socketprotector.daemon.effects import Effects

CANARIES = (Canary(500, 5.0), Canary(5000, 2.0, at_least=3), Canary(1, 1.0), Canary(9999, 20.0))
POLICIES = (
    Policy(),
    Policy(settle_s=5.0),
    Policy(canary=CANARIES[0]),
    Policy(canary=CANARIES[1], settle_s=2.0),
    Policy(canary=CANARIES[3], drain_timeout_s=9.0, max_draining=1),
    Policy(surge=1, drain_timeout_s=9.0),
    Policy(surge=2, drain_timeout_s=9.0, settle_s=5.0),
    Policy(surge=50, surge_is_percent=True, drain_timeout_s=9.0),
)


class Rolled(World):
    """A life whose settings and operators have rollouts."""

    POLICIES = POLICIES

    def _what_happens(self) -> list[tuple[Callable[[], None], int]]:
        return [
            *super()._what_happens(),
            (self._canary, 20),
            (self._promote, 20),
            (self._roll_back, 5),
        ]

    def _canary(self) -> None:
        """A client of the control socket wants a reload with a share first."""
        policy = self._supervisor.fleet.policy if self._supervisor else None
        if policy and not (policy.stop_first or policy.rolls):
            self._request("canary", ReloadRequested(self._random.choice(CANARIES)))

    def _promote(self) -> None:
        now, met = self._chance() < 0.3, self._random.randrange(9)
        self._request("promote", PromoteRequested(now, met))

    def _roll_back(self) -> None:
        self._request("rollback", RollbackRequested())

    def _check_fleet(self, fleet: Fleet, act: Effects) -> None:
        super()._check_fleet(fleet, act)
        sharing = fleet.sharing
        if sharing:
            assert fleet.rollout
            assert 0 < fleet.rollout.share < WHOLE
            assert sharing.ready_workers, "a share, and no worker is ready"
        assert fleet.rollout is None or fleet.is_opening

    def _start(self, *its: Any) -> int:
        """Check the bound at each start of a process, whatever came before it."""
        pid: int = super()._start(*its)
        protector = self._supervisor
        if protector and not (self._starting or protector.fleet.stopping):
            fleet = protector.fleet
            alive = sum(1 for _ in fleet.alive())
            assert not fleet.newest_policy.rolls or alive <= fleet.most_processes, (
                "more processes than allowed"
            )
        return pid


class RolledListener(Rolled, Handed):
    """The same where workers accept: over TCP, which is where the kernel can draw a share."""

    ADDED = ("tcp", "tcp6", "zero")
    KINDS = (*ADDED, "tcp")
    PAIRED = ADDED


#: By --handoff.
ROLLED: dict[str, type[World]] = {"connection": Rolled, "listener": RolledListener}
