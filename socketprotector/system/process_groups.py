"""Process groups that outlive their leader: signalled to finish, and watched until they are gone.

A worker is the leader of its own session and process group.  The processes that it has started are
in that group, and keep running when the worker has ended.  For example, children of a pre-fork
master would serve an old version for ever, and programs of a stdio pool finish their connections.

The kernel does not report a group's end.  So we poll, soon at first and rarely later, and at once
when a process that may have been in a group was reaped.  We, or the guard, get the children of
ended processes, and reap them: for the kernel a group of unreaped processes still exists.

Source: pidfd_send_signal(2).
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator, MutableMapping, Set
from contextlib import suppress

from ..model.lazy_dataclass import mutable, replace
from ..model.records import WorkerRecord
from . import inherited
from .foreign_descriptors import close_unread
from .log import Log
from .loop import Loop
from .process import Process

#: The time until the first look at a group, which usually is just ending.
_FIRST_LOOK_S = 0.005
#: The pause before later looks: this share of the group's age, but at most _LAST_LOOK_S.
_LOOK_SHARE = 0.125
_LAST_LOOK_S = 2.0
#: A group that lives this long is logged.
_LINGERS_S = 0.5
#: A killed group that still exists after this time is unreaped, or stuck in the kernel.
_KILLED_S = 10.0


@mutable
class _Group:
    """The state of one process group."""

    record: WorkerRecord
    process: Process  # the leader, which has ended unless it was lost in a kill
    drain_signal: int  # makes the group finish; 0: it finishes without a signal
    ended: Callable[[], None]  # called when its last process is gone
    since: float  # the time of the last signal, or of the leader's end
    #: Our end of the leader's RETURN line, which forked children watch, too.  None: closed.
    line: socket.socket | None = None
    logged: bool = False
    retired: bool = False  # it was ordered to finish: a program may treat a second TERM differently


class Groups:
    """All groups whose leader has ended, by worker number.  Owns the leaders' pidfds."""

    def __init__(
        self,
        loop: Loop,
        log: Log,
        descriptors: MutableMapping[str, int],
    ) -> None:
        """Keep the leaders' pidfds in `descriptors`, the workers' descriptors by name."""
        self._descriptors = descriptors
        self._loop = loop
        self._log = log
        self._groups: dict[int, _Group] = {}

    def keep(
        self,
        record: WorkerRecord,
        process: Process,
        drain_signal: int,
        ended: Callable[[], None],
        line: socket.socket | None = None,
    ) -> None:
        """Watch the group of a leader that has ended; takes ownership of the process and the line.

        ended: called when the last process of the group is gone.
        line: our end of the leader's RETURN line; its end orders forked children to finish.
        """
        orphaned, now = replace(record, orphaned=True), time.monotonic()
        group = _Group(orphaned, process, drain_signal, ended, now, line)
        self._groups[record.number] = group
        self._descriptors[_name(record.number)] = process.pidfd
        if line is not None:
            self._descriptors[_name(record.number, "line")] = line.fileno()
        self._look_later(record.number)

    def retire(self, number: int) -> None:
        """Order a group to finish, once: end its RETURN line, and send its drain signal, if any."""
        group = self._groups.get(number)
        if group is not None and not group.retired:
            group.retired = True
            self._end_line(group)
            if group.drain_signal:
                self.signal(number, group.drain_signal)

    def drain(self, generation: int) -> None:
        """End the RETURN lines of a generation's groups; send the drain signal, if none was sent.

        After a kill of the protector, a worker in such a group may have served until now.
        """
        for number, group in self._groups.items():
            if group.record.generation != generation:
                continue
            if group.record.asked_to_exit or group.record.retires:
                self._end_line(group)
            else:
                self.retire(number)

    def signal(self, number: int, sign: int) -> None:
        """Send a signal to a group; do nothing if the group is gone."""
        group = self._groups.get(number)
        if group is None or group.record.killed:
            return
        name = signal.Signals(sign).name.removeprefix("SIG")
        fields = {"worker": number, "group": group.process.pid, "signal": name}
        try:
            group.process.signal_group(sign)
        except PermissionError as error:  # all its processes have changed their user
            self._log.write("error", "cannot-signal", **fields, error=error.strerror)
            return
        self._log.write("info", "signalled", **fields)
        killed = sign == signal.SIGKILL
        group.record = replace(group.record, killed=killed, asked_to_exit=True)
        group.since = time.monotonic()
        self._look_later(number)

    def pids(self) -> Iterator[int]:
        """Yield the process groups."""
        return (each.process.pid for each in self._groups.values())

    def look(self) -> None:
        """Look at all groups in the next turn of the loop: a group may have ended."""
        for number in self._groups:
            self._look_soon(number, 0.0)

    @property
    def numbers(self) -> Set[int]:
        """The worker numbers of the leaders."""
        return self._groups.keys()

    def records(self) -> tuple[WorkerRecord, ...]:
        """Return the records of the leaders."""
        return tuple(group.record for group in self._groups.values())

    def _look_later(self, number: int) -> None:
        age_s = time.monotonic() - self._groups[number].since
        delay_s = min(max(_FIRST_LOOK_S, age_s * _LOOK_SHARE), _LAST_LOOK_S)
        self._look_soon(number, delay_s)

    def _look_soon(self, number: int, delay_s: float) -> None:
        self._loop.call_after(("group", number), delay_s, lambda: self._look(number))

    def _look(self, number: int) -> None:
        group = self._groups[number]
        self._loop.unwatch(group.process.pidfd)
        age_s = time.monotonic() - group.since
        exists = group.process.has_group()
        if exists and group.record.killed and age_s >= _KILLED_S:
            hint = "killed processes are not reaped by their parent, or are stuck in the kernel"
            self._report("error", "orphans-stay", group, hint)
            exists = False
        if exists:
            if not group.logged and age_s >= _LINGERS_S:
                group.logged = True
                self._report("warning", "orphans", group, f"see: ps -s {group.process.pid}")
            if group.record.killed or not self._awaits_leader(number, group):
                self._look_later(number)
        else:
            self._gone(number)

    def _awaits_leader(self, number: int, group: _Group) -> bool:
        """Return whether the leader, a lost worker, still runs; then its exit causes a look."""
        if group.process.has_ended():
            return False
        try:
            self._loop.watch(group.process.pidfd, lambda: self._look(number))
        except OSError:
            return False
        return True

    def _gone(self, number: int) -> None:
        group = self._groups.pop(number)
        self._loop.cancel(("group", number))
        if group.logged:
            self._report("info", "orphans-gone", group)
        del self._descriptors[_name(number)]
        self._loop.unwatch(group.process.pidfd)
        group.process.close()
        self._end_line(group)
        group.ended()

    def _end_line(self, group: _Group) -> None:
        """Make the forked children that watch the line finish."""
        if group.line is not None:
            with suppress(OSError):
                group.line.shutdown(socket.SHUT_WR)  # at once, although the guard has a copy
            del self._descriptors[_name(group.record.number, "line")]
            close_unread(group.line)
            group.line = None

    def _report(self, level: str, event: str, group: _Group, hint: str | None = None) -> None:
        self._log.write(
            level,
            event,
            generation=group.record.generation,
            worker=group.record.number,
            group=group.process.pid,
            hint=hint,
        )


def _name(number: int, kind: str = "process") -> str:
    return f"{inherited.WORKER}{number}.{kind}"
