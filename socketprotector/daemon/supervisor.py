"""The loop's centre: facts come in as events, `decide` answers, effects act.

Signals, pidfds, timers and notify sockets only put an event on the queue.  Nothing is
decided here but what a signal means.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable

from ..core.actions import Action, Hold, Open, ReadSettings, Report, ReportKind, RouteTo, Spawn
from ..core.decide import decide, resume
from ..core.events import HandingOver, Launched, ReloadRequested, ScaleRequested, StopRequested
from ..core.fleet import Fleet
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
from .upgrade import Upgrade

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .recovery import Recovery

#: How soon to look again whether the guard or systemd has read what it was sent, and
#: how long an upgrade waits for that: far longer than it takes one that reads at all.
_AGAIN_S = 0.05
_BEHIND_S = 10.0
#: The timer that runs while it does.
_HAND_OVER = "hand-over"
#: After so much work of ours clients that wait are accepted: to start a worker takes 1 ms.
_YIELD_AFTER_S = 0.005
#: How soon to look again behind a child that another object here reaps; later each time in a row.
_FIRST_REAP_S = 0.01
_LAST_REAP_S = 1.0
#: What cannot be repeated, so that the state tells at once that it was done: what was made must be
#: known; and a verdict, said twice, would be taken for that of another reload.
_WRITTEN_AT_ONCE = (
    *(Open, Spawn),
    *(ReportKind.RELOADED, ReportKind.RECOVERED, ReportKind.RELOAD_FAILED),
    *(ReportKind.DRY_RUN_PASSED, ReportKind.DRY_RUN_FAILED),
)
_NOT_KEPT = "the state cannot be written, or the guard or systemd is behind"


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
    reopen_logs: Callable[[], None]
    #: Told of each signal that has come, before it is acted on.
    took: Callable[[int], object]
    #: A descriptor of the terminal that a foreground protector lives on.
    terminal: int | None
    #: It was started so as to go on without (nohup).
    outlives_terminal: bool
    _unfinished: deque[Action] = field(default_factory=deque)  # decided, maybe not carried out
    # Those of them that the state tells of: it is written for each of a thousand spawns.
    _recorded: deque[Action] = field(default_factory=deque)
    _working: bool = False
    _handing_over: bool = False
    _yield_at: float = 0.0  # when to accept the next time

    def __post_init__(self) -> None:
        effects = self.effects
        self.checkpoint.begin(effects, lambda: effects.snapshot(self.fleet, self._recorded))
        self.queue.drain = self._work
        # SIGCHLD, too: ignored, as by our caller, it would have the kernel throw away how workers
        # ended.  Their own ends come by pidfds.
        self.runtime.loop.catch((*signals.TO_THE_PROTECTOR, signal.SIGCHLD), self._signalled)

    def launch(self) -> None:
        """Begin with the first generation."""
        self.runtime.post(Launched())

    def adopt(self, recovery: Recovery) -> None:
        """Go on where another program stopped."""
        snapshot = recovery.snapshot
        self.fleet = snapshot.fleet
        self._working = True  # what comes back meanwhile waits until all of it stands again
        now = time.monotonic()
        left_s = {each: due - now for each, due in snapshot.timers}
        self._order(resume(self.fleet, left_s, (*snapshot.unfinished, *snapshot.unsaid)))
        self.queue.add(recovery.adopt())
        self._act(Hold, RouteTo)  # so that no client has to wait for what follows
        for events in recovery.adopt_workers():
            self.queue.add(events)
            self._yield_to_accepts()
        self._act()
        self.effects.reports.welcome(self.fleet)
        self._working = False
        self._work()

    def run(self) -> int:
        """Supervise until nothing is left but to close it.  Returns the exit status."""
        self._reap_orphans()  # an earlier program may have been told, and not come to it
        self.runtime.loop.run()
        self.upgrade.end()
        return self.effects.exit_status or 0

    def _work(self) -> None:
        """Work the queue off; what is posted meanwhile has its turn then."""
        if self._working:
            return
        self._working = True
        acted = True  # the caller may have
        try:
            for event in self.queue:
                self.fleet, actions = decide(self.fleet, event)
                self.runtime.log.write("debug", "decided", about=event, actions=list(actions))
                self._order(actions)
                self.runtime.persist()
                acted = bool(self._unfinished)
                self._act()
                self._yield_to_accepts()
        finally:
            self._working = False
        if acted:
            self.runtime.persist()

    def _order(self, actions: Iterable[Action]) -> None:
        """Have these carried out after the others."""
        for each in actions:
            self._unfinished.append(each)
            if isinstance(each, RECORDED):
                self._recorded.append(each)

    def _act(self, *kinds: type[Action]) -> None:
        """Carry out what was decided.  Killed in the middle of one, the next program repeats it.

        kinds: go no further than these.
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
            self._yield_to_accepts()

    def _yield_to_accepts(self) -> None:
        """Go back to the connections in the middle of what concerns many workers.

        And to the watchdog; all else waits, so that one event is worked off after the other.
        """
        if time.monotonic() >= self._yield_at:
            self.effects.delivery.look()
            self.runtime.loop.run_if_due(WATCHDOG)
            self._yield_at = time.monotonic() + _YIELD_AFTER_S

    def begin_upgrade(self) -> None:
        """Ask the new program whether it can take over; it is executed when it says so."""
        if self._handing_over:
            return
        if self.runtime.loop.due(_HAND_OVER) is not None:
            self.runtime.log.write("info", "upgrade-under-way")
        elif self.checkpoint.write():
            self.upgrade.begin(self.checkpoint.descriptors(), self._hand_over)
        else:
            self.upgrade.failed(_NOT_KEPT)

    def upgrade_waits_for(self) -> str:
        """Return what an upgrade waits for, in words; "" without one."""
        if self.runtime.loop.due(_HAND_OVER) is not None:
            return "the guard or systemd has not taken over all descriptors yet"
        return "the new program is asked whether it can take over" if self.upgrade.probes else ""

    def _hand_over(self, give_up_at: float | None = None) -> None:
        """Become the new program, which goes on after the last signal that has come to us.

        give_up_at: where the guard or systemd was waited for before.
        """
        store = self.checkpoint.store
        if self.fleet.dry_run and store.flushed:
            # As late as can be: where the upgrade fails for want of that, the dry run goes on.
            self.runtime.post(HandingOver())
        if not store.flushed:  # the next program relies on that
            self._hand_over_later(give_up_at)
            return
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._handing_over = True
        # Those whose handler has run are known to this program alone.
        self.runtime.loop.take_signals()
        if self.effects.exit_status is not None:
            pass  # nothing is left to go on with
        elif self.checkpoint.write():
            self.effects.suspend()
            self.upgrade.execute(self.checkpoint.descriptors())
            self.effects.resume()
            if self.fleet.reading:
                self.effects.perform(ReadSettings(self.fleet.dry_run))
        else:
            self.upgrade.failed(_NOT_KEPT)
        self._handing_over = False
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _hand_over_later(self, give_up_at: float | None) -> None:
        """Wait for the guard or systemd to catch up, but not for ever."""
        now = time.monotonic()
        if give_up_at is None:
            give_up_at = now + _BEHIND_S
            self.runtime.log.write(
                "warning", "upgrade-waits", hint="waiting for the guard or systemd to catch up"
            )
        elif now >= give_up_at:
            self.upgrade.failed(
                f"the guard or systemd has not read on for {in_units(_BEHIND_S)}: it hangs"
            )
            return
        self.runtime.loop.call_after(_HAND_OVER, _AGAIN_S, lambda: self._hand_over(give_up_at))

    def _reap_orphans(self, again_s: float = _FIRST_REAP_S) -> None:
        """Reap discarded children, and those left to us as PID 1 of a container or sub-reaper."""
        reaped, more = reap_orphans()
        if reaped:
            self.effects.pool.groups.look()  # it may have been a worker's child
        if more:
            later_s = min(2 * again_s, _LAST_REAP_S)
            delay_s = 0.0 if reaped else again_s
            self.runtime.loop.call_after("reap", delay_s, lambda: self._reap_orphans(later_s))

    def _signalled(self, number: int) -> None:
        if number == signal.SIGCHLD:
            # When those have been called back that wait for a child of their own.
            self.runtime.loop.call_after("reap", 0.0, self._reap_orphans)
            return
        # Before, so that one that is our end is not that of the next program as well.
        self.took(number)
        self.runtime.log.write("info", "signal", signal=signal.Signals(number).name)
        match number:
            case signal.SIGHUP if self._terminal_is_gone():
                if not self.outlives_terminal:
                    self.runtime.post(StopRequested())
            case signal.SIGHUP:
                self.runtime.post(ReloadRequested())
            case signal.SIGTERM | signal.SIGQUIT:
                self.runtime.post(StopRequested())
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

    def scale(self, asked: ScaleRequested) -> str | None:
        """Have another number of workers; return why that cannot be, None if it can."""
        settings, now = self.effects.live_settings.settings, self.fleet.workers_wanted
        wanted = now + asked.change if asked.to is None else asked.to
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        cannot = settings.mode.cannot.get("scale")
        if cannot is None and wanted > now:
            cannot = fd_budget.refused(settings, wanted, hard)
            doubtful = fd_budget.doubtful(settings, wanted, hard)
            if cannot is None and doubtful is not None:
                self.runtime.log.write("warning", "notice", text=doubtful)
        if cannot is None:
            self.runtime.post(asked)
        return cannot

    def _scale_by(self, change: int) -> None:
        cannot = self.scale(ScaleRequested(change))
        if cannot is not None:
            self.runtime.log.write("warning", ReportKind.REFUSED.value, reason=cannot)

    def _terminal_is_gone(self) -> bool:
        return self.terminal is not None and bool(events_of(self.terminal, 0) & select.POLLHUP)


def terminal_of(foreground: bool) -> int | None:
    """Return a descriptor of the terminal that we live on, if there is one.

    The controlling one, whose end sends HUP, whatever stdin, stdout and stderr are (nohup
    turns all three away from it).
    """
    if not foreground:
        return None
    try:
        return os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return next((os.dup(fd) for fd in (0, 1, 2) if os.isatty(fd)), None)
