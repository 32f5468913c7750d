"""The forked children of a SocketServer's parent: forking, signals, reaping and replacing.

The parent waits for signals, and its handlers do nothing.  So the parent never forks in the
middle of other work.  A child that changes its state sends SIGCHLD to its parent.  The kernel sends
SIGCHLD, too, when a child ends.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import time

from . import child_output, wire
from .log import Logger
from .sd_notify import notify
from .seat import LEAVING, MOST, READY, STARTING, Seats
from .signals import SignalWait
from .worker import current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, Optional, Set

_log = Logger(__name__)

#: How many children in a row may fail at their start before each further fork is delayed, and the
#: first and longest delay.
_FREE_FAILURES = 3
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0


class Children:
    """The living children of this process."""

    def __init__(self) -> None:
        self._numbers: Dict[int, int] = {}  # by pid; each child has the lowest free number
        self._seats: Optional[Seats] = None
        self._wanted = 0
        self._has_started = False  # all children were ready once
        self._failures = 0  # children in a row that ended before they were ready
        self._fork_at = 0.0
        self._aborted: Set[int] = set()
        self._next_turn_at = 0.0

    def run(
        self,
        work: Callable[[], object],
        count: int,
        stop: Callable[[], None],
        is_over: Callable[[], bool],
        is_left: Callable[[], bool],
        *,
        allow_threads: bool = False,
    ) -> None:
        """Fork `count` children that call work; until is_over(), replace each child that ends.

        Sends READY=1 once all serve.  USR1 forks one more.  Returns when all have ended.
        stop: called at SIGTERM, if the program does not handle that signal.
        is_over: whether no more connections will come.
        is_left: whether clients still wait after that; if all children have died, more are forked
        for these clients.

        Raises ValueError for too few or too many children, RuntimeError if other threads run, and
        ChildProcessError if a child ends before all have served.
        """
        # Without a child READY=1 would be a lie, and a stop would wait for the queued clients.
        if not 1 <= count <= MOST:
            raise ValueError(f"cannot fork {count} processes: 1 to {MOST} are possible")
        news = {signal.SIGCHLD, signal.SIGUSR1}
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            news.add(signal.SIGTERM)
        _prepare(allow_threads=allow_threads)
        self._seats, self._wanted = Seats(), count
        # A finishing child and its replacement each have a record.
        current().board.open_children(2 * count)
        signals = SignalWait(news)
        # Only USR1: a program that blocks another signal may wait for it in a thread of its own.
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        try:
            while True:
                self._reap(is_over)
                over = is_over()
                if over and not self._numbers:
                    if self._failures > _FREE_FAILURES or not is_left():
                        return
                    over = False
                if not over:
                    self._fill(work, signals)
                self._look()
                found = signals.wait(self._due(over=over))
                self._wanted += found.count(signal.SIGUSR1)
                # `found` also has signals that the program itself handles.
                if news & {signal.SIGTERM} & set(found):
                    stop()
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, blocked & {signal.SIGUSR1})
            signals.close()
            self._seats.close()  # the remaining children see the end of the pipe, and finish

    def terminate(self) -> None:
        """Send SIGTERM to all children."""
        for pid in self._numbers:
            os.kill(pid, signal.SIGTERM)  # not reaped yet, so the pid is still the child's

    def _state(self, number: int) -> int:
        return self._seats.state(number) if self._seats is not None else STARTING

    @property
    def _missing(self) -> int:
        taking = [each for each in self._numbers.values() if self._state(each) != LEAVING]
        return self._wanted - len(taking)

    def _due(self, *, over: bool) -> Optional[float]:
        """Return the time of the next action that needs no signal; None if there is none."""
        due = []
        if not over and self._missing > 0:
            due.append(self._fork_at)
        if current().watchdog_s and self._has_started:
            due.append(self._next_turn_at)
        return min(due) if due else None

    def _look(self) -> None:
        """Send READY=1 once all serve; then WATCHDOG=1, and end the children that are stuck."""
        ready = [each for each in self._numbers.values() if self._state(each) == READY]
        if len(ready) >= self._wanted and not self._has_started:
            self._has_started = True
            current().ready(takes=False)
        every_s = current().watchdog_s
        if not (every_s and self._has_started) or time.monotonic() < self._next_turn_at:
            return
        self._next_turn_at = time.monotonic() + every_s
        notify("WATCHDOG=1")
        for pid, number in self._numbers.items():
            silent_s = self._seats.silent_s(number) if self._seats is not None else 0.0
            if silent_s > 2 * every_s:
                _log.error("child %d is stuck: its loop has not turned for %.1f s", pid, silent_s)
                os.kill(pid, signal.SIGKILL if pid in self._aborted else signal.SIGABRT)
                self._aborted.add(pid)

    def _fill(self, work: Callable[[], object], signals: SignalWait) -> None:
        """Fork the missing children, unless children fail again and again."""
        while self._missing > 0 and time.monotonic() >= self._fork_at:
            try:
                self._fork(work, signals)
            except OSError as error:
                if not self._has_started and not self._numbers:
                    raise
                _log.error("cannot fork one more child: %s", error.strerror)
                self._failures = max(self._failures, _FREE_FAILURES)
                self._failed()

    def _fork(self, work: Callable[[], object], signals: SignalWait) -> None:
        taken = set(self._numbers.values())
        number = next((each for each in range(MOST) if each not in taken), None)
        if number is None or self._seats is None:
            raise OSError(0, f"there are {MOST} children")
        self._seats.clear(number)
        _flush()  # otherwise the child would write buffered output again
        pid = signals.fork()
        if pid:
            self._numbers[pid] = number
            return
        status = 1
        try:
            # A USR1 to the whole process group is meant for the parent.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            child_output.mark_lines(number)
            current().take_seat(self._seats, number)
            self._numbers = {}  # the siblings are no children of this process
            for hook in current().post_fork:
                hook(number)
            work()
            status = 0
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            _log.exception("child %d failed", os.getpid())
        finally:
            _exit(status)

    def _reap(self, is_over: Callable[[], bool]) -> None:
        for pid, number in list(self._numbers.items()):
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                ended, status = pid, 0  # the program has reaped this child itself
            if ended:
                self._ended(pid, number, status)
                if not self._has_started and not is_over():
                    raise ChildProcessError(
                        f"cannot serve: child {pid} {_how(status)} before all children were ready"
                    )

    def _ended(self, pid: int, number: int, status: int) -> None:
        was_ready = self._state(number) != STARTING
        del self._numbers[pid]
        self._aborted.discard(pid)
        lost = current().board.end_child(number)
        if status or not was_ready:
            _log.error("child %d %s; %d left", pid, _how(status), len(self._numbers))
            shown = "-" if lost is None else str(lost)
            notify(f"{wire.CHILD}={number} {pid} {status} {shown}")
        if was_ready:
            self._failures = 0
        else:
            self._failed()

    def _failed(self) -> None:
        self._failures += 1
        if self._failures > _FREE_FAILURES:
            wait_s = _FIRST_WAIT_S * 2 ** min(self._failures - _FREE_FAILURES - 1, 10)
            self._fork_at = time.monotonic() + min(wait_s, _LONGEST_WAIT_S)


def _prepare(*, allow_threads: bool) -> None:
    """Freeze the loaded objects: the garbage collector would write to pages that children share.

    Raises RuntimeError if other threads run: a lock that a thread holds stays locked in a child.
    """
    others = [each for each in threading.enumerate() if each is not threading.current_thread()]
    if others and not allow_threads:
        names = ", ".join(repr(each.name) for each in others[:5])
        raise RuntimeError(
            f"cannot fork while threads run ({names}): a lock that such a thread holds would stay "
            f"locked in the children; start threads in a post_fork hook, or allow them "
            f"(allow_threads=True, --allow-threads)"
        )
    if native := _native_threads():
        _log.warning(
            "%d native threads run at the fork, such as numpy's; children do not have these "
            "threads, and a call that waits for one hangs (numpy: set OMP_NUM_THREADS=1)",
            native,
        )
    gc.collect()
    gc.freeze()


def _native_threads() -> int:
    """Return the number of threads that `threading` does not know; 0 if /proc is missing."""
    try:
        return max(0, len(os.listdir("/proc/self/task")) - threading.active_count())
    except OSError:
        return 0


def _how(status: int) -> str:
    return f"ended with {os.waitstatus_to_exitcode(status)}"


def _exit(status: int) -> None:
    """End this child as an interpreter ends, but without returning into the parent's program."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
        _flush()
    finally:
        os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # the stream is missing, or its reader is gone
