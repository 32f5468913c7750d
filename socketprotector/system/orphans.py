"""Ends processes that failed workers have left behind; lets workers without a record finish.

A program may detach itself, or fail while its children run.  It would keep its port and files
although the start is reported as failed.  Its processes have the worker's notify address, which is
random and unique, in their environment.  process_groups.py ends the processes in the worker's
group; this module ends the processes that have left the group.

If SocketProtector is killed between the start of a worker and the record of it, the worker may
already serve clients.  The next program can find this lost worker only here.  It lets the worker
finish, and passes on the fleet's orders, as for any worker.

proc_scan.py finds the processes.

Source: pidfd_send_signal(2).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from ..model.lazy_dataclass import mutable
from ..model.settings import Identity
from . import proc_scan, procfs
from .cleanup import on_error
from .log import Log
from .loop import Loop

#: The limit of rounds of KILL.
_MOST_KILLS = 10
#: The time until the next scan, which checks that signalled processes are gone.
_DEATH_S = 0.2
#: The time until the next scan for children that a lost worker has left.
_CHILDREN_S = 2.0
#: The time until the next scan if a scan has failed.
_SCAN_AGAIN_S = 1.0
#: The limit of a scan.  A scan that takes longer is stuck, and is killed.
_SCAN_S = 30.0
_TIMER, _TIMER_END = "orphans", "orphans-end"


@mutable
class _Search:
    """The search for the processes with one notify address."""

    #: The signal that the next scan sends to the processes it finds; 0: none.
    sign: int
    #: Whether this is a lost worker, which gets only signals that were ordered.
    lost: bool = False
    generation: int = 0
    finish: int = 0  # the signal that makes it finish; 0: it finishes without a signal
    asked: bool = False  # a signal was ordered
    kill_at: float | None = None  # when KILL is due; None: not decided yet
    kills: int = 0  # rounds of KILL
    gone: Callable[[], None] | None = None  # called when no process is left
    leader: tuple[int, int] | None = None  # the lost worker's pid and pidfd, which reports its exit
    seen: bool = False  # a scan was complete, and the lost worker has not exited since


class Orphans:
    """Ends the processes that failed workers leave, by TERM and KILL; lets lost workers finish."""

    def __init__(
        self,
        loop: Loop,
        log: Log,
        kill_timeout_s: float,
        identity: Identity | None,
        is_group_watched: Callable[[int], bool],
    ) -> None:
        """Begin without addresses; end() and watch() add them.

        identity: the user that the workers run as, if not ours.
        is_group_watched: returns whether process_groups.py watches a process group.
        """
        self._loop, self._log, self._identity = loop, log, identity
        self._is_group_watched = is_group_watched
        self.kill_timeout_s = kill_timeout_s
        self._searches: dict[str, _Search] = {}  # by notify address
        self._scan: proc_scan.Scan | None = None
        self._ended: Callable[[], None] | None = None  # called when all processes have ended
        self._blind = False  # /proc is unusable, and that was logged
        self._trouble = ""  # why the last scan failed

    @property
    def left(self) -> tuple[str, ...]:
        """The addresses of failed workers to scan for, now or when KILL is due."""
        return tuple(address for address, each in self._searches.items() if not each.lost)

    @property
    def orders(self) -> tuple[tuple[str, int], ...]:
        """The signals ordered for lost workers, by address; 0: the signal was sent already."""
        asked = ((a, each) for a, each in self._searches.items() if each.lost and each.asked)
        signs = ((a, each.sign if each.kill_at is None else signal.SIGKILL) for a, each in asked)
        return tuple((address, int(sign)) for address, sign in signs)

    @property
    def found(self) -> bool:
        """Whether a scan has found processes and sent them TERM, or KILL was ordered."""
        return any(each.kill_at is not None for each in self._searches.values())

    def end(self, address: str) -> None:
        """End the processes that have this notify address in their environment."""
        self._searches.setdefault(address, _Search(signal.SIGTERM))
        self._scan_after(0.0)

    def watch(self, address: str, generation: int, finish: int, gone: Callable[[], None]) -> None:
        """Watch a lost worker that has this address, until its last process is gone.

        If end() was called for the address, the worker had failed.
        finish: the signal that retire() sends; 0: none, because the worker's RETURN line has ended.
        gone: called when no such process is left.
        """
        search = self._searches.setdefault(address, _Search(0, lost=True))
        search.generation, search.finish, search.gone = generation, finish, gone
        self._scan_after(0.0)

    def retire(self, addresses: Collection[str]) -> None:
        """Order the lost worker with one of these addresses to finish; do this only once."""
        for each in self._lost(addresses):
            if each.finish and not each.asked:
                self._order(each, each.finish)

    def drain(self, generation: int) -> None:
        """Order a generation's lost workers to finish their clients."""
        self.retire([a for a, each in self._searches.items() if each.generation == generation])

    def order(self, addresses: Collection[str], sign: int) -> None:
        """Signal the lost worker that has one of these addresses; KILL also its children.

        sign: 0 if an earlier program has sent the signal.
        """
        for each in self._lost(addresses):
            self._order(each, sign)

    def _lost(self, addresses: Collection[str]) -> list[_Search]:
        found = (self._searches.get(address) for address in addresses)
        return [each for each in found if each is not None and each.lost]

    def _order(self, search: _Search, sign: int) -> None:
        if sign == signal.SIGKILL:
            search.kill_at = time.monotonic()
        search.asked = True
        if search.leader is not None and sign:
            self._signal([search.leader], signal.Signals(sign))  # now: a scan may get stuck
        else:
            search.sign = sign
        self._scan_after(0.0)

    def when_ended(self, done: Callable[[], None]) -> None:
        """Call back, perhaps at once, when all processes have ended or the limit has passed."""
        self._ended = done
        self._loop.call_after(_TIMER_END, self.kill_timeout_s + _SCAN_S, self._stop_waiting)
        self.schedule()

    def _stop_waiting(self) -> None:
        self.stop_looking()
        self._loop.cancel(_TIMER)
        for address in tuple(self._searches):
            self._release(self._searches.pop(address))
        self.schedule()

    def stop_looking(self) -> None:
        """Stop the current scan.  The program that replaces this program begins a new scan."""
        if self._scan is not None:
            self._scan.call_off()
            self._scan = None

    def _scan_after(self, seconds: float) -> None:
        if self._scan is None:
            self._loop.call_after(_TIMER, seconds, self._begin)

    def _begin(self) -> None:
        """Scan for all addresses, also for addresses added since the timer was set."""
        if not procfs.is_ours():
            if not self._blind:
                hint = "processes that failed workers have detached are not found"
                self._log.write("warning", "cannot-examine", error=procfs.MISSING, hint=hint)
            self._blind = True
            self._scanned(tuple(self._searches), {}, "")
            return
        try:
            wanted = tuple(self._searches)
            self._scan = proc_scan.Scan(self._loop, wanted, self._identity, _SCAN_S, self._scanned)
        except OSError as error:
            self._scanned(tuple(self._searches), {}, error.strerror or str(error))

    def _scanned(self, wanted: Collection[str], found: proc_scan.Found, why: str) -> None:
        """Signal the processes found and close their pidfds.  why: an incomplete scan's error."""
        self._scan = None
        done = []
        for address in wanted:
            search, processes = self._searches[address], found.get(address, ())
            self._act(search, processes, complete=not why)
            # The fleet waits only for lost workers (`gone`): other failed scans need no limit.
            is_over = search.kills >= _MOST_KILLS and not (why and search.gone is None)
            if is_over or not (processes or why):
                done.append(search.gone)
                self._release(self._searches.pop(address))
        proc_scan.close(found)
        if why and why != self._trouble:  # write it once, not each second
            self._log.write("error", "cannot-examine", error=why)
        self._trouble = why
        if why:  # descriptors or memory are lacking
            self._scan_after(_SCAN_AGAIN_S)
        else:
            self.schedule()
        for gone in filter(None, done):
            gone()

    def _act(self, search: _Search, found: Sequence[tuple[int, int]], *, complete: bool) -> None:
        """Send the signal that is due, if any, to the processes that a scan has found."""
        if search.kill_at is not None and search.kill_at <= time.monotonic():
            search.kills += bool(found) or not complete
            self._signal(found, signal.SIGKILL)
        elif not search.lost:
            if found and search.sign:
                search.sign, search.kill_at = 0, time.monotonic() + self.kill_timeout_s
                self._signal(found, signal.SIGTERM)
        elif complete:
            leaders = [each for each in found if _leads(each[0])]
            if not (leaders or search.asked):  # the worker has exited: its children must finish
                search.sign, search.asked = search.finish, True
            if search.sign:  # the worker passes it on; without a worker, to its children
                self._signal(leaders or found, signal.Signals(search.sign))
            search.sign, search.seen = 0, True
            if leaders and search.leader is None:
                self._await_exit(search, *leaders[0])

    def _await_exit(self, search: _Search, pid: int, pidfd: int) -> None:
        """Scan again when the lost worker exits."""

        def exited() -> None:
            self._release(search)
            search.seen = False
            self._scan_after(0.0)

        with suppress(OSError):  # no descriptor is free: scan from time to time
            copy = os.dup(pidfd)
            with on_error(os.close, copy):
                self._loop.watch(copy, exited)
            search.leader = pid, copy

    def _release(self, search: _Search) -> None:
        if search.leader is not None:
            self._loop.unwatch(search.leader[1])
            os.close(search.leader[1])
            search.leader = None

    def schedule(self) -> None:
        """Schedule the next scan, or report the end when no address is left."""
        if self._searches:
            delays_s = map(self._delay_s, self._searches.values())
            due_s = min((each for each in delays_s if each is not None), default=None)
            if due_s is not None:
                self._scan_after(due_s)
        elif self._ended is not None:
            self._loop.cancel(_TIMER_END)
            done, self._ended = self._ended, None
            done()

    def _delay_s(self, search: _Search) -> float | None:
        """Return the seconds until the next scan for an address; None: an event begins it."""
        if search.kill_at is not None:
            is_awaited = self._ended is not None or search.gone is not None
            return _DEATH_S if is_awaited else max(search.kill_at - time.monotonic(), _DEATH_S)
        if search.sign or not search.seen:
            return 0.0
        return None if search.leader is not None else _CHILDREN_S

    def _signal(self, found: Sequence[tuple[int, int]], number: signal.Signals) -> None:
        for pid, pidfd in found:
            # On failure the process has ended or changed its user.
            with suppress(ProcessLookupError, PermissionError):
                if self._is_group_watched(os.getpgid(pid)):
                    continue  # a program may treat a second TERM differently
                signal.pidfd_send_signal(pidfd, number)
                self._log.write("warning", "left-behind", pid=pid, signal=number.name)


def _leads(pid: int) -> bool:
    """Return whether a process leads its process group, as each worker does."""
    with suppress(ProcessLookupError):
        return os.getpgid(pid) == pid
    return False
