"""Collects the values of `status`, `connections` and `crashes`, and changes nothing.

docs/control.md has the names and units of the values.
"""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from socketprotector_client import wire

from ...core.fleet import Fleet, Generation, Phase, State, Worker
from ...core.waiting import Facts, waits
from ...model.lazy_dataclass import as_dict
from ...model.listen_fds import ready_fd
from ...model.ready_kinds import ANY
from ...model.records import Counts, GenerationRecord, WorkerRecord
from ...model.settings import Settings
from ...model.text import headline
from ...model.wait_quantiles import quantile_us
from ...system.check_command import shown
from ...system.listener import Listener
from ...system.polling import events_of
from .. import forked_children, spread
from ..delivery import Delivery
from ..effects import Effects
from ..generation import OpenGeneration
from ..reports import NO_INTERFACE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...system.log import Log
    from ..health import Health
    from .rollout import LeavingConnections

#: A --settle-check command gets these fields of a generation, and the number of its workers.
_COUNTED = (
    *("number", "phase", "serving_since_at", "queue"),
    *("accepted", "active", "finished", "errors", "lost", "wait_us"),
)
#: States in which a worker may have connections.
_WITH_CONNECTIONS = (State.READY, State.RETIRING, State.ORPHANED)
_STDERR = 2


def phase_of(fleet: Fleet) -> str:
    """Return the phase of the whole service, in one word."""
    if fleet.stop_requested:
        return "stopping"
    if not fleet.served:
        return "starting"
    if fleet.of(Phase.SETTLING):
        return "settling"
    if fleet.reload_wanted or (fleet.is_changing and not fleet.dry_run):
        return "reloading" if fleet.route else "waiting"
    return "serving" if fleet.route else "waiting"


def of_ready(settings: Settings) -> str:
    """Return what makes a worker ready, in words."""
    if settings.ready == ANY and ready_fd(settings) >= 0:  # COMMAND or --env has {fd:ready}
        return "notify, ack or a line"
    return settings.ready_text(in_status=True)


def of_health(health: Health | None) -> dict[str, Any] | None:
    """Return the health of the serving generation; None: there is no health check."""
    if health is None or not health.shown_check:
        return None
    return {
        "probe": health.shown_check,
        "state": health.results.state,
        "since_at": health.results.since_at,
        "last": health.results.last,
        "reason": health.results.reason,
        "failures": health.results.failures,
        "answered_at": health.results.answered_at,
    }


def of_waits_for(
    fleet: Fleet,
    effects: Effects,
    generations: Iterable[Mapping[str, Any]],
    connections: LeavingConnections,
    upgrade: str,
) -> dict[str, Any]:
    """Return the field `waits_for`; an empty result if SocketProtector waits for nothing.

    generations, connections: the results of of_generations() and rollout.leaving_connections().
    upgrade: what an upgrade waits for; "": no upgrade waits.
    """
    now, starting = time.monotonic(), fleet.of(Phase.STARTING)
    answer = ""
    if starting is not None:
        answer = effects.probing.why_not_ready or effects.pool.check_result(starting.number)
    settling = fleet.of(Phase.SETTLING)
    opened = effects.generations.get(settling.number) if settling is not None else None
    facts = Facts(
        left_s={each: max(0.0, due - now) for each, due in effects.due()},
        active={each["number"]: each["active"] for each in generations},
        answer=headline(answer),
        met=effects.met(settling.number) if settling is not None else 0,
        held=connections,
        settle_check=shown(opened.program.settle_check) if opened is not None else "",
        settle_check_due=effects.probing.settle_check_due,
        upgrade=upgrade,
        last_exit=effects.reports.last_exit,
        leftovers_end=effects.pool.leftovers.found,
        late_clients_s=effects.late_clients_s,
    )
    found = [as_dict(each) for each in waits(fleet, facts)]
    return {"waits_for": found} if found else {}


def of_warnings(settings: Settings, listeners: Iterable[Listener]) -> list[str]:
    """Return the settings' warnings that still apply, and the listeners' warnings.

    A warning about a UNIX socket names the permissions of a file or folder.  The warning no longer
    applies if these permissions have changed.  A listener has a warning if its network interface is
    missing.
    """
    lacking = [each.settings.address for each in listeners if each.lacks_interface]
    of_start = [each for each in settings.warnings if not _is_resolved(each)]
    return [*of_start, *(f"{address}: {NO_INTERFACE}" for address in lacking)]


def of_guard(settings: Settings, *, guarded: bool) -> list[str]:
    """Return a warning if the guard has died.  guarded: whether a guard runs."""
    died = "the guard died; restart SocketProtector, or its next crash loses connections"
    # A reload cannot change --guard, so settings.guarded still says whether a guard was started.
    return [died] if settings.guarded and not guarded else []


