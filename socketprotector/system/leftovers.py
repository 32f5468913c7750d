"""Ends what failed or gone workers have left behind; finds workers without a record.

A program may detach itself, or fail while its children run.  Its processes would take clients of
later generations although its start is reported as failed.  process_groups.py ends the processes in
the worker's group.  This module ends the other strangers (proc_scan.py) that hold a listening
socket or a channel of ours, whatever their session, group or environment.  Such a stranger may
belong to a living generation, as a program that a healthy worker has detached.  So it is ended only
if it started

- before each living generation that has this socket, or
- after a failed worker or a generation that is gone, with this socket, and before each newer
  generation that has this socket.

A stranger that holds no socket of ours is reported, and left alone.

If SocketProtector is killed between the start of a worker and the record of it, the worker may
already serve clients.  Such a lost worker has our notify address in its environment.

Source: pidfd_send_signal(2).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from ..model.lazy_dataclass import mutable
from ..model.settings import Identity
from . import proc_scan, procfs
from .log import Log
from .loop import Loop
from .process import Process, known_pids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .proc_scan import Stranger

#: The limit of rounds of KILL.
_MOST_KILLS = 10
#: The time until the next scan, which checks that signalled processes are gone.
_DEATH_S = 0.2
#: The time until the next scan if a scan has failed.
_SCAN_AGAIN_S = 1.0
#: The limit of a scan.  A scan that takes longer is stuck, and is killed.
_SCAN_S = 30.0
#: Later than the start of any process.
NEVER = 1 << 62
#: A generation's number and start (process.boot_ticks()), and the inodes of its sockets.
Holder = tuple[int, int, Collection[int]]
_TIMER, _TIMER_END = "leftovers", "leftovers-end"

#: A process, by its pid and its start: the pid may be reused.
_Identity = tuple[int, int]


@mutable
class _Leftover:
    """A leftover that got TERM."""

    kill_at: float
    kills: int = 0


@mutable
class _Lost:
    """The search for a lost worker."""

    addresses: tuple[str, ...]  # those that its notify socket can have
    generation: int
    finish: int  # the signal that makes it finish; 0: it finishes without a signal
    order: int | None  # the signal that was ordered; 0: it got one already
    found: Callable[[Process | None, int | None], None]
    tries: int = 0  # failed scans since KILL was ordered


class Leftovers:
    """Ends leftovers by TERM and KILL, and finds lost workers."""

    def __init__(
        self,
        loop: Loop,
        log: Log,
        kill_timeout_s: float,
        identity: Identity | None,
        reaper: Callable[[], int],
        groups: Callable[[], Iterable[int]],
        holders: Callable[[], Iterable[Holder]],
    ) -> None:
        """identity: the user that the workers run as, if not ours.

        reaper: returns which process gets the children of ended processes: we, or the guard.
        groups: returns the process groups that process_groups.py watches.
        holders: returns the living generations, and 0, NEVER and our listening sockets.
        """
        self._loop, self._log, self._identity = loop, log, identity
        self._reaper, self._groups, self._holders = reaper, groups, holders
        self.kill_timeout_s = kill_timeout_s
        self.has_manager = False  # a service manager gets them while no protector runs
        #: A socket of a failed worker or a generation that is gone (its inode), the generation's
        #: number, and the start.
        self._condemned: set[tuple[int, int, int]] = set()
        self._lost: dict[int, _Lost] = {}  # by the worker's number
        self._leftovers: dict[_Identity, _Leftover] = {}
        self._reported: set[_Identity] = set()  # these get no signal
        self._scan: proc_scan.Scan | None = None
        self._again = False  # this scan began too early
        self._ended: Callable[[], None] | None = None  # called when all leftovers have ended
        self._blind = False  # /proc is unusable, and that was logged
        self._trouble = ""  # why the last scan failed

    @property
    def condemned(self) -> tuple[tuple[int, int, int], ...]:
        """What the next program must go on searching for."""
        return tuple(self._condemned)

    @property
    def orders(self) -> tuple[tuple[str, int], ...]:
        """The signals ordered for lost workers, by address."""
        orders = ((each.addresses[0], each.order) for each in self._lost.values())
        return tuple((address, sign) for address, sign in orders if sign is not None)

    @property
    def lost(self) -> Collection[int]:
        """The numbers of the lost workers that are not found yet."""
        return self._lost.keys()

    @property
    def found(self) -> bool:
        """Whether there are leftovers that got TERM."""
        return bool(self._leftovers)

    def adopt(self, condemned: Iterable[tuple[int, int, int]]) -> None:
        """Search on where an earlier program stopped."""
        self._condemned.update(condemned)
        self._look_after(0.0)

    def end(self, holder: Holder) -> None:
        """End the leftovers of a failed worker, or of a generation that is gone."""
        number, start, sockets = holder
        if start and sockets and self._may_be_strangers():
            self._condemned.update((inode, number, start) for inode in sockets)
            self._look_after(0.0)

    def _may_be_strangers(self) -> bool:
        if self.has_manager:
            return True
        try:
            children = procfs.children_of(self._reaper())
        except OSError:
            return True
        return bool({*children} - {os.getpid()} - known_pids())

    # -- lost workers --------------------------------------------------------------

    def find(
        self,
        number: int,
        addresses: tuple[str, ...],
        generation: int,
        finish: int,
        order: int | None,
        found: Callable[[Process | None, int | None], None],
    ) -> None:
        """Find a lost worker by the notify addresses that it may have.

        finish: the signal that retire() orders; 0: none.  order: the signal that an earlier program
        has ordered; 0: it has sent one; None: none.
        found: called with the worker, which it then owns, and with the signal to send; or with None
        if the worker is gone.
        """
        self._lost[number] = _Lost(addresses, generation, finish, order, found)
        self._look_after(0.0)

    def retire(self, number: int) -> None:
        """Order a lost worker to finish, once it is found."""
        each = self._lost.get(number)
        if each is not None and each.finish and each.order is None:
            each.order = each.finish

    def drain(self, generation: int) -> None:
        """Order a generation's lost workers to finish, once they are found."""
        for number, each in self._lost.items():
            if each.generation == generation:
                self.retire(number)

    def order(self, number: int, sign: int) -> None:
        """Signal a lost worker, once it is found."""
        if number in self._lost:
            self._lost[number].order = sign

    def _find_lost(self, strangers: Iterable[Stranger], why: str) -> None:
        """Report the lost workers that were found or, after a complete scan, are gone."""
        leaders = {each.address: each for each in strangers if each.leads}
        for number, each in [*self._lost.items()]:
            leader = next((leaders[a] for a in each.addresses if a in leaders), None)
            process = None
            if leader is not None:
                with suppress(ProcessLookupError):
                    process = Process(leader.pid, leader.open())
            each.tries += bool(why) and each.order == signal.SIGKILL
            if process is not None or not why or each.tries >= _MOST_KILLS:
                del self._lost[number]
                each.found(process, each.order)

    # -- leftovers -------------------------------------------------------------------

    def _end_leftovers(self, strangers: Collection[Stranger]) -> None:
        """Signal the leftovers among the strangers, and report others.  Raises OSError."""
        holders, leftovers = [*self._holders()], dict[_Identity, _Leftover]()
        self._reported.intersection_update([(each.pid, each.start) for each in strangers])
        since = min((start for _, _, start in self._condemned), default=NEVER)
        for each in strangers:
            identity = each.pid, each.start
            if identity in self._reported:
                continue
            if each.sockets is None:
                self._report(each, "its descriptors cannot be read")
            elif any(self._is_left(each, inode, holders) for inode in each.sockets):
                leftover = self._leftovers.get(identity)
                if leftover is None:
                    leftover = _Leftover(time.monotonic() + self.kill_timeout_s)
                    self._signal(each, signal.SIGTERM)
                elif leftover.kill_at <= time.monotonic():
                    leftover.kills += 1
                    self._signal(each, signal.SIGKILL)
                if leftover.kills > _MOST_KILLS:
                    self._report(each, "it cannot be killed")
                else:
                    leftovers[identity] = leftover
            elif each.start >= since:
                self._report(each, "it holds no socket of ours")
        self._leftovers = leftovers
        if not leftovers and not self._again:
            self._condemned.clear()

    def _is_left(self, stranger: Stranger, inode: int, holders: Iterable[Holder]) -> bool:
        living = [(number, start) for number, start, sockets in holders if inode in sockets]
        if living and all(stranger.start < start for _, start in living):
            return True
        may_be_of = [number for number, start in living if start <= stranger.start]
        return any(
            socket == inode and start <= stranger.start and max(may_be_of, default=0) <= number
            for socket, number, start in self._condemned
        )

    def _signal(self, stranger: Stranger, number: signal.Signals) -> None:
        try:
            pidfd = stranger.open()
            try:
                signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)
        except ProcessLookupError:
            return
        except PermissionError as error:  # it has changed its user
            self._report(stranger, error.strerror or str(error))
            return
        self._log.write("warning", "left-behind", pid=stranger.pid, signal=number.name)

    def _report(self, stranger: Stranger, why: str) -> None:
        self._reported.add((stranger.pid, stranger.start))
        self._log.write("warning", "left-behind", pid=stranger.pid, hint=f"not signalled: {why}")

    # -- scans ----------------------------------------------------------------------

    def when_ended(self, done: Callable[[], None]) -> None:
        """Call back, perhaps at once, when all leftovers have ended or the limit has passed."""
        self._ended = done
        self._loop.call_after(_TIMER_END, self.kill_timeout_s + _SCAN_S, self._stop_waiting)
        self.schedule()

    def _stop_waiting(self) -> None:
        self.stop_looking()
        self._again = False
        self._loop.cancel(_TIMER)
        for each in (self._condemned, self._leftovers, self._lost):
            each.clear()
        self.schedule()

    def stop_looking(self) -> None:
        """Stop the current scan.  The program that replaces this program begins a new scan."""
        if self._scan is not None:
            self._scan.call_off()
            self._scan = None
            self._again = True

    def _look_after(self, seconds: float) -> None:
        if self._scan is not None:
            self._again = True
        else:
            self._loop.call_after(_TIMER, seconds, self._look)

    def _look(self) -> None:
        self._again = False
        if not procfs.is_ours():
            if not self._blind:
                hint = "processes that failed workers have detached are not found"
                self._log.write("warning", "cannot-examine", error=procfs.MISSING, hint=hint)
            self._blind = True
            self._scanned([], "")
            return
        family = proc_scan.Family(
            self._reaper(),
            self.has_manager,
            known_pids(),
            frozenset(self._groups()),
            tuple(address for each in self._lost.values() for address in each.addresses),
        )
        try:
            self._scan = proc_scan.Scan(self._loop, family, self._identity, _SCAN_S, self._scanned)
        except OSError as error:
            self._scanned([], error.strerror or str(error))

    def _scanned(self, strangers: list[Stranger], why: str) -> None:
        """Act on the strangers found.  why: an incomplete scan's error."""
        self._scan = None
        try:
            if self._lost:
                self._again = True  # those that are found now, and their children, are no strangers
                self._find_lost(strangers, why)
            elif not why:
                self._end_leftovers(strangers)
        except OSError as error:
            why = error.strerror or str(error)
        if why and why != self._trouble:  # write it once, not each second
            self._log.write("error", "cannot-examine", error=why)
        self._trouble = why
        if why:  # descriptors or memory are lacking
            self._look_after(_SCAN_AGAIN_S)
        else:
            self.schedule()

    def schedule(self) -> None:
        """Schedule the next scan, or report the end if there is no leftover."""
        if self._scan is not None:
            return
        if self._again or self._lost:
            self._look_after(0.0)
        elif self._leftovers:
            first = min(each.kill_at for each in self._leftovers.values())
            is_awaited = self._ended is not None
            wait_s = 0.0 if is_awaited else first - time.monotonic()
            self._look_after(max(wait_s, _DEATH_S))
        elif self._ended is not None and self._loop.due(_TIMER) is None:
            self._loop.cancel(_TIMER_END)
            done, self._ended = self._ended, None
            done()
