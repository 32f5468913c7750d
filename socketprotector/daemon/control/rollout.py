"""Collects the field `rollout` of `status`, and the connections of leaving workers.

A worker is *leaving* if it retires, if its generation drains or was abandoned, or if its state is
`orphaned`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

from ...core.events import Deadline, TimerKind
from ...core.fleet import LEAVING, Fleet, Generation, Phase, State, Worker
from ...core.rollout import rolls, room
from ...model.records import WorkerRecord
from ...model.share import WHOLE
from ...system.procfs import is_ours, sockets
from ..effects import Effects
from ..generation import OpenGeneration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    #: Worker's number -> how many open connections it has, and the age in seconds of the oldest
    #: connection; None: unknown.
    LeavingConnections = Mapping[int, tuple[int | None, float | None]]

#: To find a worker's oldest connection, we need a system call for each of its descriptors.  So we
#: skip workers with more than _MOST_CONNECTIONS connections, and search at most _MOST_WORKERS of
#: the other workers.
_MOST_CONNECTIONS, _MOST_WORKERS = 100, 4


def of_rollout(fleet: Fleet, effects: Effects, connections: LeavingConnections) -> dict[str, Any]:
    """Return the field `rollout`; {}: there is no rollout.

    connections: the result of leaving_connections().
    """
    new = fleet.incoming
    if new is None or not (fleet.rollout if new.phase is Phase.SETTLING else _is_beginning(fleet)):
        return {}
    canary = fleet.rollout.canary if fleet.rollout else None
    opened = effects.generations.get(new.number)
    found: dict[str, Any] = {
        "generation": new.number,
        "kind": "canary" if canary else "rolling",
        "stage": _stage(fleet, new),
        "share": _share(fleet, new) * 100 / WHOLE,
        "met": effects.delivery.met(opened) if opened is not None else None,
        "left_s": _stage_left_s(new, effects),
    }
    if canary:
        found["at_least"] = canary.at_least
    else:
        found["replaced"] = new.ready_workers
        found["wanted"] = fleet.full_size(new)
        found["waits_for"] = _waits_for(fleet, new, connections)
    return {"rollout": found}


def _is_beginning(fleet: Fleet) -> bool:
    """Return whether the first workers of a rolling reload are starting."""
    return rolls(fleet) and not fleet.dry_run


def _stage(fleet: Fleet, new: Generation) -> str:
    """Return the rollout's stage, by its name in docs/control.md."""
    rollout = fleet.rollout
    if new.phase is Phase.STARTING or rollout is None:
        return "starting"
    if rollout.canary:
        return "share" if rollout.share < WHOLE else "all"
    settles = Deadline(TimerKind.SETTLE, new.number) in fleet.timers
    return "settling" if settles else "replacing"


def _share(fleet: Fleet, new: Generation) -> int:
    """Return the new generation's share of the new clients, in ten thousandths."""
    if new.phase is Phase.STARTING or fleet.rollout is None:
        return 0
    return fleet.rollout.share if fleet.sharing else WHOLE


def _stage_left_s(new: Generation, effects: Effects) -> float | None:
    """Return how many seconds are left of the stage.

    None: no timer ends the stage, or the stage's time is over but a settle check must still
    succeed.
    """
    if new.checked and effects.probing.settle_check_due:
        return None
    return settle_left_s(new.number, effects)


def settle_left_s(number: int, effects: Effects) -> float | None:
    """Return how many seconds a generation still settles; None: no timer runs."""
    ends = Deadline(TimerKind.SETTLE, number)
    now = time.monotonic()
    return next((max(0.0, due - now) for each, due in effects.due() if each == ends), None)


def _waits_for(
    fleet: Fleet, new: Generation, connections: LeavingConnections
) -> list[dict[str, Any]]:
    """Return the leaving workers, if one of them must end before the next new worker can start.

    Empty if the next new worker can start now, or if this stage needs no further worker.
    """
    stage = _stage(fleet, new)
    wanted = fleet.full_size(new) if stage == "replacing" else fleet.wanted_in(new)
    if len(new.workers) >= wanted or room(fleet, 1, new):
        return []
    return [
        {
            "worker": worker.number,
            "generation": generation.number,
            "active": connections[worker.number][0],
            "oldest_s": connections[worker.number][1],
        }
        for generation, worker in _leaving(fleet)
    ]


def _leaving(fleet: Fleet) -> Iterator[tuple[Generation, Worker]]:
    for generation in fleet.generations:
        ends = generation.phase in (Phase.DRAINING, Phase.ABANDONED)
        for worker in generation.alive:
            if ends or worker.state in LEAVING:
                yield generation, worker


def leaving_connections(fleet: Fleet, effects: Effects) -> LeavingConnections:
    """Return the leaving workers' connections; {}: there is no rolling reload."""
    if fleet.incoming is None or not fleet.newest_policy.rolls:
        return {}
    found: dict[int, tuple[int | None, float | None]] = {}
    records = {each.number: each for each in effects.pool.records()}
    lookups_left = _MOST_WORKERS
    for generation, worker in _leaving(fleet):
        opened = effects.generations.get(generation.number)
        counts = None
        # Leave an orphaned worker's counts unknown: another worker may count in the same slot.
        if opened is not None and worker.state is not State.ORPHANED:
            counts = opened.counts(worker.slot)
        active = counts.active if counts is not None else None
        oldest_s = None
        if lookups_left and active and active <= _MOST_CONNECTIONS and opened is not None:
            oldest_s = _oldest_s(opened, worker, active, records)
            lookups_left -= 1
        found[worker.number] = active, oldest_s
    return found


def _oldest_s(
    opened: OpenGeneration, worker: Worker, active: int, records: Mapping[int, WorkerRecord]
) -> float | None:
    """Return the age of a worker's oldest connection; None: unknown."""
    record, board = records.get(worker.number), opened.board
    if record is None or board is None or not is_ours():
        return None
    accepted_at = board.accepted_at(worker.slot)
    times = []
    with suppress(OSError):
        # The scoreboard also keeps the times of ended connections, so look only at open sockets.
        times = [accepted_at[fd] for fd, _ in sockets(record.pid) if fd in accepted_at]
    if len(times) != active:
        return None  # a time is missing, or another socket reuses an ended connection's descriptor
    return max(0.0, time.monotonic() - min(times) / 1e9)
