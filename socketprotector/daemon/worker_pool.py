"""Starts and signals workers, and posts events about them.

worker_spawn.py starts a process, worker_messages.py reads its messages, post_mortem.py handles its
exit.  A worker is identified by its number, which is never reused, unlike a reaped worker's pid.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from ..core.actions import WorkerSignal
from ..core.events import Answered, WorkerExited, WorkerReady
from ..model import known_servers, ready_kinds
from ..model.errors import what_failed
from ..model.history import History
from ..model.lazy_dataclass import replace
from ..model.records import WorkerRecord
from ..model.settings import Settings
from ..system import check_command, procfs, sock_diag
from ..system.leftovers import Holder, Leftovers
from ..system.process import End
from ..system.process_groups import Groups
from . import out_of_memory, post_mortem, worker_recycling
from .check_probe import CheckProbes
from .delivery import Delivery
from .delivery.probe_target import PROBE
from .first_programs import FirstPrograms
from .generation import OpenGeneration
from .log_output import Output
from .runtime import Runtime
from .worker_messages import WorkerMessages
from .worker_spawn import Worker, WorkerSpawner, full_names

#: This variable tells a --ready check the pid of the worker to check.  So the check can find out
#: whether that worker answers, or an old worker that serves the same port.
_WORKER_PID = "SOCKETPROTECTOR_WORKER_PID"


class WorkerPool:
    """All running workers."""

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        output: Output,
        *,
        remember: Callable[[Callable[[History], History]], None],
        delivery: Delivery,
        probes: CheckProbes,
        holders: Callable[[], Iterable[Holder]],
    ) -> None:
        """remember(change): replaces the history with change(history).  holders: see Leftovers."""
        self._probes, self._output, self._delivery = probes, output, delivery
        self._runtime, self._remember = runtime, remember
        self._loop, self._log, self._post = runtime.loop, runtime.log, runtime.post
        self._workers: dict[int, Worker] = {}
        #: Records of _workers and of workers to be adopted (expect()): a checkpoint needs both.
        self._records: dict[int, WorkerRecord] = {}
        self._by_pid: dict[int, int] = {}
        #: The descriptors of workers and of their output, by name; the next program needs them
        #: after an upgrade or a kill.
        self.descriptors = output.named
        #: Whether a guard reports the exits of workers that are not our children.
        self.guarded = settings.guarded
        #: Whether any worker has become ready by a message, a probe or a check, not by a timer.
        self.proved_ready = False
        self.groups = Groups(self._loop, self._log, self.descriptors)
        kill_timeout_s, identity = settings.policy.kill_timeout_s, settings.worker_identity
        self.leftovers = Leftovers(
            *(self._loop, self._log, kill_timeout_s, identity),
            reaper=lambda: os.getppid() if self.guarded else os.getpid(),
            groups=self.groups.pids,
            holders=holders,
        )
        self._spawner = WorkerSpawner(settings, self._loop, self._log, output, delivery)
        self._memory = out_of_memory.MemoryWatch(runtime, self._workers)
        first = FirstPrograms(runtime, output, remember)
        self.messages = WorkerMessages(
            runtime, self._workers, first, self._note, self._on_ready, lambda: self._post_mortem
        )
        self._limit_watch: worker_recycling.LimitWatch | None = None
        self.apply_settings(settings)

    @cached_property
    def _post_mortem(self) -> post_mortem.PostMortem:
        """The object that finds out how a worker ended.  Its module is loaded at the first use."""
        return post_mortem.PostMortem(
            self._runtime,
            self._output,
            delivery=self._delivery,
            groups=self.groups,
            leftovers=self.leftovers,
            ended=self._ended,
            remember=self._remember,
            why_killed=self._memory.why_killed,
        )

    def apply_settings(self, settings: Settings) -> None:
        """Use the settings of the start or of a reload."""
        self._spawner.settings = settings
        self.leftovers.kill_timeout_s = settings.policy.kill_timeout_s
        if self._limit_watch is not None:
            self._limit_watch.apply_settings(settings)
        elif settings.worker_limits.any:
            watch = worker_recycling.LimitWatch(settings, self._runtime, self._workers)
            self._limit_watch = watch

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the warnings about the limits of workers (worker_recycling.py)."""
        return () if self._limit_watch is None else self._limit_watch.warnings

    def advice(self, generation: int, *, ignores_socket: bool = False) -> str:
        """Return advice for a generation that does not serve its clients; "": there is none.

        ignores_socket: whether the workers seem to accept no connection from our socket.
        """
        workers = self._workers_of(generation)
        if not workers:
            return ""
        # The advice needs only one socket that any worker has bound itself.  So sockets_of() need
        # not see all workers: it stops after a limited number of descriptors.
        pids = [each.process.pid for each in workers]
        return known_servers.advice(
            workers[0].generation.program,
            listens=lambda: sock_diag.address_of(
                procfs.sockets_of(pids) - self._delivery.worker_sockets
            ),
            ignores_socket=ignores_socket,
        )

    def check_result(self, generation: int) -> str:
        """Return why a worker's last --ready check failed; "": no failure, or all are ready."""
        results = (each.readiness.last for each in self._workers_of(generation))
        return next(filter(None, results), "")

    def has_ready(self, generation: int) -> bool:
        """Return whether a worker of a generation is ready."""
        return any(each.became_ready for each in self._workers_of(generation))

    def _workers_of(self, generation: int) -> list[Worker]:
        return [each for each in self._workers.values() if each.record.generation == generation]

    # -- orders --------------------------------------------------------------

    def spawn(self, number: int, slot: int, generation: OpenGeneration) -> None:
        """Start a worker.  A failure is reported as the worker's exit."""
        try:
            worker = self._spawner.start(number, slot, generation)
        except (OSError, ValueError) as error:
            self._post(WorkerExited(number, f"cannot start: {what_failed(error)}"))
            return
        self._note_shared_output(worker)
        try:
            self._watch(number, worker)
        except OSError as error:
            self._loop.unwatch(worker.process.pidfd)
            self.messages.unwatch(number, worker)
            worker.process.discard()
            worker.close()
            self._post(WorkerExited(number, f"cannot watch the worker: {what_failed(error)}"))
            return
        fields = {"generation": generation.record.number, "worker": number, "slot": slot}
        self._log.write("info", "spawned", **fields, pid=worker.process.pid)

    def signal(self, number: int, kind: WorkerSignal) -> None:
        """Signal a worker; after the worker's exit, or with KILL, signal its process group."""
        worker, signum = self._workers.get(number), signal.Signals[f"SIG{kind.value}"]
        if worker is None:  # the worker has exited, or could not be adopted (recovery.py)
            self.groups.signal(number, signum)
            self.leftovers.order(number, signum)
            return
        if not self._send(worker, signum):
            return
        record = worker.record
        killed = record.killed or kind is WorkerSignal.KILL
        aborted = record.aborted or kind is WorkerSignal.ABRT
        asked = record.asked_to_exit or not aborted
        self._note(worker, killed=killed, aborted=aborted, asked_to_exit=asked)

    def retire(self, number: int) -> None:
        """Order a worker to finish, by end of file on its RETURN line or by the finish signal."""
        worker = self._workers.get(number)
        if worker is None:  # see signal()
            self.groups.retire(number)
            self.leftovers.retire(number)
            return
        self._order_to_finish(worker)
        self._log.write("info", "retired", worker=number)

    def drain(self, generation: int) -> None:
        """Order a generation to finish: its orphans, and its workers that have a finish signal."""
        # Workers without a finish signal read end of file from the channel (Delivery.drain()).
        for worker in self._workers_of(generation):
            if worker.generation.program.finish_signal and not worker.record.asked_to_exit:
                self._order_to_finish(worker)
        self.groups.drain(generation)
        self.leftovers.drain(generation)

    def all_retire(self, generation: int) -> bool:
        """Return whether all workers of a generation have sent X_SOCKETPROTECTOR_RETIRE=1.

        At end of file on its RETURN line, such a worker finishes its connections and then exits.
        Returns False if the generation has no worker, or has an orphan left.
        """
        records = [each for each in self._records.values() if each.generation == generation]
        orphans = any(each.generation == generation for each in self.groups.records())
        return bool(records) and not orphans and all(each.retires for each in records)

    def _order_to_finish(self, worker: Worker) -> None:
        finish_signal = worker.generation.program.finish_signal
        if worker.line is not None and (worker.record.retires or not finish_signal):
            worker.line.shutdown(socket.SHUT_WR)
        else:
            self._send(worker, finish_signal)
        self._note(worker, asked_to_exit=True)

    def _send(self, worker: Worker, signum: int) -> bool:
        """Send a signal and log it; return False if permission is missing."""
        name = signal.Signals(signum).name.removeprefix("SIG")
        try:
            if signum == signal.SIGKILL:
                worker.process.kill_group()
            else:
                worker.process.signal(signum)
        except PermissionError as error:  # the process has changed its user
            fields = {"pid": worker.process.pid, "signal": name, "error": error.strerror}
            self._log.write("error", "cannot-signal", worker=worker.record.number, **fields)
            return False
        self._log.write("info", "signalled", worker=worker.record.number, signal=name)
        return True

    def suspend(self) -> None:
        """End the --ready checks and the search for leftovers, before an upgrade or our exit."""
        for worker in self._workers.values():
            worker.readiness.stop_check()
        self._probes.release_all()
        self.leftovers.stop_looking()

    def resume(self) -> None:
        """After a failed exec, restart what suspend() has ended."""
        for worker in self._workers.values():
            worker.readiness.check()
        self.leftovers.schedule()

    # -- from one program to the next ----------------------------------------

    def _note(self, worker: Worker, **changes: object) -> None:
        worker.record = replace(worker.record, **changes)  # type: ignore[arg-type]
        number = worker.record.number
        if number in self._workers:  # otherwise the worker has ended, or cannot be watched
            self._records[number] = worker.record

    def records(self) -> tuple[WorkerRecord, ...]:
        """Return the record of each worker and orphaned group."""
        return (*self._records.values(), *self.groups.records())

    def expect(self, record: WorkerRecord, descriptors: Mapping[str, int]) -> None:
        """Keep a worker's record and descriptors for checkpoints until the worker is adopted."""
        self._records[record.number] = record
        for name, fd in full_names(record.number, descriptors).items():
            self.descriptors[name] = fd

    def adopt(
        self, record: WorkerRecord, descriptors: Mapping[str, int], generation: OpenGeneration
    ) -> None:
        """Adopt a worker from before an upgrade or a kill, and take ownership of its descriptors.

        Raises KeyError if the descriptor `process` or `notify` is missing, OSError if the worker
        cannot be watched.
        """
        worker = self._spawner.adopt(record, descriptors, generation)
        worker.registered = full_names(record.number, descriptors)
        self.proved_ready = self.proved_ready or record.ready_by not in ("", ready_kinds.TIMER)
        self._watch(record.number, worker)

    def adopt_group(
        self, record: WorkerRecord, descriptors: Mapping[str, int], generation: OpenGeneration
    ) -> bool:
        """Adopt the process group of a worker that adopt() cannot adopt.

        Takes ownership of the descriptors.  Returns whether a process of the group is left.
        """
        del self._records[record.number]  # the group has a record of its own
        for name in full_names(record.number, descriptors):
            del self.descriptors[name]
        return self._post_mortem.adopt_group(record, descriptors, generation)

    def addresses(self, number: int) -> tuple[str, ...]:
        """Return the notify addresses that a worker may have."""
        return self._spawner.addresses(number)

    def learn_status(self, pid: int, clean: bool, how: str) -> None:
        """Note how a process ended; the guard has reaped it."""
        self.groups.look()  # the process may have been in a worker's group
        number = self._by_pid.get(pid)
        if number is not None:
            worker = self._workers[number]
            worker.end_from_guard = End(clean, how)
            if worker.awaits_end:
                self._ended(number)

    def acked(self, pid: int) -> None:
        """Record that a worker has sent Einhorn's message that it is ready (model/einhorn.py)."""
        number = self._by_pid.get(pid)
        if number is not None and self._workers[number].readiness.by_ack:
            self._on_ready(number, "ack")

    # -- readiness and exits -------------------------------------------------

    def _note_shared_output(self, worker: Worker) -> None:
        """If several workers run, set output_start to -1 (shared) for all: their lines mix."""
        for each in reversed(self._workers.values()):
            if each.record.output_start < 0:
                break  # all workers that started earlier have -1, too
            self._note(each, output_start=-1)
        if self._workers:
            worker.record = replace(worker.record, output_start=-1)

    def _watch(self, number: int, worker: Worker) -> None:
        self._loop.watch(worker.process.pidfd, lambda: self._ended(number))
        self.messages.watch(number, worker)
        program = worker.generation.program
        fields = {"generation": worker.record.generation, "worker": number}
        worker.readiness.watch(
            ready=lambda by: self._on_ready(number, by),
            start_check=lambda done, late: self._start_check(worker, done, late),
            hangs=lambda why: self._log.write(
                "warning",
                "check-timed-out",
                worker=number,
                check=check_command.first_program(program.ready_check),
                for_s=check_command.LIMIT_S,
            ),
            fails=lambda why: self._log.write("info", "probe-failed", **fields, reason=why),
            changed=lambda: self._keep_descriptors(worker),
            known=worker.became_ready,
            probed=program.is_probed and not worker.generation.record.serving_since,
        )
        self._workers[number] = worker
        self._records[number] = worker.record
        self._by_pid[worker.process.pid] = number
        self._keep_descriptors(worker)
        self.messages.await_watchdog(number, worker)

    def _start_check(
        self, worker: Worker, done: Callable[[str], None], late: Callable[[str], None]
    ) -> check_command.CheckCommand:
        """Run the command of --ready check once.  Raises OSError or ValueError."""
        program = worker.generation.program
        variables = {_WORKER_PID: str(worker.process.pid)}
        if address := self._probes.address(worker.generation):
            variables[PROBE] = address
        return check_command.CheckCommand(
            self._loop,
            program,
            program.ready_check,
            variables,
            ended=lambda why: done(self._probes.judge(worker.generation, why)),
            late=late,
            limit_s=check_command.LIMIT_S,
        )

    def _release_probe_address(self, worker: Worker) -> None:
        """Release a generation's probe address once none of its workers is checked any more."""
        generation = worker.record.generation
        if worker.generation.program.ready == "check" and not any(
            each.readiness.is_checked for each in self._workers_of(generation)
        ):
            self._probes.release(generation)

    def _keep_descriptors(self, worker: Worker) -> None:
        """Update a worker's descriptors in self.descriptors."""
        if worker.record.number not in self._workers:
            return  # the worker has ended, or cannot be watched
        before, worker.registered = worker.registered, worker.descriptors()
        for name in before.keys() - worker.registered.keys():
            del self.descriptors[name]
        for name in [each for each in worker.registered if each not in before]:
            self.descriptors[name] = worker.registered[name]

    def answered(self, generation: int, by: str) -> bool:
        """Record that a generation has answered the probe, which makes its workers ready.

        If a worker has exited meanwhile, post no event: its exit ends the generation's start.
        Under --handoff listener, while only some workers have sent X_SOCKETPROTECTOR_RETIRE=1,
        record nothing and return False: probe again later.  by: the kind of probe.
        """
        workers = [w for w in self._workers.items() if w[1].record.generation == generation]
        for number, _ in workers:
            self.messages.read(number)  # the worker may have sent READY=1 before the answer
        relies_on_library = self._spawner.settings.policy.relies_on_library
        early = relies_on_library and len({each.record.retires for _, each in workers}) > 1
        if not early and all(self._note_ready(number, worker, by) for number, worker in workers):
            self._post(Answered(generation, self.all_retire(generation)))
        return not early

    def allow_timer(self, generation: int) -> None:
        """After an inconclusive probe of a generation, let a timer make its workers ready."""
        # Such a probe may fail although the workers can already serve (see ready_probe.py).
        for worker in self._workers_of(generation):
            if not worker.became_ready:
                worker.readiness.start_timer()

    def _on_ready(self, number: int, by: str, *, retires: bool = False) -> None:
        worker = self._workers.get(number)
        if worker is None or worker.record.ready_by or worker.became_ready:
            if worker is not None and retires:  # READY=1 has come after another sign of readiness
                self._note(worker, retires=True)
            return
        if self._note_ready(number, worker, by, retires=retires):
            finishes = retires or worker.generation.program.finish_signal > 0
            self._post(WorkerReady(number, finishes, retires))

    def _note_ready(self, number: int, worker: Worker, by: str, *, retires: bool = False) -> bool:
        """Note how a worker became ready; return False if the worker has exited meanwhile."""
        if worker.became_ready:
            return True
        self.proved_ready = self.proved_ready or by != ready_kinds.TIMER
        worker.readiness.note_ready()
        self._release_probe_address(worker)
        if worker.process.has_ended():
            self._note(worker, ready_by=by)  # _ended() handles the exit
            return False
        self._note(worker, ready_at=time.monotonic(), ready_by=by, retires=retires)
        shown_by = by if by != "notify" else None
        self._log.write(
            "info", "worker-ready", generation=worker.record.generation, worker=number, by=shown_by
        )
        self.messages.await_watchdog(number, worker)
        return True

    def _ended(self, number: int) -> None:
        """Handle a worker's last messages; once we know how the worker ended, handle its exit."""
        self.messages.read(number)
        worker = self._workers[number]
        end = self._post_mortem.end_of(worker, guarded=self.guarded)
        if end is None:
            return
        del self._workers[number], self._records[number]
        self._release_probe_address(worker)
        # If another process has reaped an adopted worker, a newer worker may have the same pid.
        if self._by_pid.get(worker.process.pid) == number:
            del self._by_pid[worker.process.pid]
        for name in worker.registered:
            del self.descriptors[name]
        self._loop.unwatch(worker.process.pidfd)
        self.messages.unwatch(number, worker)
        self._post(self._post_mortem.close(worker, end, proved_ready=self.proved_ready))
        living = len(self._records) + len(self.groups.numbers)
        self._output.close_oldest(living, lambda: {*self._records, *self.groups.numbers})
