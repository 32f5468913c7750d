"""Resumes, after an upgrade or a kill, where an earlier program stopped.

adopt() gives each part of the protector its record and its descriptors, but adopts no worker.  Then
the protector accepts clients again.  (Under --handoff listener, workers never stop accepting.)
adopt_workers() adopts one worker in each step.  Between steps the protector accepts clients.

The earlier program may have been killed before it stored descriptors, or before it wrote the state.
If a descriptor that the state mentions is missing, an event reports the lost worker or generation.
A stored descriptor that the state does not mention is closed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

from ..core.events import ChannelBroken, Event, OpenFailed, SettleFailed, WorkerExited
from ..core.failure import NOT_STORED, STARTING_WHEN_KILLED
from ..core.fleet import Generation, Phase, State, Worker
from ..core.snapshot import Snapshot
from ..model.lazy_dataclass import field, mutable, replace
from ..model.records import GenerationRecord, WorkerRecord
from ..model.text import LAST_WORDS
from ..system import inherited
from ..system.inherited import Inherited
from ..system.process import Process
from .effects import Effects
from .generation import OpenGeneration

#: Why a worker or generation of the fleet is missing.
_ENDED = "ended while no protector was running"
#: The descriptors without which a worker cannot be adopted.  Some workers also need `line`.
_REQUIRED = {"process", "notify"}


@mutable
class Recovery:
    """Gives each part of the protector its record and its descriptors."""

    effects: Effects
    snapshot: Snapshot
    #: The earlier program's descriptors; each part takes its own, and the others are closed.
    unclaimed: Inherited
    _workers: list[tuple[WorkerRecord, dict[str, int], OpenGeneration]] = field(
        default_factory=list
    )

    def adopt(self) -> list[Event]:
        """Adopt everything except the workers; after that a generation can get new clients.

        Under --handoff stdio, returns an event for each living generation whose first programs have
        failed: none has worked, and at least NO_ACCIDENT (3) have failed (first_programs.py).  The
        earlier program may have been killed before it handled these failures.
        """
        effects, snapshot = self.effects, self.snapshot
        fleet, delivery = snapshot.fleet, effects.delivery
        closing = fleet.stopping is not None and not effects.listeners_survive_stop
        delivery.adopt(snapshot.delivery, self.unclaimed, held=fleet.held, closing=closing)
        failures = self._adopt_generations()
        for record in snapshot.workers:
            generation = effects.generations.get(record.generation)
            if generation is not None and self.unclaimed.has(
                inherited.WORKER, record.number, "process"
            ):
                descriptors = self.unclaimed.take(inherited.WORKER, record.number)
                effects.pool.expect(record, descriptors)
                self._workers.append((record, descriptors, generation))
        serving = fleet.of(Phase.SERVING)
        opened = effects.generations.get(serving.number) if serving is not None else None
        effects.last_good = opened.program if opened is not None else snapshot.last_good
        effects.pool.leftovers.adopt(snapshot.condemned)
        effects.reports.adopt(snapshot.run, snapshot.log_level)
        self.dismiss_unknown()
        self.unclaimed.close()
        effects.live_settings.adopt(snapshot)
        if releases := effects.live_settings.releases:
            releases.resume(snapshot.current_due, effects.last_good, snapshot.named_at_begin)
        for released in effects.generations.released.values():
            released.forget_board()
            delivery.release(released)
        return failures

    def dismiss_unknown(self) -> None:
        """Order workers to finish if the state does not mention them.

        Such a worker was started just before the protector was killed.  We send the finish signal,
        if the worker's program has one, and close the worker's RETURN line.

        Also close the descriptors of workers that the fleet contains, but that adopt() could not
        take over: their record, generation or `process` descriptor is missing.  _report_missing()
        handles these workers.
        """
        fleet, programs = self.snapshot.fleet, self.snapshot.generations
        # Such workers most likely belong to the newest generation, which was starting.
        newest = max(programs, key=lambda each: each.number, default=None)
        finish = (newest.program if newest else self.effects.live_settings.settings).finish_signal
        known = {each.number for each in self.snapshot.workers}
        known |= {each.number for each in fleet.alive()}
        for number, descriptors in self.unclaimed.take_all(inherited.WORKER).items():
            process = descriptors.get("process", -1)
            if process >= 0 and finish and int(number) not in known:
                with suppress(OSError):  # ESRCH: the worker has exited
                    signal.pidfd_send_signal(process, finish)
            for fd in descriptors.values():
                os.close(fd)

    def _adopt_generations(self) -> list[Event]:
        """Adopt the generations; return the events that adopt() returns."""
        effects, fleet, failures = self.effects, self.snapshot.fleet, list[Event]()
        for record in self.snapshot.generations:
            descriptors = self.unclaimed.take(inherited.GENERATION, record.number)
            each = OpenGeneration.adopt(record, descriptors.pop("board", None))
            in_fleet = None if record.released else fleet.generation(record.number)
            draining = in_fleet is not None and in_fleet.phase is Phase.DRAINING
            if not effects.delivery.adopt_generation(each, descriptors, draining=draining):
                each.forget_board()
            elif in_fleet is None:
                effects.generations.released[record.number] = each
            else:
                effects.generations[record.number] = each
                if record.never_works and not record.ended:
                    failures.append(_first_programs_failed(record))
        return failures

    def adopt_workers(self) -> Iterator[tuple[Event, ...]]:
        """Adopt one worker in each step.

        Yields () after each worker.  Last, yields the events about the workers and generations
        that could not be adopted.
        """
        exits: list[WorkerExited] = []
        pool, fleet = self.effects.pool, self.snapshot.fleet
        for record, descriptors, generation in self._workers:
            # Without a finish signal, only the RETURN line can order a single worker to finish.
            needed = _REQUIRED if generation.program.finish_signal else {*_REQUIRED, "line"}
            if descriptors.keys() >= needed and not record.orphaned:
                pool.adopt(record, descriptors, generation)
            else:
                # The worker had exited, or not all of its descriptors were stored: adopt the
                # worker's process group.
                has_group = pool.adopt_group(record, descriptors, generation)
                found = fleet.find(record.number)
                # Report the worker in two cases:
                # 1. Its group exists, but the fleet does not yet count the worker as ORPHANED.
                #    From now on we watch only the group.
                # 2. Its group is gone, but the fleet still counts the worker as ORPHANED.
                # If the group is gone and the worker is not ORPHANED, _report_missing() reports
                # the worker.
                if has_group != (found is not None and found[1].state is State.ORPHANED):
                    waiting = self._waiting(record.generation)
                    lost = has_group and not record.orphaned
                    event = _exit_of(record.number, record, waiting, orphans=has_group, lost=lost)
                    exits.append(event)
            yield ()
        yield (*exits, *self._report_missing({each.worker for each in exits}))

    def _report_missing(self, reported: Collection[int]) -> list[Event]:
        """Return events for generations and workers of the fleet that could not be adopted.

        reported: the numbers of the workers that adopt_workers() reports.
        """
        pool, fleet = self.effects.pool, self.snapshot.fleet
        known = {record.number for record in pool.records()}.union(reported)
        unadopted = {each.number for each in fleet.alive()} - known
        # A generation without its descriptors cannot serve: end its start, or replace it.
        events: list[Event] = [
            OpenFailed(each.number, STARTING_WHEN_KILLED, tuple(sorted(unadopted)))
            if each.phase in (Phase.STARTING, Phase.ABANDONED)
            else ChannelBroken(each.number)
            for each in fleet.generations
            if each.number not in self.effects.generations
        ]
        records = {record.number: record for record in self.snapshot.workers}
        for generation in fleet.generations:
            missing = [each for each in generation.alive if each.number in unadopted]
            waiting = self._waiting(generation.number) if missing else 0
            for each in missing:
                record = records.get(each.number)
                self._watch_unadopted(generation, each, record)
                if each.state is not State.ORPHANED:
                    events.append(_exit_of(each.number, record, waiting, orphans=True, lost=True))
        return events

    def _waiting(self, number: int) -> int:
        """Return how many clients wait in a generation's queue, or at its socket."""
        opened = self.effects.generations.get(number)
        if opened is None:
            return 0
        return self.effects.delivery.waiting(opened, clients_only=True) or 0

    def _watch_unadopted(
        self, generation: Generation, worker: Worker, record: WorkerRecord | None
    ) -> None:
        """Watch a worker that cannot be adopted: it was starting, or descriptors are missing.

        By now the worker's RETURN line is closed.  A scan of /proc (system/leftovers.py) finds the
        worker.  From then on it is watched as the group of a dead worker is.  The fleet counts it
        as an orphan until it is gone.
        """
        pool, generation_number = self.effects.pool, generation.number
        programs = {each.number: each.program for each in self.snapshot.generations}
        retires = record is not None and record.retires
        # A worker on the client library finishes when its RETURN line is closed.  So send it no
        # signal: SIGTERM, for example, would order the worker to finish quickly (docs/protocol.md).
        # With Policy.finish_alone (a rolling reload under --handoff listener), all workers use the
        # library.
        watches_line = retires or self.snapshot.fleet.policy.finish_alone
        program = programs.get(generation_number, self.effects.live_settings.settings)
        finish_signal = 0 if watches_line else program.finish_signal
        # A newer worker may use an orphan's slot.  Then the counts in the slot belong to the newer
        # worker.
        shared = any(w.slot == worker.slot for w in generation.workers if w is not worker)
        owns_counts = worker.state is not State.ORPHANED or not shared
        addresses = pool.addresses(worker.number)
        order = next((sign for a, sign in self.snapshot.orders if a in addresses), None)

        def gone() -> None:
            opened = self.effects.generations.get(generation_number)
            if opened is not None and owns_counts:
                opened.take_counts(worker.slot)
            waiting = self._waiting(generation_number)
            self.effects.runtime.post(WorkerExited(worker.number, "orphans gone", waiting=waiting))

        def found(process: Process | None, order: int | None) -> None:
            if process is None:
                gone()
                return
            known = record or WorkerRecord(
                worker.number, generation_number, process.pid, -1, slot=worker.slot
            )
            known = replace(known, pid=process.pid, asked_to_exit=order is not None)
            pool.groups.keep(known, process, finish_signal, gone)
            if order == finish_signal:
                pool.groups.retire(worker.number)
            elif order:
                pool.groups.signal(worker.number, order)

        pool.leftovers.find(
            worker.number, addresses, generation_number, finish_signal, order, found
        )


def _exit_of(
    number: int, record: WorkerRecord | None, waiting: int, *, orphans: bool, lost: bool
) -> WorkerExited:
    """Return the event about a worker that cannot be adopted."""
    reason = NOT_STORED
    if record is None:  # the protector was killed before it recorded the worker's pid
        reason = STARTING_WHEN_KILLED
    elif record.orphaned:
        reason = _ENDED
    ready_at = record.ready_at if record is not None else None
    served_s = time.monotonic() - ready_at if ready_at is not None else 0.0
    return WorkerExited(number, reason, served_s, waiting, orphans=orphans, lost=lost)


def _first_programs_failed(record: GenerationRecord) -> SettleFailed:
    """Return the event that first_programs.py posts when a generation's first programs fail.

    Without last words, the event does not say where to find the programs' output.
    """
    words = f"{LAST_WORDS}\n{record.program_words}" if record.program_words else ""
    return SettleFailed(record.number, record.programs_fail + words)
