"""The parts of the resident process, and how they are put together.

What another program left (a state, descriptors) goes to the parts that own it.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Sequence

from .. import __version__
from ..core.events import StopRequested
from ..core.fleet import Fleet
from ..core.snapshot import Snapshot
from ..model.errors import SystemRefused, what_failed
from ..model.lazy_dataclass import replace
from ..model.settings import ListenerSettings, Settings
from ..system import inherited, pid_file_removal, privileges, spawn
from ..system.cpu_quota import Quota, processors
from ..system.inherited import Inherited
from ..system.listeners import listener_of
from ..system.log import Log
from ..system.loop import Loop
from ..system.sd_notify import remove_folder
from ..system.state_file import StateError, StateFile
from . import recovery, watch_client
from .checkpoint import Checkpoint
from .control import commands, status
from .control.server import ControlServer
from .delivery.choice import delivery_for
from .effects import Effects
from .event_queue import EventQueue
from .inherited_listeners import adopt
from .log_output import Output
from .parents import Parents
from .runtime import Runtime
from .start_report import StartReport
from .supervisor import Supervisor, terminal_of
from .upgrade import Upgrade

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..model.control_requests import Request
    from .control.server import Client

#: How soon to try again where a manager's socket was full.
_AGAIN_S = 0.1
_OWN = (inherited.SETTINGS, inherited.STATE, inherited.PID_FILE, inherited.NOTIFY)
_STDERR = 2


class Resident:
    """The parts of the process, and how they are put together."""

    def __init__(
        self,
        settings: Settings,
        listeners: Sequence[ListenerSettings],
        descriptors: dict[str, int],
        earlier: Snapshot | StateError | None,
        command: tuple[str, ...],
    ) -> None:
        """earlier: where another program stopped, or why that cannot be resumed."""
        # At the first start they come from the launching process; only a guard has them too.
        known = inherited.GUARD in descriptors or inherited.STATE in descriptors
        kept = descriptors.keys() - {inherited.GUARD} if known else set()
        self.settings = settings
        self.left_over = left = Inherited(descriptors)
        #: Those of the process itself, which are no part's.
        self.own = {n: fd for n in _OWN if (fd := left.take_one(n)) is not None}
        self.earlier = earlier
        self.command = command
        self.output = Output(settings)
        self.parents = Parents(left.take_one(inherited.GUARD), kept, self._later)
        self.start_report = StartReport(
            left.take_one(inherited.LAUNCHER),
            left.take_one(inherited.TERMINAL),
            self.parents.systemd.pid,
        )
        self.delivery = delivery_for(settings.mode)
        self.listeners = adopt(left, listeners, self.delivery.shares_listeners)
        control = left.take_one(inherited.CONTROL)
        self.control_listener = (
            listener_of(control, -1, settings.control)
            if control is not None and settings.control is not None
            else None
        )
        self.began = False
        self.staying: tuple[str, ...] = ()  # names of listeners that live on for the next start
        self.watcher: watch_client.FileWatch | None = None
        self._loop: Loop | None = None

    def supervise(self) -> int:
        """Go on with what there is, or begin; return the exit status when nothing is left."""
        snapshot = self._where_to_begin()
        if snapshot is not None and snapshot.fleet.exiting:
            return self._end_again(snapshot)
        self.began = snapshot is not None
        loop = self._become_resident()
        for listener in self.listeners:
            if snapshot is None or not listener.shared:  # else a worker has said how it listens
                listener.claim()
        settings = self.settings
        log = Log(settings.log_level, prioritized=settings.to_syslog, form=settings.log_format)
        # First where events go, and what writes the state: all parts are given both.
        queue = EventQueue()
        checkpoint = Checkpoint(
            StateFile(self.own[inherited.STATE]), self.parents.store, log, self._descriptors
        )
        runtime = Runtime(loop, log, queue.post, checkpoint.save)
        self._begin_log(runtime, snapshot)
        supervisor = self._put_together(runtime, queue, checkpoint)
        control = self._control(supervisor, runtime)
        self._attend(supervisor, runtime)
        # They were blocked from the start, so that none of them could come too early.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.began = True
        watchers = self.left_over.take_all(inherited.WATCH)
        if snapshot is None:
            self.left_over.close()
            supervisor.launch()
        else:
            supervisor.adopt(recovery.Recovery(supervisor.effects, snapshot, self.left_over))
        # Signals are taken from here on; and by which of them workers finish, should none of us
        # be there to say so.
        self.parents.guard.send(f"X_BEGAN=1\nX_FINISH={settings.finish_signal}")
        if settings.watch or watchers:
            self.watcher = watch_client.FileWatch(settings, runtime)
            self.watcher.start(watchers)
        status = supervisor.run()
        if control is not None:
            control.finish()
        self.staying = supervisor.effects.close()
        if self.watcher is not None:
            self.watcher.close()
        if control is not None:
            control.close()
        log.close()
        return status

    def _where_to_begin(self) -> Snapshot | None:
        """Return where another program stopped; else have a state file of our own.

        Raises StateError where that cannot be resumed.
        """
        if isinstance(self.earlier, StateError):
            raise self.earlier
        if inherited.STATE not in self.own:
            try:
                self.own[inherited.STATE] = StateFile.make().fd
            except OSError as error:
                raise SystemRefused(f"cannot keep the state in memory: {error.strerror}") from error
        return self.earlier

    def _end_again(self, snapshot: Snapshot) -> int:
        """All was done but the last words."""
        ours = [each for each in self.listeners if not each.settings.foreign]
        if self.parents.stays(name for each in ours for name in each.descriptors()):
            number = snapshot.steering.socket_number
            self.staying = tuple(filter(None, [each.leave(number) for each in ours]))
        self._close_listeners()
        return snapshot.fleet.exit_status

    def _become_resident(self) -> Loop:
        """Set the limits, priority and user of this process; return its loop."""
        settings, quota = self.settings, Quota()

        def spare() -> bool:
            """With one core no client could connect while we poll for one.

            Under a quota (cpu.max), which the set of cores does not show, polling would spend what
            the workers need.
            """
            return processors() > 1 and quota.processors() > 1

        # Not earlier: from here on another program can resume if this one fails.
        self._loop = loop = Loop(settings.busy_poll_s, spare)
        # Only the soft limit, and workers get the caller's back: each draining generation and
        # each worker costs descriptors here.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        spawn.use_batch_policy()
        if settings.identity is not None:
            starts_others = settings.worker_identity is not None
            privileges.become(settings.identity, settings.nice, starts_others=starts_others)
            if starts_others:
                privileges.reclaim()  # an upgrade in place has brought them along
        return loop

    def _begin_log(self, runtime: Runtime, snapshot: Snapshot | None) -> None:
        """Open the log, and write the start event."""
        settings, log = self.settings, runtime.log
        log.suppress_crash_loops(runtime.loop)
        self._begin_output(runtime)
        log.reopen()
        log.write(
            "info",
            "resumed" if snapshot else "start",
            pid=os.getpid(),
            name=settings.name,
            version=__version__,
            listen=" ".join(each.address for each in settings.listeners if not each.removed),
        )
        if snapshot is None:
            for notice in settings.notices:
                log.write("warning", "notice", text=notice)
        else:
            self._write_pid(log)

    def _attend(self, supervisor: Supervisor, runtime: Runtime) -> None:
        """Hear the guard and the launching process."""
        log, pool = runtime.log, supervisor.effects.pool

        def unguarded() -> None:
            if self.parents.line is not None:
                hint = "the guard is gone; restart to have one again"
                log.write("error", "guard-died", hint=hint)
                self._write_pid(log)
            pool.guarded = False

        self.parents.watch(runtime.loop, pool.learn_status, unguarded)
        self.start_report.watch(runtime.loop, lambda: runtime.post(StopRequested(quick=True)))

    def fail(self, reason: str) -> None:
        """Nothing could be started, or can go on: let go of what is ours."""
        self.start_report.failure = self.start_report.failure or reason
        self._close_listeners()

    def finish(self, status: int) -> None:
        """Leave only listeners that stay, and tell the launcher, the guard and systemd."""
        store = self.parents.store
        if self.parents.line is None:
            # First: without it what is there is no state to go on with, but left for a start.
            store.forget(inherited.SETTINGS)
            # What keeps a copy may not read in time that it is to go; the file is the same one.
            os.ftruncate(self.own[inherited.SETTINGS], 0)
        # The relay ends with its last writer, and a copy in the fd store would be one.
        for name in self.output.descriptors():
            store.forget(name)
        self.output.finish()
        if self.settings.notify_folder:
            remove_folder(self.settings.notify_folder)
        if self.settings.pid_file is not None and inherited.PID_FILE in self.own:
            pid_file_removal.remove(self.settings.pid_file, self.own[inherited.PID_FILE])
        self.start_report.failed(status)
        self.parents.finish(status, self.staying)

    # -- putting together ----------------------------------------------------

    def _begin_output(self, runtime: Runtime) -> None:
        settings = self.settings
        try:
            self.output.begin(self.left_over, runtime)
        except OSError as error:
            where = "to syslog" if settings.to_syslog else "of workers' output"
            asked = " for --log-prefix" if settings.log_prefix else ""
            why = f"cannot start the relay {where}{asked}: {what_failed(error)}"
            if settings.to_syslog or asked:
                raise SystemRefused(why) from error
            # No relay was asked for: workers write to the file themselves.
            self.output = Output(replace(settings, log_relay=False))
            runtime.log.reopen()
            runtime.log.write("warning", "notice", text=why)

    def _put_together(
        self, runtime: Runtime, queue: EventQueue, checkpoint: Checkpoint
    ) -> Supervisor:
        settings = self.settings
        effects = Effects(
            settings,
            lambda host: self.delivery(host, self.listeners),
            runtime,
            output=self.output,
            systemd=self.parents.systemd,
            start_report=self.start_report,
            command=self.command,
            stay=self.parents.stays,
        )
        keeps = settings.worker_identity is not None
        supervisor = Supervisor(
            Fleet(
                policy=settings.policy,
                workers_wanted=settings.processes,
                configured=settings.origin.configured,
            ),
            queue,
            effects,
            checkpoint,
            Upgrade(self.command, runtime.loop, runtime.log, keeps=keeps),
            runtime,
            reopen_logs=lambda: self._reopen_logs(runtime.log),
            took=lambda number: self.parents.guard.send(f"X_TOOK={number:d}"),
            terminal=terminal_of(settings.foreground),
            outlives_terminal=settings.outlives_terminal,
        )
        effects.questions.counts = lambda: status.counts_of(supervisor.fleet, effects)
        return supervisor

    def _descriptors(self) -> dict[str, int]:
        """The descriptors of the process itself, by name."""
        found = dict(self.own)
        if self.control_listener is not None:
            found[inherited.CONTROL] = self.control_listener.fileno()
        if self.watcher is not None:
            found |= self.watcher.descriptors()
        theirs = (self.parents, self.start_report, self.output)
        return found | {name: fd for each in theirs for name, fd in each.descriptors().items()}

    def _later(self, again: Callable[[], None]) -> None:
        if self._loop is not None:  # else it is the end already, and finish() waits for room
            self._loop.call_after(again, _AGAIN_S, again)

    def _reopen_logs(self, log: Log) -> None:
        try:
            self.output.reopen()
        except OSError as error:
            log.write("error", "reopen-failed", file=error.filename, error=error.strerror)
        else:
            # What it says, and all that the next protector does, is for the new file, too.
            if self.settings.log_file is not None:
                self.parents.guard.send("X_OUTPUT=1", _STDERR)
        log.reopen()
        log.write("info", "reopened")

    # -- the control socket ----------------------------------------------------

    def _control(self, supervisor: Supervisor, runtime: Runtime) -> ControlServer | None:
        """Answer operators from here on."""
        settings = self.settings
        if self.control_listener is None:
            return None

        def handle(client: Client, request: Request) -> None:
            with client.within_memory():  # nothing of the request is done yet
                handler = commands.CommandHandler(supervisor, runtime)
            if not client.gone:
                handler.handle(client, request)

        uids = {0, os.getuid()} | ({settings.identity.uid} if settings.identity else set())
        self.control_listener.claim()
        control = ControlServer(
            self.control_listener,
            runtime.loop,
            handle,
            supervisor.effects.pool.acked,
            uids=frozenset(uids),
            group=settings.control_group,
            status_group=settings.status_group,
        )
        runtime.log.observe(control.tell)
        return control

    # -- the end -------------------------------------------------------------------

    def _close_listeners(self) -> None:
        for listener in (*self.listeners, self.control_listener):
            if listener is not None and listener.fileno() >= 0:
                listener.close()

    def _write_pid(self, log: Log) -> None:
        """Write the pid that is to be signalled into the pid file, which we hold."""
        lock = self.own.get(inherited.PID_FILE)
        if lock is None:
            return
        try:
            text = b"%d\n" % self.parents.systemd.pid
            # In this order a reader always finds a whole pid in the first line.
            os.pwrite(lock, text, 0)
            os.ftruncate(lock, len(text))
        except OSError as error:
            log.write("error", "pid-file-not-written", error=error.strerror)
