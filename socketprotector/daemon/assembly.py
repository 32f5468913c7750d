"""Creates the parts of the resident process, and connects them.

An upgrade, or a restart after a kill, replaces the program of the resident process.  In this
package "an earlier program" ran before this program, and "the next program" will run after this
program.  If there was an earlier program, each part takes over its own descriptors and records.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import stat
from collections.abc import Callable, Sequence

from .. import __version__
from ..core.events import StopRequested
from ..core.fleet import Fleet
from ..core.snapshot import Snapshot
from ..model.errors import SystemRefused, what_failed
from ..model.settings import ListenerSettings, Settings
from ..system import inherited, late_modules, pid_file_removal, privileges, spawn
from ..system.cpu_quota import Quota, processors
from ..system.inherited import Inherited
from ..system.listeners import listener_of
from ..system.log import Log
from ..system.loop import Loop
from ..system.sd_notify import remove_folder
from ..system.state_file import NewerStateError, StateError, StateFile
from ..system.unix_listener import close_control
from . import recovery, releases, watch_client
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

#: If the guard's or systemd's socket is full, we send the message again after this pause.
_RESEND_PAUSE_S = 0.1
#: The names of the descriptors that Resident itself owns.
_OWN = (inherited.SETTINGS, inherited.STATE, inherited.PID_FILE, inherited.NOTIFY)
_STDERR = 2


class Resident:
    """All parts of the resident process, from its start to its exit."""

    def __init__(
        self,
        settings: Settings,
        listeners: Sequence[ListenerSettings],
        descriptors: dict[str, int],
        earlier: Snapshot | StateError | None,
        command: tuple[str, ...],
    ) -> None:
        """Take ownership of the descriptors.

        earlier: the state of an earlier program; StateError: why that state is unusable; None: no
        state.  command: the command line that executes this program again.
        """
        # A guard has copies of all descriptors.  systemd's store has them if we inherited a state.
        # Otherwise systemd's store has only listeners (stored_listeners.py), so store everything.
        has_copies = inherited.GUARD in descriptors or inherited.STATE in descriptors
        stored = descriptors.keys() - {inherited.GUARD} if has_copies else set()
        if isinstance(earlier, Snapshot):
            # An upgrade passed on the descriptors in left_out, for which the store had no room.
            stored -= set(earlier.left_out)
        kept = {name: descriptors[name] for name in stored}
        self.settings = settings
        self.unclaimed = unclaimed = Inherited(descriptors)
        #: The descriptors of _OWN, by name.
        self.own = {n: fd for n in _OWN if (fd := unclaimed.take_one(n)) is not None}
        self.earlier = earlier
        self.command = command
        self.output = Output(settings)
        self.parents = Parents(unclaimed.take_one(inherited.GUARD), kept, self._send_later)
        self.start_report = StartReport(
            unclaimed.take_one(inherited.LAUNCHER),
            unclaimed.take_one(inherited.TERMINAL),
        )
        self.delivery = delivery_for(settings.mode)
        self.listeners = adopt(unclaimed, listeners, self.delivery)
        control = unclaimed.take_one(inherited.CONTROL)
        self.control_listener = (
            listener_of(control, -1, settings.control)
            if control is not None and settings.control is not None
            else None
        )
        #: Whether the next program could resume from our state.
        self.is_resumable = False
        #: Whether this program is still adopting an earlier program's descriptors and state.
        self.is_adopting = False
        #: The names of the listening sockets that systemd keeps for the next start.
        self.surviving: tuple[str, ...] = ()
        self.watcher: watch_client.FileWatch | None = None
        self._releases: releases.Releases | None = None
        self._loop: Loop | None = None

    def supervise(self) -> int:
        """Resume from an earlier state, or start; return the exit status when the fleet has ended.

        If the earlier program was exiting, only complete its exit.  Raises StateError.
        """
        snapshot = self._snapshot_to_resume()
        if snapshot is not None and snapshot.fleet.exiting:
            return self._finish_exit(snapshot)
        self.is_resumable = self.is_adopting = snapshot is not None
        loop = self._become_resident()
        for listener in self.listeners:
            listener.claim(resumed=snapshot is not None)
        settings = self.settings
        log = Log(settings.log_level, prioritized=settings.to_syslog, form=settings.log_format)
        queue = EventQueue()
        checkpoint = Checkpoint(
            StateFile(self.own[inherited.STATE]), self.parents.store, log, self._descriptors
        )
        runtime = Runtime(loop, log, queue.post, checkpoint.save)
        self._begin_log(runtime, snapshot)
        supervisor = self._make_supervisor(runtime, queue, checkpoint)
        control = self._make_control(supervisor, runtime)
        self._watch_parents(supervisor, runtime)
        # Signals were blocked until now, because no part could handle them.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.is_resumable = True
        watchers = self.unclaimed.take_all(inherited.WATCH)
        if snapshot is None:
            self.unclaimed.close()
            supervisor.launch()
        else:
            supervisor.adopt(recovery.Recovery(supervisor.effects, snapshot, self.unclaimed))
            self.is_adopting = False
        live = supervisor.effects.live_settings

        def inform_guard() -> None:
            """Tell the guard that we handle signals, and which signal makes workers finish.

            The guard sends workers this signal (0: none) if it gives up restarting us.
            """
            self.parents.guard.send(f"X_BEGAN=1\nX_FINISH={live.settings.finish_signal}")

        inform_guard()
        live.on_used = inform_guard  # a reload may change --drain-signal
        if settings.watch or watchers:
            self.watcher = watch_client.FileWatch(settings, runtime)
            self.watcher.start(watchers)

        def pack() -> None:
            for _ in late_modules.pack():  # yields after each compressed part
                supervisor.yield_to_accepts()

        loop.call_after("pack", late_modules.PACK_AFTER_S, pack)
        status = supervisor.run()
        if control is not None:
            control.finish()
        self.surviving = supervisor.effects.close()
        if self.watcher is not None:
            self.watcher.close()
        if control is not None:
            control.close()
        log.close()
        return status

    def _snapshot_to_resume(self) -> Snapshot | None:
        """Return the snapshot of an earlier program; None: there is none.

        Also make the state memfd, unless there is one.  Raises StateError and SystemRefused.
        """
        if isinstance(self.earlier, StateError):
            if isinstance(self.earlier, NewerStateError):
                self.is_resumable = not self.start_report.is_due  # a start that is not over fails
            raise self.earlier
        if inherited.STATE not in self.own:
            try:
                self.own[inherited.STATE] = StateFile.make().fd
            except OSError as error:
                raise SystemRefused(f"cannot keep the state in memory: {error.strerror}") from error
        return self.earlier

    def _finish_exit(self, snapshot: Snapshot) -> int:
        """Complete the exit that an earlier program began; return the exit status."""
        ours = [each for each in self.listeners if not each.settings.foreign]
        if self.parents.keeps_after_exit(name for each in ours for name in each.descriptors()):
            self.surviving = self.delivery.leave(ours, snapshot.delivery)
        self._close_listeners()
        return snapshot.fleet.exit_status

    def _become_resident(self) -> Loop:
        """Set the limits and priority of this process; return its loop."""
        settings, quota = self.settings, Quota()

        def has_spare_core() -> bool:
            """Return whether busy polling takes no time from clients and workers.

            On a single core, workers and local clients could not run while we poll.  Under a CPU
            quota of one core or less, polling would use up the workers' time.
            """
            return processors() > 1 and quota.processors() > 1

        self._loop = loop = Loop(settings.busy_poll_s, has_spare_core)
        # This process needs descriptors for each worker and each draining generation, so raise its
        # soft limit.  Workers get settings.nofile_soft instead.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        spawn.use_batch_policy()
        if settings.worker_identity is not None:
            # Workers must not inherit capabilities that came from the guard or by an upgrade.
            privileges.reclaim()
        return loop

    def _begin_log(self, runtime: Runtime, snapshot: Snapshot | None) -> None:
        """Open the log, and write its first events; after a resume, also write the pid file."""
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

    def _watch_parents(self, supervisor: Supervisor, runtime: Runtime) -> None:
        """Handle the messages and the exits of the guard and of the launching process."""
        log, pool = runtime.log, supervisor.effects.pool

        def on_guard_gone() -> None:
            """Record that no guard runs; if there was a guard, log its exit as an error."""
            if self.parents.line is not None:
                hint = (
                    "the next crash of SocketProtector loses connections; restart SocketProtector"
                    " when convenient"
                )
                log.write("error", "guard-died", hint=hint)
                self._write_pid(log)
            pool.guarded = False
            if self.earlier is not None or self.parents.line is not None:
                # Before a first start, the launching process does so.
                privileges.become_subreaper()

        pool.leftovers.has_manager = self.parents.line is None and self.parents.store.keeps
        self.parents.watch(runtime.loop, pool.learn_status, on_guard_gone)

        def waits_of_start() -> Sequence[object]:
            """Return the field `waits_for` of `status`."""
            fleet, effects = supervisor.fleet, supervisor.effects
            found = status.of_generations(fleet, effects)
            waits: Sequence[object] = status.of_waits_for(fleet, effects, found, {}, "").get(
                "waits_for", ()
            )
            return waits

        self.start_report.watch(
            runtime.loop, lambda: runtime.post(StopRequested(quick=True)), waits_of_start
        )

    def fail(self, reason: str) -> None:
        """Record why this program failed, and close the listeners: no next program will resume."""
        self.start_report.failure = self.start_report.failure or reason
        self._close_listeners()

    def finish(self, status: int) -> None:
        """Remove our files, and report the exit to the launching process, the guard and systemd.

        Only the surviving listeners stay in systemd's fd store.
        """
        store = self.parents.store
        if self.parents.line is None:
            if store.holds((inherited.PID_FILE,)):
                # systemd would keep the lock if we were killed below, and each start would fail.
                fcntl.flock(self.own[inherited.PID_FILE], fcntl.LOCK_UN)
            # Remove the settings from systemd's fd store.  If we are killed after that, the next
            # start finds no settings, so it starts normally, with the stored listeners.  systemd
            # may still pass the memfd.  So also empty it: inherited.is_ours() ignores it then.
            store.forget(inherited.SETTINGS)
            os.ftruncate(self.own[inherited.SETTINGS], 0)
        # The relay exits only once all copies of its pipes are closed, including the store's.
        for name in self.output.descriptors():
            store.forget(name)
        self.output.finish()
        if self._releases is not None:
            self._releases.link.close()
        if self.settings.notify_folder:
            remove_folder(self.settings.notify_folder)
        if self.settings.pid_file is not None and inherited.PID_FILE in self.own:
            pid_file_removal.remove(self.settings.pid_file, self.own[inherited.PID_FILE])
        self.start_report.failed(status)  # does nothing if the start has succeeded
        self.parents.finish(status, self.surviving)

    # -- the parts -------------------------------------------------------------

    def _begin_output(self, runtime: Runtime) -> None:
        settings = self.settings
        try:
            self.output.begin(self.unclaimed, runtime)
        except OSError as error:
            target = "to syslog" if settings.to_syslog else "of workers' output"
            purpose = " for --log-prefix" if settings.log_prefix else ""
            why = f"cannot start the relay {target}{purpose}: {what_failed(error)}"
            if settings.to_syslog or purpose:
                raise SystemRefused(why) from error
            # Only syslog and --log-prefix need a relay: otherwise workers can write to our stderr.
            self.output = Output(settings, relay_failed=True)
            runtime.log.reopen()
            runtime.log.write("warning", "notice", text=why)

    def _make_supervisor(
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
            survive_exit=self.parents.keeps_after_exit,
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
            Upgrade(self.command, runtime.loop, runtime.log, keeps_capabilities=keeps),
            runtime,
            reopen_logs=lambda: self._reopen_logs(runtime.log),
            on_signal=lambda number: self.parents.guard.send(f"X_TOOK={number:d}"),
            terminal=terminal_of(settings.foreground),
            outlives_terminal=settings.outlives_terminal,
        )
        if settings.current:
            lock = self.unclaimed.take_one(inherited.CURRENT)
            live = effects.live_settings
            live.releases = releases.Releases(lambda: live.settings, runtime, lock)
            self._releases = live.releases
        effects.probing.counts = lambda: status.counts_of(supervisor.fleet, effects)
        return supervisor

    def _descriptors(self) -> dict[str, int]:
        """Return, by name, the next program's descriptors; checkpoint.py adds those of Effects."""
        found = dict(self.own)
        if self.control_listener is not None:
            found[inherited.CONTROL] = self.control_listener.fileno()
        if self.watcher is not None:
            found |= self.watcher.descriptors()
        if self._releases is not None:
            found |= self._releases.link.descriptors()
        parts = (self.parents, self.start_report)
        return found | {name: fd for each in parts for name, fd in each.descriptors().items()}

    def _send_later(self, resend: Callable[[], None]) -> None:
        # Without a loop (a failed start, or _finish_exit()), Outbox.finish() sends all messages.
        if self._loop is not None:
            self._loop.call_after(resend, _RESEND_PAUSE_S, resend)

    def _reopen_logs(self, log: Log) -> str:
        """Reopen the log file; return why that failed, or ""."""
        if self.settings.log_file is None and stat.S_ISREG(os.fstat(_STDERR).st_mode):
            why = "stderr is a file, but only a --log-file can be reopened"
            log.write("error", "reopen-failed", error=why)
            return why
        try:
            self.output.reopen()
        except OSError as error:
            log.write("error", "reopen-failed", file=self.settings.log_file, error=error.strerror)
            return f"{self.settings.log_file}: {error.strerror}"
        # The guard, and each program that the guard starts, must write to the new file, too.
        if self.settings.log_file is not None:
            self.parents.guard.send("X_OUTPUT=1", _STDERR)
        log.reopen()
        log.write("info", "reopened")
        return ""

    # -- the control socket ----------------------------------------------------

    def _make_control(self, supervisor: Supervisor, runtime: Runtime) -> ControlServer | None:
        """Return the server of the control socket; None: no control socket is configured."""
        settings = self.settings
        if self.control_listener is None:
            return None

        def handle(client: Client, request: Request) -> None:
            with client.within_memory():  # if memory runs out here, the request has changed nothing
                handler = commands.CommandHandler(supervisor, runtime)
            if not client.gone:
                handler.handle(client, request)

        self.control_listener.claim(resumed=self.is_resumable)
        control = ControlServer(
            self.control_listener,
            runtime.loop,
            handle,
            supervisor.effects.pool.acked,
            uids=frozenset({0, os.getuid()}),
            group=settings.control_group,
            status_group=settings.status_group,
        )
        runtime.log.observe(control.send_event)
        return control

    # -- the end -------------------------------------------------------------------

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            if listener.fileno() >= 0:
                listener.close()
        if self.control_listener is not None and self.control_listener.fileno() >= 0:
            close_control(self.control_listener)

    def _write_pid(self, log: Log) -> None:
        """Write into our pid file the pid that operators should signal."""
        lock = self.own.get(inherited.PID_FILE)
        if lock is None:
            return
        try:
            text = b"%d\n" % self.parents.systemd.pid
            # Write before truncating, so that a reader always finds a whole pid in the first line.
            os.pwrite(lock, text, 0)
            os.ftruncate(lock, len(text))
        except OSError as error:
            log.write("error", "pid-file-not-written", error=error.strerror)
