"""Lives in which draining workers end their connections evenly: the orders, and what outlives them.

Apart from the other lives, so that each of those goes on as it did before.  A worker has its record
in a scoreboard in memory, and finds there by when its connections end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from socketprotector_client import wire

from socketprotector.core.fleet import Fleet, Phase, Policy, Stop
from tests.simulation.handed import Handed
from tests.simulation.kernel import Memory
from tests.simulation.world import World, number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from socketprotector.daemon.effects import Effects

#: Times differ, so that an order shows which option it is of.
POLICIES = (
    Policy(drain_spread_s=20.0, stop_spread_s=4.0),
    Policy(drain_spread_s=20.0, drain_timeout_s=30.0, max_draining=2),
    Policy(stop_spread_s=4.0, settle_s=5.0),
    Policy(drain_spread_s=20.0, stop_spread_s=4.0, stop_first=True, drain_timeout_s=30.0),
    Policy(drain_spread_s=20.0, stop_spread_s=4.0, surge=1, drain_timeout_s=30.0),
    Policy(),
)
#: No order yet counts as the latest end of all.
NO_ORDER = wire.SPREAD_NEVER + 1
_NS = 1_000_000_000


class Spreading(World):
    """A life with --drain-spread and --stop-spread."""

    POLICIES = POLICIES
    UNUSUAL = False

    def __init__(self, *its: Any) -> None:
        self._boards: dict[int, tuple[Memory, int]] = {}  # by the worker's number
        self._ends: dict[int, int] = {}  # by when each must have ended its connections
        self._unable: set[int] = set()  # those whose order could not be written
        super().__init__(*its)

    def _what_happens(self) -> list[tuple[Callable[[], None], int]]:
        return [
            *super()._what_happens(),
            (self._become_ready, 200),  # else most reloads fail before anything drains
            (self._hup, 20),
            (self._term, self.seed % 2),
        ]

    def _start(self, argv: Any, environment: Any, given: Any) -> int:
        pid = super()._start(argv, environment, given)
        fd, _, offset = environment.get(wire.ENV_SCOREBOARD, "").partition(":")
        if fd:
            board = given[int(fd)]
            assert isinstance(board, Memory)
            worker = self._processes[pid]
            self._boards[number_of(worker)] = board, int(offset)
            board.write((1).to_bytes(8, "little"), int(offset) + 8 * wire.BOARD_SPREADS)
        return pid

    def _end_of(self, number: int) -> int:
        board, offset = self._boards[number]
        return int.from_bytes(board.read(8, offset + 8 * wire.BOARD_SPREAD_UNTIL), "little")

    # -- what must hold ----------------------------------------------------------------

    def _said(self, event: str, fields: Mapping[str, Any]) -> None:
        super()._said(event, fields)
        if event == "cannot-spread":
            self._unable.add(int(fields["worker"]))

    def _check_fleet(self, fleet: Fleet, act: Effects) -> None:
        super()._check_fleet(fleet, act)
        living = {number_of(each) for each in self.workers if not each.ended and not each.unknown}
        draining = {g.number for g in fleet.all_of(Phase.DRAINING) if not g.quiescing}
        for record in act.pool.records():
            opened = act.generations.get(record.generation)
            if record.number not in living.intersection(self._boards) or opened is None:
                continue
            if not opened.program.spreads or opened.board is None or record.orphaned:
                continue
            end = self._end_of(record.number)
            self._check_order(record.number, end or NO_ORDER, fleet)
            if record.generation in draining and record.number not in self._unable:
                assert end or not fleet.policy.spreads, f"worker {record.number} has no order"

    def _check_order(self, number: int, end: int, fleet: Fleet) -> None:
        before = self._ends.get(number, NO_ORDER)
        assert end <= before, f"worker {number} has more time than it was given"
        if end == before:
            return
        self._ends[number] = end
        if end >= wire.SPREAD_NEVER:
            return
        stops = fleet.stopping is Stop.GRACEFUL
        longest_s = (fleet.policy.stop_spread_s if stops else 0.0) or 20.0
        left_s = (end - self.kernel.clock_ns) / _NS
        assert left_s <= longest_s, f"worker {number} has {left_s:.1f} s, not {longest_s:g} s"
        self.events["ordered at a stop" if fleet.stopping else "ordered at a drain"] += 1
        if stops and before < wire.SPREAD_NEVER:
            self.events["a stop shortens a spread"] += 1

    def _after_kill(self) -> dict[str, int]:
        now = self.kernel.clock_ns
        if any(now < end < wire.SPREAD_NEVER for end in self._running()):
            self.events["killed in a spread"] += 1
        return super()._after_kill()

    def _running(self) -> list[int]:
        living = [number_of(each) for each in self.workers if not each.ended]
        return [self._end_of(each) for each in living if each in self._boards]


class SpreadingListener(Spreading, Handed):
    """The same where workers accept."""


#: By --handoff.
SPREADING: dict[str, type[World]] = {"connection": Spreading, "listener": SpreadingListener}
