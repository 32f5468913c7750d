"""Process groups that outlive their leader: signalled to finish, and watched until they are gone.

A worker is the leader of a session and of a process group of its own.  What it has started is
in that group, and goes on when the worker has ended: the children of a pre-fork master, which
would serve an old version for ever; the programs of a stdio pool, which finish their connections.

The kernel does not report a group's end.  So we poll, soon at first and seldom later, and at
once when a process was reaped that may have been in one.  A group of
processes that have ended and are not reaped, as in a container whose first process does not,
is still a group to the kernel: that is looked up in /proc, some processes at a time.

Source: pidfd_send_signal(2), proc(5) for `stat`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, MutableMapping, Set
from itertools import islice

from ..model.lazy_dataclass import mutable, replace
from ..model.records import WorkerRecord
from . import inherited, procfs
from .log import Log
from .loop import Loop
from .process import Process

#: The first look at a group comes so soon: mostly it is just ending.
_FIRST_LOOK_S = 0.005
#: The next ones come after this share of the time that it has been so, but not later than that.
_LOOK_SHARE = 0.125
_LAST_LOOK_S = 2.0
#: One that lives so long is logged.
_LINGERS_S = 0.5
#: What was killed is gone by then, or it is not reaped, or hangs in the kernel.
_KILLED_S = 10.0
#: A look in /proc comes after so long, then after this share of the time that it has been so, and
#: takes a twentieth of our time at most.
_CENSUS_S = 0.1
_CENSUS_SHARE = 0.5
_LAST_CENSUS_S = 60.0
_CENSUS_COST = 20
#: Processes looked at in one go, which takes a millisecond.
_CENSUS_SLICE = 50


@mutable
class _Group:
    """The state of one process group."""

    record: WorkerRecord
    process: Process  # the leader, which has ended
    drain_signal: int  # tells the group to finish; 0: it finishes without a signal
    ended: Callable[[], None]  # called when its last process is gone
    since: float  # it was last signalled, or the leader had ended
    logged: bool = False
    found_dead: bool = False  # by the last look in /proc


class Groups:
    """All groups without a leader, by its worker's number.  Owns the leaders' pidfds."""

    def __init__(
        self,
        loop: Loop,
        log: Log,
        descriptors: MutableMapping[str, int],
    ) -> None:
        """descriptors: where those of workers are by name, and the leaders' pidfds stay."""
        self._descriptors = descriptors
        self._loop = loop
        self._log = log
        self._groups: dict[int, _Group] = {}
        self._census: Iterator[str] | None = None
        self._lives: dict[int, bool] = {}  # group -> whether any of it does, by the census so far
        self._census_cost_s = 0.0

    def keep(
        self,
        record: WorkerRecord,
        process: Process,
        drain_signal: int,
        ended: Callable[[], None],
    ) -> None:
        """Look after what a process that has ended has left; takes ownership of the process.

        ended: called when the last process of the group is gone.
        """
        group = _Group(
            replace(record, orphaned=True), process, drain_signal, ended, time.monotonic()
        )
        self._groups[record.number] = group
        self._descriptors[_name(record.number)] = process.pidfd
        self._look_later(record.number)

    def retire(self, number: int) -> None:
        """Send a group its drain signal, if it has one."""
        group = self._groups.get(number)
        if group is not None and group.drain_signal:
            self.signal(number, group.drain_signal)

    def signal(self, number: int, sign: int) -> None:
        """Send a signal to the rest of a group; do nothing if the group is gone."""
        group = self._groups.get(number)
        if group is None or group.record.killed:
            return
        name = signal.Signals(sign).name.removeprefix("SIG")
        fields = {"worker": number, "group": group.process.pid, "signal": name}
        try:
            group.process.signal_group(sign)
        except PermissionError as error:  # all of it has become another user's
            self._log.write("error", "cannot-signal", **fields, error=error.strerror)
            return
        self._log.write("info", "signalled", **fields)
        group.record = replace(group.record, killed=sign == signal.SIGKILL)
        group.since = time.monotonic()
        self._look_later(number)

    def has(self, group: int) -> bool:
        """Say whether a process group is one of them."""
        return any(each.process.pid == group for each in self._groups.values())

    def look(self) -> None:
        """Look at all groups as soon as there is time: one of them may have ended."""
        for number in self._groups:
            self._look_soon(number, 0.0)

    @property
    def numbers(self) -> Set[int]:
        """Return the numbers of the leaders."""
        return self._groups.keys()

    def records(self) -> tuple[WorkerRecord, ...]:
        """Return what is known of the leaders."""
        return tuple(group.record for group in self._groups.values())

    def _look_later(self, number: int) -> None:
        age_s = time.monotonic() - self._groups[number].since
        delay_s = min(max(_FIRST_LOOK_S, age_s * _LOOK_SHARE), _LAST_LOOK_S)
        self._look_soon(number, delay_s)

    def _look_soon(self, number: int, delay_s: float) -> None:
        self._loop.call_after(("group", number), delay_s, lambda: self._look(number))

    def _look(self, number: int) -> None:
        group = self._groups[number]
        age_s = time.monotonic() - group.since
        left = group.process.has_group()
        if left and group.record.killed and age_s >= _KILLED_S:
            hint = "killed processes are not reaped by their parent, or hang in the kernel"
            self._tell("error", "orphans-stay", group, hint)
            left = False
        if left:
            self._count_later()
            if not group.logged and age_s >= _LINGERS_S:
                group.logged = True
                self._tell("warning", "orphans", group, f"see: ps -s {group.process.pid}")
            self._look_later(number)
        else:
            self._gone(number)

    def _gone(self, number: int) -> None:
        group = self._groups.pop(number)
        self._loop.cancel(("group", number))
        if group.logged:
            self._tell("info", "orphans-gone", group)
        del self._descriptors[_name(number)]
        group.process.close()
        group.ended()

    # -- groups of zombies ---------------------------------------------------------

    def _count_later(self) -> None:
        if self._census is not None or self._loop.due("census") is not None:
            return
        now = time.monotonic()
        youngest_s = min(now - group.since for group in self._groups.values())
        delay_s = max(_CENSUS_S, youngest_s * _CENSUS_SHARE, self._census_cost_s * _CENSUS_COST)
        self._loop.call_after("census", min(delay_s, _LAST_CENSUS_S), self._count)

    def _count(self) -> None:
        """Scan some more processes to find which groups still have a living process."""
        began = time.monotonic()
        if self._census is None:
            self._lives, self._census_cost_s = {}, 0.0
            try:
                self._census = iter(os.listdir("/proc"))
            except OSError:
                return  # none is mounted, or there is no descriptor left for now
        names = list(islice(self._census, _CENSUS_SLICE))
        for name in names:
            if name.isdigit() and (found := procfs.state_of(name)) is not None:
                state, group = found
                self._lives[group] = self._lives.get(group, False) or state not in (b"Z", b"X")
        self._census_cost_s += time.monotonic() - began
        if names:
            self._loop.call_after("census", 0.0, self._count)
            return
        self._census = None
        for number, each in list(self._groups.items()):
            # One that is hidden from us (hidepid) is not dead.  And twice in a row, because a
            # process may fork into the part that has been looked at already.
            dead = self._lives.get(each.process.pid) is False
            if dead and each.found_dead:
                self._gone(number)
            each.found_dead = dead
        if self._groups:
            self._count_later()

    def _tell(self, level: str, event: str, group: _Group, hint: str | None = None) -> None:
        self._log.write(
            level,
            event,
            generation=group.record.generation,
            worker=group.record.number,
            group=group.process.pid,
            hint=hint,
        )


def _name(number: int) -> str:
    return f"{inherited.WORKER}{number}.process"
