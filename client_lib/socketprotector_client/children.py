"""The children that a SocketServer's parent has forked: how they begin, and that they are reaped.

Signals are taken one by one where the parent waits, never in a handler: a child is forked
when nothing is half done, and no signal comes too early.
"""

from __future__ import annotations

import os
import signal
import sys

from .log import Logger
from .worker import current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Set, Union

    #: As pthread_sigmask gives it.
    _Mask = Set[Union[int, signal.Signals]]

_log = Logger(__name__)


class Children:
    """The children of this process that live."""

    def __init__(self) -> None:
        self._pids: Set[int] = set()

    def run(
        self,
        work: Callable[[], object],
        count: int,
        stop: Callable[[], None],
        is_over: Callable[[], bool],
    ) -> None:
        """Fork count children that call work; return when all have ended and is_over().

        Says READY=1 once they are forked.  stop: called at SIGTERM, where the program does not
        handle it.  USR1 forks one more.
        """
        news = {signal.SIGCHLD, signal.SIGUSR1}
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            news.add(signal.SIGTERM)
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or no signal comes at their end
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, news)
        try:
            for _ in range(count):
                self._fork(work, mask)
            current().ready()
            while self._pids or not is_over():
                number = signal.sigwaitinfo(news).si_signo
                if number == signal.SIGUSR1:
                    try:
                        self._fork(work, mask)
                    except OSError as error:
                        _log.error("cannot fork one more child: %s", error.strerror)
                elif number == signal.SIGTERM:
                    stop()
                else:
                    self._reap()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def terminate(self) -> None:
        """Send SIGTERM to all."""
        for pid in self._pids:
            os.kill(pid, signal.SIGTERM)  # not reaped yet, so the number is still theirs

    def _fork(self, work: Callable[[], object], mask: _Mask) -> None:
        _flush()  # or the child would write it once more
        pid = os.fork()
        if pid:
            self._pids.add(pid)
            return
        status = 1
        try:
            # A USR1 to the whole process group is meant for the parent.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            work()
            _flush()
            status = 0
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        except BaseException:
            _log.exception("child %d failed", os.getpid())
        finally:
            # Past here is the parent's program.
            os._exit(status)

    def _reap(self) -> None:
        for pid in list(self._pids):
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                ended, status = pid, 0  # the program has asked for it itself
            if ended:
                self._pids.discard(pid)
                if status:
                    code = os.waitstatus_to_exitcode(status)
                    _log.error("child %d ended with %d; %d left", pid, code, len(self._pids))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # there is none, or its reader is gone
