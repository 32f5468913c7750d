"""Lives with rollouts: a share of the clients first, or workers that are replaced a few at a time.

Apart from the other lives, so that each of those goes on as it did before.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from socketprotector.core import rollout
from socketprotector.core.events import (
    Deadline,
    PromoteRequested,
    ReloadRequested,
    RollbackRequested,
    TimerKind,
)
from socketprotector.core.fleet import LEAVING, Fleet, Phase, Policy, State
from socketprotector.model.share import WHOLE, Canary
from tests.simulation.each_step import STRUCK, ListenerStory, Story
from tests.simulation.handed import Handed, steering_of
from tests.simulation.world import World, forwarder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from socketprotector.daemon.effects import Effects
    from socketprotector.model.settings import Settings
    from socketprotector.system.channel import Channel
    from tests.simulation.files import Connection
    from tests.simulation.handed import Leader
    from tests.simulation.kernel import End

CANARIES = (Canary(500, 5.0), Canary(5000, 2.0, at_least=3), Canary(1, 1.0), Canary(9999, 20.0))
POLICIES = (
    Policy(),
    Policy(settle_s=5.0),
    Policy(canary=CANARIES[0]),
    Policy(canary=CANARIES[1], settle_s=2.0),
    Policy(canary=CANARIES[3], drain_timeout_s=9.0, max_draining=1),
    Policy(surge=1, drain_timeout_s=9.0),
    Policy(surge=1, drain_timeout_s=30.0, max_draining=1),
    Policy(surge=2, drain_timeout_s=9.0, settle_s=5.0),
    Policy(surge=50, surge_is_percent=True, drain_timeout_s=9.0),
)
RETIRES = b"\nX_SOCKETPROTECTOR_RETIRE=1"


def stage_of(fleet: Fleet) -> str:
    """Return in which stage of a rollout it is, as words for people."""
    incoming = fleet.incoming
    if incoming is not None and incoming.phase is Phase.SETTLING and not fleet.of(Phase.SERVING):
        return "none"  # the old generation broke: there is none to go back to
    if fleet.rollout is None or incoming is None:
        rolls = fleet.newest_policy.rolls and fleet.of(Phase.SERVING)
        return "rolling: first starts" if incoming and rolls else "none"
    settles = Deadline(TimerKind.SETTLE, incoming.number) in fleet.timers
    if fleet.rollout.canary:
        if incoming.phase is Phase.STARTING:
            return "canary: starts"
        return "canary: share" if fleet.rollout.share < WHOLE else "canary: all clients"
    return "rolling: first settles" if settles else "rolling: the others"


class Rolled(World):
    """A life whose settings and operators have rollouts."""

    POLICIES = POLICIES

    def _choose(self, pick: Callable[[Any], Any]) -> Settings:
        self._came_for: Counter[int] = Counter()  # clients, by canary, when all goes well
        self._stage = "none"
        found = super()._choose(pick)
        return replace(found, workers=found.workers + pick((0, 1, 2)))

    def _what_happens(self) -> list[tuple[Callable[[], None], int]]:
        return [
            *super()._what_happens(),
            (self._become_ready, 200),  # else most reloads fail before they have a stage
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

    def _all_do_well(self) -> None:
        """As many clients come as a canary needs."""
        fleet = self._supervisor.fleet if self._supervisor else None
        sharing = fleet.sharing if fleet else None
        canary = fleet.rollout.canary if fleet and fleet.rollout else None
        if self._calm and sharing and canary and self._came_for[sharing.number] < canary.at_least:
            for _ in range(8 * canary.at_least):
                self._connect()
            self._came_for[sharing.number] += canary.at_least
        super()._all_do_well()

    # -- how often what was tried ------------------------------------------------------

    def _after_kill(self) -> dict[str, int]:
        if self._supervisor is not None:
            self.events[f"{STRUCK}{stage_of(self._supervisor.fleet)}"] += 1
        return super()._after_kill()

    def _after_exec(self, descriptors: dict[str, int]) -> dict[str, int]:
        if self._supervisor is not None:
            self.events[f"upgraded in {stage_of(self._supervisor.fleet)}"] += 1
        return super()._after_exec(descriptors)

    def _said(self, event: str, fields: Mapping[str, Any]) -> None:
        super()._said(event, fields)
        if event in ("reloaded", "reload-failed"):
            self.events[f"{event} after {self._stage}"] += 1
        stops = self._supervisor is not None and bool(self._supervisor.fleet.stopping)
        if event == "reloaded" and self._stage != "none":
            assert not stops, "a stop ends a rollout unproved, and it is called a success"

    # -- what must hold ----------------------------------------------------------------

    def _check_fleet(self, fleet: Fleet, act: Effects) -> None:
        super()._check_fleet(fleet, act)
        if self._stage != (stage := stage_of(fleet)):
            self._stage = stage
            self.events[stage] += 1
        assert fleet.rollout is None or fleet.is_opening
        settling, serving = fleet.of(Phase.SETTLING), fleet.of(Phase.SERVING)
        assert not (fleet.stopping and fleet.rollout and settling), "a rollout goes on in a stop"
        if fleet.sharing and fleet.rollout and serving:
            assert 0 < fleet.rollout.share < WHOLE
            assert fleet.sharing.ready_workers, "a share, and no worker is ready"
            staying = [each for each in serving.workers if each.state not in LEAVING]
            assert staying, "a rollback is impossible: no worker of the old generation stays"
            is_turn_over = Deadline(TimerKind.TURN) not in fleet.timers
            if stage == "rolling: the others" and is_turn_over:
                new, old = fleet.sharing.ready_workers, serving.ready_workers
                asked = min(max(1, WHOLE * new // (new + old)), WHOLE - 1)
                assert fleet.rollout.share == asked, "another share than that of ready workers"
        self._check_share(fleet, act)

    def _check_share(self, fleet: Fleet, act: Effects) -> None:
        """Those who deliver share as the fleet says."""
        forwarder = forwarder_of(act)
        if forwarder is None:
            return
        canary = forwarder._canary
        channel = canary.channel if canary is not None else None
        has = channel.generation.record.number if channel is not None else 0
        sharing = fleet.sharing
        assert has == (sharing.number if sharing else 0), f"generation {has} has a share"
        if sharing and canary is not None and fleet.rollout:
            assert canary._share == fleet.rollout.share

    def _sent(self, connection: Connection, end: End) -> None:
        """None is sent to a generation that has neither the route nor a share."""
        super()._sent(connection, end)
        act = self._supervisor.effects if self._supervisor is not None else None
        forwarder = forwarder_of(act) if act is not None else None
        if forwarder is None or self._starting or connection.excuse:
            return
        canary, route = forwarder._canary, forwarder.outlet.route
        # What waits at a listener that is removed goes to those who know it.
        channels: list[Channel | None] = [each.channel for each in forwarder._drains._draining]
        channels += [route, canary.channel if canary is not None else None]
        fds = (each.write.fileno() for each in channels if each is not None)
        ends = [self.kernel.file(fd) for fd in fds if fd >= 0]
        is_back = connection.source is end.peer
        assert is_back or end in ends, f"{connection} is sent to a generation without clients"

    def _start(self, *its: Any) -> int:
        """Check the bound at each start of a process, whatever came before it."""
        pid: int = super()._start(*its)
        protector = self._supervisor
        if protector and protector.fleet.newest_policy.rolls:
            counted, most = len(self._counted(protector.fleet)), protector.fleet.most_processes
            excused = counted <= most or _starts_first(protector.fleet)
            assert excused, f"{counted} processes live, and {most} may"
            self.events["at the bound"] += counted == most
        return pid

    def _counted(self, fleet: Fleet) -> set[str]:
        """Return what lives, with what a killed program had begun to start."""
        return {
            leader.address
            for leader in self.workers
            if any(not each.ended for each in self._group_of(leader))
        }


def _starts_first(fleet: Fleet) -> bool:
    """Whether a worker starts without which clients would find none, so no bound holds."""
    for generation in fleet.generations:
        match generation.phase:
            case Phase.STARTING:
                may_rescue = not generation.fresh and fleet.policy.workers_accept
                waited_for = may_rescue or fleet.of(Phase.SERVING) is None
            case Phase.DRAINING:
                waited_for = fleet.queue_is_last
            case phase:
                waited_for = phase is Phase.SERVING
        useful = [worker for worker in generation.staying if not worker.hung]
        if waited_for and [worker.state for worker in useful] == [State.STARTING]:
            return True
    return False


class RolledListener(Rolled, Handed):
    """The same where workers accept: over TCP, which is where the kernel can draw a share."""

    ADDED = ("tcp", "tcp6", "zero")
    KINDS = (*ADDED, "tcp")
    PAIRED = ADDED

    def _choose(self, pick: Callable[[Any], Any]) -> Settings:
        found = super()._choose(pick)
        #: All workers are on the library: else no rolling reload succeeds.
        self._on_library = random.Random(f"library {self.seed}").random() < 0.8
        if self._on_library:
            self._rude = self._masters = 0.0
            found = replace(found, ready_after_s=None)
        return found

    def _say_ready(self, worker: Any, more: bytes = b"") -> bool:
        return super()._say_ready(worker, RETIRES if self._on_library else more)

    def _said(self, event: str, fields: Mapping[str, Any]) -> None:
        super()._said(event, fields)
        if event == "reload-failed" and fields["reason"] in (
            rollout.NO_LIBRARY,
            rollout.NO_COUNTS,
        ):
            self._crowded = True  # each reload would fail in the same way

    def _check_share(self, fleet: Fleet, act: Effects) -> None:
        steering = steering_of(act)
        share, sharing = steering.turns.share, fleet.sharing
        has = share.generation if share is not None else 0
        assert has == (sharing.number if sharing else 0), f"generation {has} has a share"
        if share is not None and fleet.rollout:
            assert share.part == fleet.rollout.share
        if not steering.is_steered or steering.hold.on:
            return
        for its in act.delivery.listeners:
            address = self._at(its.settings.address)
            if address.disturbed or its.lost:
                continue
            wanted = steering.turns.share_of(its)
            assert address.share == wanted, f"{address.name} shares {address.share}, not {wanted}"

    def _check_told(self, leader: Leader) -> None:
        """None is told to finish while a share of the clients goes to its generation."""
        super()._check_told(leader)
        protector = self._supervisor
        if protector is None or self._starting or self._reason() == "quick stop":
            return
        generation = protector.fleet.generation(leader.generation)
        if generation is None or generation.phase is not Phase.DRAINING:
            return
        share = steering_of(protector.effects).turns.share
        assert share is None or share.generation != generation.number, "it is told with a share"


class RolledStory(Story, Rolled):
    """A story of rollouts: the protector is killed, and each of its calls fails, in each stage."""

    def _acts_by_name(self) -> dict[str, tuple[Callable[[], None], int]]:
        promoted = partial(self._request, "promote", PromoteRequested())
        return super()._acts_by_name() | {
            "canary": (self._canary, 6),
            "promote": (promoted, 4),
            "promote now": (partial(self._request, "promote", PromoteRequested(now=True)), 1),
            "rollback": (self._roll_back, 2),
        }


class RolledListenerStory(ListenerStory, RolledStory, RolledListener):
    """One where workers accept."""


#: By --handoff.
ROLLED: dict[str, type[World]] = {"connection": Rolled, "listener": RolledListener}
ROLLED_STORIES: dict[str, type[Story]] = {
    "connection": RolledStory,
    "listener": RolledListenerStory,
}