def of_log(log: Log, file: str | None) -> list[str]:
    """Return warnings if lines are lost, the log file was moved, or the log's reader is behind now.

    The kernel calls a full pipe unwritable, but a socket (the journal) that is a quarter full.
    """
    behind = "the reader of the log is suspended or slow; workers that write may have to wait"
    found = [] if events_of(_STDERR, select.POLLOUT) else [behind]
    if log.dropped:
        found.append(f"lines are lost: the last {log.dropped} could not be written to the log")
    if file is not None and _is_moved(file):
        found.append(f"{file} was renamed or removed: lines go to the old file until a `reopen`")
    return found


def _is_moved(file: str) -> bool:
    """Return whether stderr is no longer the file at this path."""
    try:
        return not os.path.samestat(os.stat(file), os.fstat(_STDERR))
    except FileNotFoundError:
        return True
    except OSError:
        return False  # we may not look there


def _is_resolved(warning: str) -> bool:
    """Return whether the permissions in a warning of launch/unix_access.py have changed."""
    if not warning.startswith("unix:/"):
        return False
    for before, after in (("unix:", ": only "), (", but the folder ", " does not ")):
        path, found, more = warning.partition(before)[2].partition(after)
        if found and "(" in more:
            with suppress(OSError, ValueError):
                return stat.filemode(os.stat(path).st_mode) != more.partition("(")[2][:10]
    return False


def of_listener(listener: Listener, delivery: Delivery) -> dict[str, Any]:
    """Return the fields of a listener; the backlog is None if the kernel does not report it."""
    waiting, limit = delivery.backlog(listener) or (None, None)
    return {
        "index": listener.index,
        "address": listener.settings.address,
        "name": listener.settings.name,
        "backlog": waiting,
        "backlog_limit": limit,
        "reachable": _is_reachable(listener),
    }


def _is_reachable(listener: Listener) -> bool:
    """Return False if no client can connect at the listener's address.

    If another program's file is at the path, return True: it may lead to our socket.
    """
    if listener.lost or listener.is_cut_off:
        return False
    path = listener.settings.address.removeprefix("unix:")
    return not listener.path_fault or os.path.exists(path)


def of_generations(fleet: Fleet, effects: Effects) -> list[dict[str, Any]]:
    """Return the fields of each existing generation, the oldest first."""
    by_number = {each.number: each for each in effects.pool.records()}
    return [
        _of_generation(each, effects, by_number)
        for each in fleet.generations
        if each.number in effects.generations  # leave out generations that could not be opened
    ]


def counts_of(fleet: Fleet, effects: Effects) -> dict[int, dict[str, Any]]:
    """Return the counts that a --settle-check command reads, by the generation's number."""
    return {
        each["number"]: {name: each[name] for name in _COUNTED} | {"workers": len(each["workers"])}
        for each in of_generations(fleet, effects)
    }


def _of_generation(
    generation: Generation, effects: Effects, records: Mapping[int, WorkerRecord]
) -> dict[str, Any]:
    opened = effects.generations[generation.number]
    slots = {worker.slot for worker in generation.workers if worker.state is not State.ORPHANED}
    # Another worker may have got an orphaned worker's slot.  Then the counts in the slot are the
    # other worker's, so the orphaned worker's counts are unknown.
    counts = {
        worker.number: opened.counts(worker.slot)
        for worker in generation.alive
        if worker.state is not State.ORPHANED or worker.slot not in slots
    }
    known = [each for each in (opened.record.past, *counts.values()) if each is not None]
    # If a worker may have connections, and its counts are unknown, the sums are unknown, too.
    is_incomplete = any(
        each.state in _WITH_CONNECTIONS and counts.get(each.number) is None
        for each in generation.alive
    )
    total = sum(known, Counts()) if known and not is_incomplete else None
    delivery = effects.delivery
    active = delivery.active(opened) if total is None else total.active
    return {
        "number": generation.number,
        "phase": generation.phase.value,
        "opened_at": opened.record.opened_at,
        "serving_since_at": opened.record.served_at,
        "draining_since_at": opened.record.drained_at,
        "path": opened.program.path,
        "release": opened.program.release or None,
        "queue": delivery.waiting(opened),
        "oldest_waiting_s": delivery.untaken_s(opened),
        "settle_check": shown(opened.program.settle_check),
        "first_programs": _of_first_programs(opened.record),
        "lost": opened.record.lost if total is not None else None,
        **_of_counts(total),
        "active": active,
        **_of_closing(
            opened, [(w.slot, counts[w.number]) for w in generation.alive if w.number in counts]
        ),
        "wait_us": _of_wait_times(total.waits) if total is not None else None,
        "workers": [
            _of_worker(each, records.get(each.number), counts.get(each.number), opened)
            for each in generation.workers
        ],
    }


