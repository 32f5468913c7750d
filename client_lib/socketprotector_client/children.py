"""The forked children of a SocketServer's parent: forking, signals and reaping.

The parent waits for signals with sigwaitinfo, and has no handler.  So the parent never forks
in the middle of other work, and misses no early signal.
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

    #: A signal mask as pthread_sigmask returns it.
    _Mask = Set[Union[int, signal.Signals]]

_log = Logger(__name__)


class Children:
    """The living children of this process."""

    def __init__(self) -> None:
        self._pids: Set[int] = set()

    def run(
        self,
        work: Callable[[], object],
        count: int,
        stop: Callable[[], None],
        is_over: Callable[[], bool],
    ) -> None:
        """Fork `count` children that call work; return when all have ended and is_over() is true.

        Sends READY=1 once they are forked.  USR1 forks one more.
        stop: called at SIGTERM, if the program does not handle that signal.
        """
        news = {signal.SIGCHLD, signal.SIGUSR1}
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            news.add(signal.SIGTERM)
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would never be delivered
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
        """Send SIGTERM to all children."""
        for pid in self._pids:
            os.kill(pid, signal.SIGTERM)  # not reaped yet, so the pid is still the child's

    def _fork(self, work: Callable[[], object], mask: _Mask) -> None:
        _flush()  # otherwise the child would write buffered output again
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
            # Returning would run the parent's program in the child.
            os._exit(status)

    def _reap(self) -> None:
        for pid in list(self._pids):
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                ended, status = pid, 0  # the program has reaped this child itself
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
            pass  # the stream is missing, or its reader is gone
