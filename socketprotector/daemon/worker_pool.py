"""The workers that live, and the signals that they are sent.

Effects orders, the pool posts events.  Start: worker_spawn.py; what they say: worker_messages.py;
exit: post_mortem.py.  A worker is identified by its number, which is never reused: its pid may be,
as soon as it is reaped.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping

from ..core.actions import WorkerSignal
from ..core.events import Answered, WorkerExited, WorkerReady
from ..model import known_servers, question
from ..model.errors import what_failed
from ..model.history import History
from ..model.lazy_dataclass import replace
from ..model.records import WorkerRecord
from ..model.settings import Settings
from ..system import sock_diag
from ..system.check_command import LIMIT_S, CheckCommand, first_program
from ..system.orphans import Orphans
from ..system.process import End
from ..system.process_groups import Groups
from ..system.procfs import sockets_of
from .check_probe import CheckProbes
from .delivery import Delivery
from .delivery.probe_target import PROBE
from .first_programs import FirstPrograms
from .generation import OpenGeneration
from .log_output import Output
from .post_mortem import PostMortem
from .runtime import Runtime
from .worker_messages import WorkerMessages
from .worker_recycling import LimitWatch
from .worker_spawn import Worker, WorkerSpawner, named

#: So that --ready check:COMMAND can ask the right one: the port is the old ones', too.
_WORKER_PID = "SOCKETPROTECTOR_WORKER_PID"
#: So many descriptors of workers are looked at for one that listens: each takes microseconds.
_LOOKED_AT = 1000


class WorkerPool:
    """All workers that live."""

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        output: Output,
        *,
        remember: Callable[[Callable[[History], History]], None],
        delivery: Delivery,
        probes: CheckProbes,
    ) -> None:
        """remember: changes the history by a function of it."""
        self._probes, self._output, self._delivery = probes, output, delivery
        loop, log, post = runtime.loop, runtime.log, runtime.post
        self._loop, self._log, self._post = loop, log, post
        self._workers: dict[int, Worker] = {}
        self._records: dict[int, WorkerRecord] = {}  # theirs, for all are asked for at each step
        self._by_pid: dict[int, int] = {}
        #: All descriptors of workers that another program would need, those of their output too.
        self.descriptors = output.named
        #: Whether a guard tells how a process ended that is no child of ours.
        self.guarded = settings.guarded
        #: Whether a worker has said that it is ready: then the program speaks with us.
        self.spoken_with = False
        self.groups = Groups(loop, log, self.descriptors)
        kill_timeout_s, identity = settings.policy.kill_timeout_s, settings.worker_identity
        self.orphans = Orphans(loop, log, kill_timeout_s, identity, self.groups.has)
        self._spawner = WorkerSpawner(settings, loop, log, output, delivery)
        self._messages = WorkerMessages(
            runtime,
            self._workers,
            FirstPrograms(runtime, output, remember),
            note=self._note,
            ready=self._is_ready,
        )
        self.limits = LimitWatch(settings, runtime, self._workers)
        self._post_mortem = PostMortem(
            runtime,
            output,
            delivery=delivery,
            groups=self.groups,
            orphans=self.orphans,
            ended=self._ended,
            remember=remember,
        )

    def apply_settings(self, settings: Settings) -> None:
        """A reload has changed them."""
        self._spawner.settings = settings
        self.limits.use(settings)

    def advice(self, generation: int, *, passes_over: bool = False) -> str:
        """Say what to do about a generation of which no worker takes a connection, if known.

        passes_over: there is one to be taken.
        """
        its = [each for each in self._workers.values() if each.record.generation == generation]
        if not its:
            return ""
        # They are all of one program; of thousands, or of one with as many files, a part is asked.
        pids = [each.process.pid for each in its]
        handed = {
            os.fstat(one.fileno()).st_ino
            for each in self._delivery.listeners
            for one in each.sockets
        }
        return known_servers.advice(
            its[0].generation.program,
            listens=lambda: sock_diag.address_of(sockets_of(pids, _LOOKED_AT) - handed),
            passes_over=passes_over,
        )

    def check_says(self, generation: int) -> str:
        """Return what came of the last check of a worker that is not ready; "" without one."""
        its = (w for w in self._workers.values() if w.record.generation == generation)
        return next((w.readiness.last for w in its if w.readiness.last), "")

    # -- orders --------------------------------------------------------------

    def spawn(self, number: int, slot: int, generation: OpenGeneration) -> None:
        """Start a worker.  What fails is its exit."""
        try:
            worker = self._spawner.start(number, slot, generation)
        except (OSError, ValueError) as error:
            self._post(WorkerExited(number, f"cannot start: {what_failed(error)}"))
            return
        self._share_output(worker)
        try:
            self._watch(number, worker)
        except OSError as error:
            self._loop.unwatch(worker.process.pidfd)
            self._messages.unwatch(number, worker)
            worker.process.discard()
            worker.close()
            self._post(WorkerExited(number, f"cannot watch it: {what_failed(error)}"))
            return
        self._log.write(
            "info",
            "spawned",
            generation=generation.record.number,
            worker=number,
            slot=slot,
            pid=worker.process.pid,
        )

    def signal(self, number: int, kind: WorkerSignal) -> None:
        """Send a signal, KILL to the whole process group; nothing happens to one that is gone."""
        worker, sent = self._workers.get(number), signal.Signals[f"SIG{kind.value}"]
        if worker is None:
            self.groups.signal(number, sent)
            return
        if not self._send(worker, sent):
            return
        aborted = worker.record.aborted or kind is WorkerSignal.ABRT
        self._note(
            worker,
            killed=worker.record.killed or kind is WorkerSignal.KILL,
            aborted=aborted,
            asked_to_exit=worker.record.asked_to_exit or not aborted,
        )

    def retire(self, number: int) -> None:
        """Have a worker finish: by the end of its RETURN line, or by a signal."""
        worker = self._workers.get(number)
        if worker is None:
            self.groups.retire(number)
            return
        self._tell_to_finish(worker)
        self._log.write("info", "retired", worker=number)

    def drain(self, generation: int) -> None:
        """Have workers finish that do not by themselves, when they read end of file."""
        for worker in self._workers.values():
            known = worker.record
            signalled = worker.generation.program.finish_signal
            if known.generation == generation and signalled and not known.asked_to_exit:
                self._tell_to_finish(worker)

    def all_retire(self, generation: int) -> bool:
        """Whether all workers of a generation leave when their RETURN lines end, none by a signal.

        They are on the client library, and read from what they have accepted before they leave.
        """
        its = [each for each in self._records.values() if each.generation == generation]
        orphans = any(each.generation == generation for each in self.groups.records())
        return bool(its) and not orphans and all(each.retires for each in its)

    def _tell_to_finish(self, worker: Worker) -> None:
        finish_signal = worker.generation.program.finish_signal
        if worker.line is not None and (worker.record.retires or not finish_signal):
            worker.line.shutdown(socket.SHUT_WR)  # what it says on it can still be heard
        else:
            self._send(worker, finish_signal)
        self._note(worker, asked_to_exit=True)

    def _send(self, worker: Worker, number: int) -> bool:
        """Send a signal, KILL to the whole process group, and log that; return whether we may."""
        name = signal.Signals(number).name.removeprefix("SIG")
        try:
            if number == signal.SIGKILL:
                worker.process.kill_group()
            else:
                worker.process.signal(number)
        except PermissionError as error:  # it has become another user's
            self._log.write(
                "error",
                "cannot-signal",
                worker=worker.record.number,
                pid=worker.process.pid,
                signal=name,
                error=error.strerror,
            )
            return False
        self._log.write("info", "signalled", worker=worker.record.number, signal=name)
        return True

    def suspend(self) -> None:
        """End what only this program knows of; the next one begins it anew."""
        for worker in self._workers.values():
            worker.readiness.stop_check()
        self._probes.all_over()
        self.orphans.stop_looking()

    def resume(self) -> None:
        """There was no next one."""
        for worker in self._workers.values():
            worker.readiness.check()
        self.orphans.go_on()

    # -- to the next program and from the one before -----------------------------

    def _note(self, worker: Worker, **changes: object) -> None:
        """Have other fields in the record of a worker."""
        worker.record = replace(worker.record, **changes)  # type: ignore[arg-type]
        number = worker.record.number
        if number in self._workers:  # else it could not be watched, or has ended
            self._records[number] = worker.record

    def records(self) -> tuple[WorkerRecord, ...]:
        """Return what is known of each worker."""
        return (*self._records.values(), *self.groups.records())

    def expect(self, record: WorkerRecord, descriptors: Mapping[str, int]) -> None:
        """Have a worker in the state before it is adopted: we may be killed meanwhile."""
        self._records[record.number] = record
        for name, fd in named(record.number, descriptors).items():
            self.descriptors[name] = fd

    def adopt(
        self, record: WorkerRecord, descriptors: Mapping[str, int], generation: OpenGeneration
    ) -> None:
        """Go on with a worker that an earlier program started; takes ownership.

        Raises KeyError when a descriptor is missing, OSError when it cannot be watched.
        """
        worker = self._spawner.adopt(record, descriptors, generation)
        worker.named = named(record.number, descriptors)
        self.spoken_with = self.spoken_with or record.ready_by not in ("", "timer")
        self._watch(record.number, worker)

    def adopt_group(
        self, record: WorkerRecord, descriptors: Mapping[str, int], generation: OpenGeneration
    ) -> bool:
        """Go on with what a worker has left that has ended; takes ownership of its descriptors.

        Returns whether anything is.
        """
        del self._records[record.number]  # its group has a record of its own
        for name in named(record.number, descriptors):
            del self.descriptors[name]
        return self._post_mortem.adopt_group(record, descriptors, generation)

    def lost(self, number: int) -> None:
        """A worker was being started when the earlier program was killed: end what there is."""
        for address in self._spawner.addresses(number):
            self.orphans.end(address)

    def learn_status(self, pid: int, clean: bool, how: str) -> None:
        """Learn how a process ended from its parent (the guard): it is no child of ours."""
        self.groups.look()
        number = self._by_pid.get(pid)
        if number is not None:
            worker = self._workers[number]
            worker.told_end = End(clean, how)
            if worker.end_due:
                self._ended(number)

    def acked(self, pid: int) -> None:
        """A worker says by another way than its own line that it is ready (einhorn's)."""
        number = self._by_pid.get(pid)
        if number is not None and self._workers[number].readiness.by_ack:
            self._is_ready(number, "ack")

    # -- what comes back -----------------------------------------------------

    def _share_output(self, worker: Worker) -> None:
        """Two write to the log file now: what stands there from here on is no one's last words."""
        for each in reversed(self._workers.values()):
            if each.record.output_start < 0:
                break  # so have all before it
            self._note(each, output_start=-1)
        if self._workers:
            worker.record = replace(worker.record, output_start=-1)

    def _watch(self, number: int, worker: Worker) -> None:
        self._loop.watch(worker.process.pidfd, lambda: self._ended(number))
        self._messages.watch(number, worker)
        program = worker.generation.program
        worker.readiness.watch(
            lambda by: self._is_ready(number, by),
            lambda over, late: self._start_check(worker, over, late),
            lambda why: self._log.write(
                "warning",
                "check-hangs",
                worker=number,
                check=first_program(program.ready_check),
                for_s=LIMIT_S,
            ),
            lambda why: self._log.write(
                "info",
                "not-answered",
                generation=worker.record.generation,
                worker=number,
                reason=why,
            ),
            lambda: self._keep_descriptors(worker),
            known=worker.has_served,
            asked=program.ready in question.ASKED and not worker.generation.record.serving_since,
        )
        self._workers[number] = worker
        self._records[number] = worker.record
        self._by_pid[worker.process.pid] = number
        self._keep_descriptors(worker)
        self._messages.await_word(number, worker)

    def _start_check(
        self, worker: Worker, over: Callable[[str], None], late: Callable[[str], None]
    ) -> CheckCommand:
        """Run the command of --ready check once.  Raises OSError or ValueError."""
        program = worker.generation.program
        variables = {_WORKER_PID: str(worker.process.pid)}
        if address := self._probes.address(worker.generation):
            variables[PROBE] = address
        return CheckCommand(
            self._loop,
            program,
            program.ready_check,
            variables,
            over=lambda why: over(self._probes.judge(worker.generation, why)),
            late=late,
            limit_s=LIMIT_S,
        )

    def _checked(self, worker: Worker) -> None:
        """A worker is not checked any more: when none of its generation is, its probe goes."""
        generation = worker.record.generation
        its = (each for each in self._workers.values() if each.record.generation == generation)
        if worker.generation.program.ready == "check" and not any(
            each.readiness.is_checked for each in its
        ):
            self._probes.over(generation)

    def _keep_descriptors(self, worker: Worker) -> None:
        """Have its descriptors kept that it has now, and no others."""
        if worker.record.number not in self._workers:
            return  # it could not be watched, or has ended
        before, worker.named = worker.named, worker.descriptors()
        for name in before.keys() - worker.named.keys():
            del self.descriptors[name]
        for name in worker.named.keys() - before.keys():
            self.descriptors[name] = worker.named[name]

    def answered(self, generation: int, by: str) -> None:
        """A generation has: its workers are ready, unless one of them has ended meanwhile.

        by: the kind of question.
        """
        its = [w for w in self._workers.items() if w[1].record.generation == generation]
        if all(self._note_ready(number, worker, by) for number, worker in its):
            self._post(Answered(generation))

    def not_asked(self, generation: int) -> None:
        """A generation cannot be asked: time tells whether its workers are ready."""
        for worker in self._workers.values():
            if worker.record.generation == generation and not worker.has_served:
                worker.readiness.wait()

    def _is_ready(self, number: int, by: str, *, retires: bool = False) -> None:
        worker = self._workers.get(number)
        if worker is None or worker.record.ready_by or worker.has_served:
            if worker is not None and retires:  # it has answered before it said so
                self._note(worker, retires=True)
            return
        if self._note_ready(number, worker, by, retires=retires):
            retires = retires or worker.generation.program.finish_signal > 0
            self._post(WorkerReady(number, retires))

    def _note_ready(self, number: int, worker: Worker, by: str, *, retires: bool = False) -> bool:
        """Note what says that a worker is ready; False: it has ended, so it must not serve."""
        if worker.has_served:
            return True
        self.spoken_with = self.spoken_with or by != "timer"
        worker.readiness.is_known()
        self._checked(worker)
        if worker.process.has_ended():
            self._note(worker, ready_by=by)  # its exit is handled next
            return False
        self._note(worker, ready_at=time.monotonic(), ready_by=by, retires=retires)
        other = by if by != "notify" else None
        self._log.write(
            "info", "worker-ready", generation=worker.record.generation, worker=number, by=other
        )
        self._messages.await_word(number, worker)
        return True

    def _ended(self, number: int) -> None:
        """Handle a worker's exit after its last messages."""
        self._messages.read(number)
        worker = self._workers[number]
        end = self._post_mortem.end_of(worker, guarded=self.guarded)
        if end is None:
            return
        del self._workers[number], self._records[number]
        self._checked(worker)
        # One that its parent has reaped, because we adopted it: its pid may be another worker's.
        if self._by_pid.get(worker.process.pid) == number:
            del self._by_pid[worker.process.pid]
        for name in worker.named:
            del self.descriptors[name]
        self._loop.unwatch(worker.process.pidfd)
        self._messages.unwatch(number, worker)
        self._post(self._post_mortem.close(worker, end, spoken_with=self.spoken_with))
        living = len(self._records) + len(self.groups.numbers)
        self._output.close_oldest(living, lambda: {*self._records, *self.groups.numbers})