def _of_closing(
    opened: OpenGeneration, slots: Sequence[tuple[int, Counts | None]]
) -> dict[str, Any]:
    """Return the field `closing`; empty if no worker ends its connections evenly now."""
    found = spread.closing_rate(opened, slots) if opened.program.spreads else None
    return {"closing": found} if found else {}


def _of_first_programs(record: GenerationRecord) -> dict[str, Any] | None:
    """Return how the first programs under --handoff stdio failed.

    None: no program failed, or a program has worked.
    """
    if not record.programs_failed:
        return None
    return {
        "failed": record.programs_failed,
        "reason": record.programs_fail,
        "last_words": record.program_words,
    }


def _of_worker(
    worker: Worker, record: WorkerRecord | None, counts: Counts | None, opened: OpenGeneration
) -> dict[str, Any]:
    children = forked_children.children_of(record, opened) if record is not None else []
    ready_at = record.ready_at if record is not None else None
    return {
        "number": worker.number,
        "slot": worker.slot,
        "pid": record.pid if record is not None else None,
        "state": worker.state.value,
        "started_at": record.started_at if record is not None else None,
        "ready_at": None if ready_at is None else time.time() - (time.monotonic() - ready_at),
        "ready_by": record.ready_by if record is not None else "",
        "status": record.status if record is not None and not record.orphaned else "",
        "quick_deaths": worker.quick_deaths,
        **_of_counts(counts),
        "processes": [
            {"number": each.number, "pid": each.pid, **_of_counts(each.counts)} for each in children
        ],
    }


def _of_counts(counts: Counts | None) -> dict[str, int | None]:
    if counts is None:
        return dict.fromkeys(("accepted", "active", "finished", "errors"))
    return {
        "accepted": counts.accepted,
        "active": counts.active,
        "finished": max(0, counts.accepted - counts.active),
        "errors": counts.errors,
    }


def _of_wait_times(waits: Sequence[int]) -> dict[str, Any]:
    """Return the field `wait_us`: how long connections waited in the queue."""
    return {
        "count": sum(waits),
        "p50": quantile_us(waits, 0.50),
        "p99": quantile_us(waits, 0.99),
        "buckets": list(waits),
    }


def of_connections(
    generations: Mapping[int, OpenGeneration], records: Iterable[WorkerRecord], only: int | None
) -> list[dict[str, Any]]:
    """Return the pid of each worker and forked child, and the accept times of their connections.

    Unknown times are None.  only: a generation's number; None: all generations.
    """
    offset = time.time() - time.monotonic()
    found = []
    for record in records:
        opened = generations.get(record.generation)
        if opened is None or only not in (None, record.generation):
            continue
        board, children = opened.board, forked_children.children_of(record, opened)
        processes = [(record.pid, record.slot), *((each.pid, each.slot) for each in children)]
        for pid, slot in processes:
            times = None
            if board is not None and not record.orphaned and board.read_any(slot) is not None:
                accepted = board.accepted_at(slot)
                times = {str(fd): ns / 1e9 + offset for fd, ns in accepted.items()}
            found.append(
                {
                    "generation": record.generation,
                    "worker": record.number,
                    "pid": pid,
                    "accepted_at_by_fd": times,
                    "orphaned": record.orphaned,
                    # socketprotectorctl uses since_at for connections whose accept time is unknown.
                    # If drained_at is set, all connections of the worker began before drained_at;
                    # otherwise they began after started_at.  Exception: if two generations share
                    # a socket (--handoff listener), connections may begin soon after drained_at.
                    "since_at": opened.record.drained_at or record.started_at,
                }
            )
    return found


def of_addresses(
    generations: Mapping[int, OpenGeneration], only: int | None
) -> dict[str, list[str]]:
    """Return the addresses of the listeners with which each generation was opened.

    A removed listener counts, too: its clients may still be connected.  Leave out a generation that
    an earlier version opened without recording these addresses.
    only: a generation's number; None: all generations.
    """
    return {
        str(number): [
            each
            for each in wire.unpack_listeners(opened.program.listeners)
            if each != wire.REMOVED_LISTENER
        ]
        for number, opened in generations.items()
        if only in (None, number) and opened.program.listeners
    }


def plain(values: Iterable[object]) -> list[dict[str, Any]]:
    """Return frozen values as dictionaries, which JSON can encode."""
    return [as_dict(each) for each in values]
