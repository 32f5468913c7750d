"""The loop's centre: facts come in as events, `decide` answers, effects act.

Signals, pidfds, timers and notify sockets only put an event on the queue.  Nothing is
decided here but what a signal means.
"""

from __future__ import annotations

import os
import select
import signal
from collections import deque
from collections.abc import Callable

from .effects import Effects
from .events import Event, Launched, ReloadRequested, ScaleRequested, StopRequested
from .fleet import Fleet
from .lifecycle import decide
from .log import Log
from .loop import Loop

_SIGNALS = (
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)


class Supervisor:
    """Holds the fleet and the queue of events; nobody else changes either."""

    def __init__(
        self,
        fleet: Fleet,
        effects: Callable[[Callable[[Event], None]], Effects],
        *,
        loop: Loop,
        log: Log,
        reopen_logs: Callable[[], None],
        terminal: int | None,
    ) -> None:
        """`effects` is given the queue's entrance and returns what carries actions out.

        terminal: a descriptor of the terminal that a foreground protector lives on.
        """
        self._fleet = fleet
        self._queue: deque[Event] = deque()
        self._working = False
        self._loop = loop
        self._log = log
        self._reopen_logs = reopen_logs
        self._terminal = terminal
        self._effects = effects(self.post)
        # Before our handlers replace it: whoever ignored HUP (nohup) wants to outlive the terminal.
        self._outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        # Ignored by the caller, it would have the kernel throw away how workers ended.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        loop.catch(_SIGNALS, self._signalled)
        # They were blocked before the exec, so that none of them could come too early.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def run(self) -> int:
        """Supervise until nothing is left.  Returns the exit status."""
        self.post(Launched())
        self._loop.run()
        self._effects.close()
        return self._effects.exit_status or 0

    def post(self, event: Event) -> None:
        """Put an event on the queue, and work the queue off unless that is going on."""
        self._queue.append(event)
        if self._working:
            return
        self._working = True
        try:
            while self._queue:
                event = self._queue.popleft()
                self._fleet, actions = decide(self._fleet, event)
                self._log.write("debug", "decided", about=event, actions=list(actions))
                for action in actions:
                    self._effects.perform(action)
        finally:
            self._working = False

    def _signalled(self, number: int) -> None:
        self._log.write("info", "signal", signal=signal.Signals(number).name)
        match number:
            case signal.SIGHUP if self._terminal_is_gone():
                if not self._outlives_terminal:
                    self.post(StopRequested())
            case signal.SIGHUP:
                self.post(ReloadRequested())
            case signal.SIGTERM | signal.SIGQUIT:
                self.post(StopRequested())
            case signal.SIGINT:
                self.post(StopRequested(quick=True))
            case signal.SIGTTIN:
                self.post(ScaleRequested(+1))
            case signal.SIGTTOU:
                self.post(ScaleRequested(-1))
            case signal.SIGUSR1:
                self._reopen_logs()
            case _:
                self._log.write("warning", "refused", reason="no upgrade in place yet")

    def _terminal_is_gone(self) -> bool:
        if self._terminal is None:
            return False
        poll = select.poll()
        poll.register(self._terminal, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))


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
