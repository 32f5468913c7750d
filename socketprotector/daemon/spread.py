"""Orders workers to end their connections evenly within a time, and reports their progress.

The scoreboard is memory that the protector and the workers share, with a slot for each worker.  An
order is a deadline in the worker's slot: by this time the worker must have ended all its
connections.  The order outlives an upgrade or kill of the protector.  A worker that follows orders
says so in its slot.  Of our client libraries, only the Python library follows orders.

Source: docs/protocol.md, section "A spread".
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from socketprotector_client import wire

from ..model.ready_kinds import TIMER
from ..model.records import Counts, WorkerRecord
from ..system.log import Log
from .generation import OpenGeneration

_NS = 1_000_000_000


def order(
    generation: OpenGeneration,
    records: Iterable[WorkerRecord],
    seconds: float,
    log: Log,
    *,
    worker: int = 0,
) -> None:
    """Order the workers of a generation to end their connections evenly within a time.

    If a worker already has an order with an earlier deadline, that order stays in force.

    records: the records of all workers.  worker: the number of one worker; 0: all workers
    of the generation.
    seconds: how long connections may stay open; 0: no limit, so the workers end none of them.
    """
    board = generation.board
    if board is None or not generation.program.spreads:
        return
    until = time.monotonic_ns() + int(seconds * _NS) if seconds else wire.SPREAD_NEVER
    unable = 0
    for each in _workers_of(generation, records):
        if worker not in (0, each.number):
            continue
        try:
            follows, deadline = board.spread(each.slot)
            unable += not follows
            if until < (deadline or wire.SPREAD_NEVER + 1):
                board.order_spread(each.slot, until)
        except OSError as error:
            log.write("error", "cannot-spread", worker=each.number, error=error.strerror)
    if unable and seconds:
        _warn_unable(generation, unable, log)


def warn_if_unable(generation: OpenGeneration, records: Iterable[WorkerRecord], log: Log) -> None:
    """Warn once if workers of a generation that gets new clients follow no orders."""
    board = generation.board
    if board is None or not generation.program.spreads:
        return
    unable = 0
    for each in _workers_of(generation, records):
        # Skip workers that are not ready, or that a timer made ready: their slots may not say yet
        # that the workers follow orders.
        if each.ready_by not in ("", TIMER):
            unable += not _order_of(generation, each.slot)[0]
    if unable:
        _warn_unable(generation, unable, log)


def _workers_of(
    generation: OpenGeneration, records: Iterable[WorkerRecord]
) -> Iterable[WorkerRecord]:
    number = generation.record.number
    return (each for each in records if each.generation == number and not each.orphaned)


def _warn_unable(generation: OpenGeneration, unable: int, log: Log) -> None:
    if generation.warned_unable:
        return
    generation.warned_unable = True
    log.write(
        "warning",
        "no-spread",
        generation=generation.record.number,
        workers=unable,
        reason="--drain-spread and --stop-spread have no effect on these workers: only workers on "
        "the Python client library, except gunicorn workers, end their connections evenly",
    )


def _order_of(generation: OpenGeneration, slot: int) -> tuple[bool, int]:
    """Return whether the worker in a slot follows orders, and the slot's deadline (0: no order)."""
    try:
        return generation.board.spread(slot) if generation.board is not None else (False, 0)
    except OSError:
        return False, 0


def closing_rate(
    generation: OpenGeneration, slots: Iterable[tuple[int, Counts | None]]
) -> dict[str, float] | None:
    """Return how many connections a generation ends per second, and for how many more seconds.

    None: no worker of the generation ends connections evenly now.

    slots: the slots of the generation's living workers, with their counts.
    """
    now, rate, longest_s = time.monotonic_ns(), 0.0, 0.0
    for slot, counts in slots if generation.program.spreads else ():
        follows, until = _order_of(generation, slot)
        if follows and counts is not None and now < until < wire.SPREAD_NEVER:
            left_s = (until - now) / _NS
            rate += counts.active / max(left_s, 1.0)
            longest_s = max(longest_s, left_s)
    return {"per_s": rate, "left_s": longest_s} if longest_s else None
