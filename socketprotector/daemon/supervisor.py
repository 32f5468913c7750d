"""Passes each event to core/decide.py, and the resulting actions to effects.py.

Two decisions are made here, not in core/: what a signal means, and whether an upgrade, a dry run or
`scale` is possible.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable

from ..core.actions import Action, Hold, Open, Report, ReportKind, RouteTo, Spawn
from ..core.decide import decide, resume
from ..core.events import HandingOver, Launched, ReloadRequested, ScaleRequested, StopRequested
from ..core.fleet import Fleet, Phase
from ..core.rollout import read_settings
from ..model import fd_budget
from ..model.lazy_dataclass import KW_ONLY, field, mutable
from ..model.text import in_units
from ..system import signals
from ..system.polling import events_of
from ..system.process import reap_orphans
from ..system.sd_notify import WATCHDOG
from .checkpoint import Checkpoint
from .effects import RECORDED, Effects
from .event_queue import EventQueue
from .runtime import Runtime
from .upgrade import Answered, Upgrade

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .recovery import Recovery

#: After its trial, an upgrade waits until the guard or systemd has all descriptors.  We check this
#: every _AGAIN_S, for at most _LONGEST_WAIT_S.
_AGAIN_S = 0.05
_LONGEST_WAIT_S = 10.0
#: The timer of an upgrade that waits for the guard or systemd.
_HAND_OVER = "hand-over"
#: The shortest and the longest time that we work before the delivery accepts waiting clients again
#: (see yield_to_accepts()).
_YIELD_AFTER_S = 0.001
_MOST_WORK_S = 0.005
#: waitid() returns the same ended child until the child is reaped.  If a `Process`
#: (system/process.py) owns this child, only the `Process` may reap it.  Until then the child hides
#: other ended children, so we look again after this pause, which doubles each time, up to
#: _LAST_REAP_S.
_FIRST_REAP_S = 0.01
_LAST_REAP_S = 1.0
#: Actions, and kinds of Report, after which the state is written at once.  Otherwise, after a kill,
#: the next program could repeat such an action: start a generation or a worker twice, or report a
#: reload twice.
_WRITTEN_AT_ONCE = (
    *(Open, Spawn),
    *(ReportKind.RELOADED, ReportKind.RECOVERED, ReportKind.RELOAD_FAILED),
    *(ReportKind.DRY_RUN_PASSED, ReportKind.DRY_RUN_FAILED),
)
#: With a guard, a signal to our process group, or by `pkill SocketProtector`, reaches us twice: the
#: guard passes it on, too.  So a stop signal this soon after the first does not count.
_REPEATED_S = 0.5
_NOT_KEPT = "the state cannot be written, or not all descriptors have reached the guard or systemd"


@mutable
class Supervisor:
    """Owns the fleet: no other module changes it."""

    fleet: Fleet
    queue: EventQueue
    effects: Effects
    checkpoint: Checkpoint
    upgrade: Upgrade
    runtime: Runtime
    _: KW_ONLY
    reopen_logs: Callable[[], str]  # returns why reopening failed, or ""
    #: Called with each signal except SIGCHLD, before we act on it.
    on_signal: Callable[[int], object]
    #: A descriptor of the terminal that a foreground protector runs on.
    terminal: int | None
    #: Whether the protector was started to survive its terminal (nohup).
    outlives_terminal: bool
    _unfinished: deque[Action] = field(default_factory=deque)  # decided, not yet carried out
    # The actions of _unfinished that are RECORDED (effects.py), which every snapshot needs.  The
    # state is written after each spawn, perhaps a thousand times, so a write must not search
    # _unfinished.
    _recorded: deque[Action] = field(default_factory=deque)
    _working: bool = False
    _handing_over: bool = False
    _yield_at: float = 0.0  # when yield_to_accepts() next lets the delivery accept clients
    _stop_at: float = float("-inf")  # when the last stop signal that counts was carried out

    def __post_init__(self) -> None:
        effects = self.effects
        self.checkpoint.begin(effects, lambda: effects.snapshot(self.fleet, self._recorded))
        self.queue.drain = self._work
        # Catch SIGCHLD, too: if our caller has ignored SIGCHLD, the kernel would otherwise discard
        # the workers' exit statuses.
        self.runtime.loop.catch((*signals.TO_THE_PROTECTOR, signal.SIGCHLD), self._signalled)

    def launch(self) -> None:
        """Start the first generation."""
        self.runtime.post(Launched())

    def adopt(self, recovery: Recovery) -> None:
        """After an upgrade or a kill, resume where the earlier program stopped."""
        snapshot = recovery.snapshot
        self.fleet = snapshot.fleet
        self._working = True  # events wait until everything is restored
        now = time.monotonic()
        left_s = {each: due - now for each, due in snapshot.timers}
        self._order(resume(self.fleet, left_s, (*snapshot.unfinished, *snapshot.unsaid)))
        self.queue.add(recovery.adopt())
        self._act(Hold, RouteTo)  # first: clients need not wait until all workers are adopted
        for events in recovery.adopt_workers():
            self.queue.add(events)
            self.yield_to_accepts()
        self._act()
        self.effects.reports.repeat_messages(self.fleet)
        self._working = False
        self._work()

    def run(self) -> int:
        """Supervise until the fleet has ended; return the exit status."""
        self._reap_orphans()  # an earlier program may not have reaped all ended children
        self.runtime.loop.run()
        self.upgrade.end()
        if (releases := self.effects.live_settings.releases) is not None:
            releases.link.move_if_due()  # while the log is open
        return self.effects.exit_status or 0

    def _work(self) -> None:
        """Drain the event queue, including events that are posted meanwhile."""
        if self._working:
            return
        self._working = True
        acted = True  # after adopt(), write the state even if there is no event
        try:
            for event in self.queue:
                self.fleet, actions = decide(self.fleet, event)
                self.runtime.log.write("debug", "decided", about=event, actions=list(actions))
                self._order(actions)
                self.runtime.persist()
                acted = bool(self._unfinished)
                self._act()
                self.yield_to_accepts()
        finally:
            self._working = False
        if acted:
            self.runtime.persist()

    def _order(self, actions: Iterable[Action]) -> None:
        for each in actions:
            self._unfinished.append(each)
            if isinstance(each, RECORDED):
                self._recorded.append(each)

    def _act(self, *kinds: type[Action]) -> None:
        """Carry out the unfinished actions.

        kinds: stop at the first action of another kind; none given: carry out all actions.
        """
        while self._unfinished and (not kinds or isinstance(self._unfinished[0], kinds)):
            action = self._unfinished[0]
            self.effects.perform(action)
            self._unfinished.popleft()
            if self._recorded and self._recorded[0] is action:
                self._recorded.popleft()
            kind = action.news if isinstance(action, Report) else type(action)
            if kind in _WRITTEN_AT_ONCE:
                self.runtime.persist()
            self.yield_to_accepts()

    def yield_to_accepts(self) -> None:
        """During long work, notify systemd's watchdog, and let the delivery accept waiting clients.

        Everything else waits, so that events are handled one after another.
        """
        begin = time.monotonic()
        if begin >= self._yield_at:
            self.effects.delivery.accept_waiting()
            end = time.monotonic()
            self.runtime.loop.run_if_due(WATCHDOG)
            # Before the next call of accept_waiting() we work for at least _YIELD_AFTER_S.  If the
            # call above took long, as with hundreds of listeners, we work for twice as long as the
            # call took, but for at most _MOST_WORK_S.
            work_s = min(2 * (end - begin), _MOST_WORK_S)
            self._yield_at = time.monotonic() + max(_YIELD_AFTER_S, work_s)

    def begin_upgrade(self) -> None:
        """Run a trial of the new program (upgrade.py); if that succeeds, execute the program."""
        if self._handing_over:
            return
        if self.runtime.loop.due(_HAND_OVER) is not None:
            self.runtime.log.write("info", "upgrade-under-way")
        elif self.checkpoint.write():
            self.upgrade.begin(self.checkpoint.descriptors(), self._hand_over)
        else:
            self.upgrade.failed(_NOT_KEPT)

    def check_upgrade(self, answered: Answered, is_gone: Callable[[], bool]) -> None:
        """Try the new program with a copy of the state, and call `answered`.

        Raises OSError or StateError if the state cannot be copied.  Call this only if no upgrade
        and no other check is in progress.

        is_gone: whether the check's client has gone.
        """
        copies = self.checkpoint.copies()
        self.upgrade.check(copies, answered, is_gone)
        for fd in copies.values():
            os.close(fd)

    def upgrade_waits_for(self) -> str:
        """Return what an upgrade waits for, in words; "": no upgrade waits."""
        if self.runtime.loop.due(_HAND_OVER) is not None:
            return "the guard or systemd has not taken all descriptors yet"
        return "trying the new program" if self.upgrade.is_trying else ""

    def _hand_over(self, give_up_at: float | None = None) -> None:
        """Execute the new program once every signal is handled and every descriptor is stored.

        give_up_at: when to stop waiting for the guard or systemd; None: not waiting yet.
        """
        store = self.checkpoint.store
        if self.fleet.dry_run and store.flushed:
            # HandingOver ends the dry run, so post HandingOver only when the upgrade need not wait.
            self.runtime.post(HandingOver())
        # The end of the dry run may have sent the store more messages, so look again.
        if not store.flushed:
            # The new program assumes that the store already has all inherited descriptors.
            self._hand_over_later(give_up_at)
            return
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._handing_over = True
        # Handle the signals that have already arrived, because the exec would lose them.  Later
        # signals are blocked, stay pending across the exec, and reach the new program.
        self.runtime.loop.take_signals()
        if self.effects.exit_status is not None:
            pass  # the fleet has ended: there is nothing to hand over
        elif self.checkpoint.write():
            self.effects.suspend()
            self.upgrade.execute(self.checkpoint.descriptors())
            self.effects.resume()
            if self.fleet.reading:  # suspend() has ended the process that reads the configuration
                self.effects.perform(read_settings(self.fleet))
        else:
            self.upgrade.failed(_NOT_KEPT)
        self._handing_over = False
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _hand_over_later(self, give_up_at: float | None) -> None:
        """Try again until the guard or systemd has the descriptors, for up to _LONGEST_WAIT_S."""
        now = time.monotonic()
        if give_up_at is None:
            give_up_at = now + _LONGEST_WAIT_S
            self.runtime.log.write(
                "warning",
                "upgrade-waits",
                hint="waiting for the guard or systemd to take all descriptors",
            )
        elif now >= give_up_at:
            self.upgrade.failed(
                f"the guard or systemd has not responded for {in_units(_LONGEST_WAIT_S)}; try again"
            )
            return
        self.runtime.loop.call_after(_HAND_OVER, _AGAIN_S, lambda: self._hand_over(give_up_at))

    def _reap_orphans(self, again_s: float = _FIRST_REAP_S) -> None:
        """Reap the ended children that no `Process` reaps, such as orphans that we have adopted."""
        reaped, more = reap_orphans()
        if reaped:
            self.effects.pool.groups.look()  # the reaped process may have been in a worker's group
        if more:
            later_s = min(2 * again_s, _LAST_REAP_S)
            delay_s = 0.0 if reaped else again_s
            self.runtime.loop.call_after("reap", delay_s, lambda: self._reap_orphans(later_s))

    def _signalled(self, number: int) -> None:
        if number == signal.SIGCHLD:
            # Wait for the end of this turn of the loop: in this turn the pidfds of workers and
            # helpers report exits, and each `Process` reaps its own child.
            self.runtime.loop.call_after("reap", 0.0, self._reap_orphans)
            return
        # First report the signal to the guard: if we die, the guard sends the next program each
        # signal that we have not reported.  For a stop signal this report does not suffice: the
        # guard keeps the signal until we report that the stop has begun.
        self.on_signal(number)
        self.runtime.log.write("info", "signal", signal=signal.Signals(number).name)
        match number:
            case signal.SIGHUP if self._terminal_is_gone():
                if not self.outlives_terminal:
                    self._stop_signalled()
            case signal.SIGHUP:
                self.runtime.post(ReloadRequested())
            case signal.SIGTERM | signal.SIGQUIT:
                self._stop_signalled()
            case signal.SIGINT:
                self.runtime.post(StopRequested(quick=True))
            case signal.SIGTTIN:
                self._scale_by(+1)
            case signal.SIGTTOU:
                self._scale_by(-1)
            case signal.SIGUSR1:
                self.reopen_logs()
            case signal.SIGUSR2:
                self.begin_upgrade()

    def _stop_signalled(self) -> None:
        since_s = time.monotonic() - self._stop_at
        if not self.effects.pool.guarded or since_s >= _REPEATED_S:
            self.runtime.post(StopRequested())
            # Only now: the guard's copy of the signal waits while we carry out the first.
            self._stop_at = time.monotonic()

    def cannot_dry_run(self) -> str | None:
        """Return why no dry run can begin now, or None."""
        settings = self.effects.live_settings.settings
        if no_dry_run := settings.policy.order.no_dry_run:
            return no_dry_run
        if self.fleet.dry_run:
            return "another dry run is in progress; try again later"
        if self.fleet.is_changing:
            return "a start, reload or replacement is in progress; try again later"
        if self.fleet.of(Phase.SERVING) is None:
            return "no generation is serving; reload instead"
        return settings.mode.cannot.get("dry-run") or self.effects.delivery.cannot_dry_run()

    def scale(self, request: ScaleRequested) -> str | None:
        """Change the number of workers; return why that is impossible, or None."""
        settings, before = self.effects.live_settings.settings, self.fleet.workers_wanted
        wanted = before + request.change if request.to is None else request.to
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        cannot = settings.mode.cannot.get("scale")
        if cannot is None and wanted > before:
            cannot = fd_budget.refused(settings, wanted, hard)
            doubtful = fd_budget.doubtful(settings, wanted, hard)
            if cannot is None and doubtful is not None:
                self.runtime.log.write("warning", "notice", text=doubtful)
        if cannot is None:
            self.runtime.post(request)
        return cannot

    def _scale_by(self, change: int) -> None:
        cannot = self.scale(ScaleRequested(change))
        if cannot is not None:
            self.runtime.log.write("warning", ReportKind.REFUSED.value, reason=cannot)

    def _terminal_is_gone(self) -> bool:
        return self.terminal is not None and bool(events_of(self.terminal, 0) & select.POLLHUP)


def terminal_of(foreground: bool) -> int | None:
    """Return a descriptor of the terminal that we run on.

    None: there is no terminal, or we do not run in the foreground.

    Prefer the controlling terminal, because the kernel sends HUP when this terminal is closed.
    Under nohup, stdin, stdout and stderr may lead elsewhere.
    """
    if not foreground:
        return None
    try:
        return os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return next((os.dup(fd) for fd in (0, 1, 2) if os.isatty(fd)), None)
