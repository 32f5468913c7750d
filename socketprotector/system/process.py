"""Child processes: signal and reap them.  Never by pid alone: each has a pidfd.

Source: pidfd_open(2), pidfd_send_signal(2), waitid(2); F_SETOWN_EX in fcntl(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
import struct
from collections.abc import Callable
from contextlib import suppress

from ..model import text
from ..model.lazy_dataclass import frozen
from . import procfs
from .cleanup import on_error
from .polling import events_of

#: Processes that an object here reaps.  Any other child that ends was left to us.
#: With their objects: a reaped process may be released only after its number was reused.
_known: dict[int, set[Process]] = {}
#: Of those, so many are reaped in one go.
_REAPED_AT_ONCE = 256
#: PIDFD_SIGNAL_PROCESS_GROUP of pidfd_send_signal(2), from Linux 6.9 on.
_PROCESS_GROUP = 1 << 2
#: Of fcntl(2); Python has no names for them.
_F_SETOWN_EX, _F_GETOWN_EX, _F_OWNER_PGRP = 15, 16, 2
_OWNER = struct.Struct("2i")
#: The kernel's count of a process's memory is this inexact: it adds up what each processor counts.
_INEXACT_KIB = 1024


@frozen
class End:
    """How a process ended."""

    clean: bool  # exited with status 0
    how: str
    cpu_s: float | None = None  # of itself and of its own children that it has waited for
    max_rss_kib: int | None = None  # its peak, if that is above ours: see _own_kib()


class Process:
    """A child of ours.  Owns the pidfd, which is readable once the process has ended."""

    def __init__(self, pid: int, pidfd: int = -1, lifeline: int = -1) -> None:
        """Open it, or take ownership of a pidfd that an earlier program had opened.

        lifeline: what its group ends with, see spawn(); it is owned from here on.  Raises OSError
        when the system is out of descriptors.
        """
        self.pid = pid
        self._adopted = pidfd >= 0
        self._lifeline = lifeline
        self.pidfd = pidfd if pidfd >= 0 else os.pidfd_open(pid)
        self.reaped = False  # and so its number may be another's
        _known.setdefault(pid, set()).add(self)

    @classmethod
    def of_child(cls, pid: int, lifeline: int = -1) -> Process:
        """Own a child that was just started.  Raises OSError, and then it is killed."""
        with on_error(_kill, pid):  # its end would never be noticed
            child = cls(pid, lifeline=lifeline)
        # The pidfd then knows the group itself, not its number, in each process that has it.
        with suppress(OSError):  # it leads none
            fcntl.fcntl(child.pidfd, _F_SETOWN_EX, _OWNER.pack(_F_OWNER_PGRP, pid))
        return child

    def signal(self, number: int) -> None:
        """Send a signal to the process; nothing happens if it has ended.

        Raises PermissionError if it has become another user's.
        """
        if not self.reaped:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def kill_group(self) -> None:
        """Send KILL to the process and all of its group.

        Raises PermissionError if all of it has become another user's.
        """
        if not self.signal_group(signal.SIGKILL):
            self.signal(signal.SIGKILL)  # it has not made its group yet, or left it

    def signal_group(self, number: int) -> bool:
        """Send a signal to all of the group that it leads, or led; say whether it has a process.

        Raises PermissionError if all of it has become another user's.
        """
        try:
            # By the pidfd, which no other group is ever reached by.
            signal.pidfd_send_signal(self.pidfd, number, None, _PROCESS_GROUP)
        except ProcessLookupError:
            return False
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return True
        # Before Linux 6.9: by the number, which is no other's as long as a process is in the group.
        if self._is_anothers_number():
            return False
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def has_group(self) -> bool:
        """Say whether the group that it leads, or led, has a process; itself until it is reaped."""
        try:
            return self.signal_group(0)
        except PermissionError:
            return True

    def _is_anothers_number(self) -> bool:
        """Whether it was reaped, and its number is another process's or another group's.

        Before Linux 5.12 a group whose leader has ended, too, cannot be distinguished from its own.
        """
        if not _is_gone(lambda: signal.pidfd_send_signal(self.pidfd, 0)):
            return False
        if not _is_gone(lambda: os.kill(self.pid, 0)):
            return True  # its group was empty before
        kind, group = _OWNER.unpack(fcntl.fcntl(self.pidfd, _F_GETOWN_EX, bytes(_OWNER.size)))
        return kind == _F_OWNER_PGRP and not group

    def has_ended(self) -> bool:
        """Say whether it has ended, reaped or not."""
        # Asked twice, as nothing is known by the one while our limit of descriptors is 0.
        return bool(events_of(self.pidfd, select.POLLIN)) or self._is_zombie()

    def _is_zombie(self) -> bool:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        with suppress(ChildProcessError):  # another's child
            return os.waitid(os.P_PIDFD, self.pidfd, options) is not None
        return _is_gone(lambda: signal.pidfd_send_signal(self.pidfd, 0))

    def is_stopped(self) -> bool | None:
        """Say whether it stands still (SIGSTOP, a debugger); None where that cannot be seen."""
        found = procfs.state_of(self.pid)
        return found and found[0] in (b"T", b"t") and not self.has_ended()

    def reap(self) -> End | None:
        """Return how it ended, or None while it runs.

        Raises ChildProcessError when it is no child of ours (any more) and has ended: then its
        status is with the process that has reaped it.
        """
        try:
            found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            if not self.has_ended():
                return None
            self._note_reaped()
            raise
        if found is None:
            return None
        # By its number, because waitid() does not tell what it used; until this returns the
        # number is no other process's.
        _, status, used = os.wait4(self.pid, os.WNOHANG)
        self._note_reaped()
        clean, how = text.status_of(status)
        return End(clean, how, used.ru_utime + used.ru_stime, self._own_kib(used.ru_maxrss))

    def _own_kib(self, peak_kib: int) -> int | None:
        """Return the peak of its memory; None if that may have been our own, before the exec.

        Source: setmax_mm_hiwater_rss() in exec_mmap() of fs/exec.c counts the memory that it left.
        """
        ours_kib = None if self._adopted else procfs.peak_kib()
        if ours_kib is None:  # that of each program which was executed in our process
            ours_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak_kib if peak_kib > ours_kib + _INEXACT_KIB else None

    def discard(self) -> None:
        """Kill it with its group and let go of it, pidfd and all.

        It is reaped with the orphans: one that waits for a disk cannot be waited for.
        """
        if not self.reaped:
            with suppress(PermissionError):  # it has become another user's, and ends when it likes
                self.kill_group()
        self.close()

    def close(self) -> None:
        """Close the pidfd.  A child that lives on is reaped with the orphans."""
        os.close(self.pidfd)
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._forget()

    def _note_reaped(self) -> None:
        self.reaped = True
        self._forget()

    def _forget(self) -> None:
        its = _known.get(self.pid, set())
        its.discard(self)
        if not its:
            _known.pop(self.pid, None)


def _is_gone(probe: Callable[[], None]) -> bool:
    """Whether a signal 0 reaches no process; one that has become another user's is there."""
    try:
        probe()
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _kill(pid: int) -> None:
    """Kill a child that was not reaped yet, and its group; it is reaped with the orphans.

    Not waited for: it may wait for a disk.
    """
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, os.WNOHANG)


def reap_orphans() -> tuple[int, bool]:
    """Reap children that have ended and that no object here owns.

    They were discarded, or are left to us by others where we are the first process of a container
    (PID 1), or were made a sub-reaper.  Returns how many there were, and whether to come again
    soon: there are more, or one that another object here is about to reap comes before them.
    """
    # Which child has ended a signal does not tell: several signals are one.  This names one,
    # the same again until it is reaped.
    for reaped in range(_REAPED_AT_ONCE):
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return reaped, False
        if found is None:
            return reaped, False
        if found.si_pid in _known:
            return reaped, True
        os.waitpid(found.si_pid, os.WNOHANG)  # it has ended: but no call here may wait at all
    return _REAPED_AT_ONCE, True
