"""Signals and reaps child processes, by pidfd, because a pid may be reused.

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
import time
from collections.abc import Callable
from contextlib import suppress

from ..model import exit_text
from ..model.lazy_dataclass import frozen
from . import procfs
from .cleanup import on_error
from .polling import events_of

#: Pid -> the objects that reap it.  reap_orphans() reaps any other child.  A pid may have several
#: objects, because it may be reused before the object of a reaped process is released.
_known: dict[int, set[Process]] = {}
#: The most orphans that are reaped at once.
_REAPED_AT_ONCE = 256
#: PIDFD_SIGNAL_PROCESS_GROUP of pidfd_send_signal(2), from Linux 6.9 on.
_PROCESS_GROUP = 1 << 2
#: Constants of fcntl(2) that Python lacks.
_F_SETOWN_EX, _F_GETOWN_EX, _F_OWNER_PGRP = 15, 16, 2
_OWNER = struct.Struct("2i")
#: The error of the kernel's count of a process's memory, which is a sum over the processors.
_INEXACT_KIB = 1024


@frozen
class End:
    """How a process ended."""

    clean: bool  # exited with status 0
    how: str
    cpu_s: float | None = None  # its processor time, including its reaped children's
    max_rss_kib: int | None = None  # its peak memory, if that is above ours: see _own_kib()


class Process:
    """A child of ours.  Owns the pidfd, which is readable once the process has ended."""

    def __init__(self, pid: int, pidfd: int = -1, lifeline: int = -1) -> None:
        """Open a pidfd, or take ownership of a pidfd that an earlier program opened.

        lifeline: closing this descriptor kills its group, see spawn(); owned from now on.
        Raises OSError if the system is out of descriptors.
        """
        self.pid = pid
        self._adopted = pidfd >= 0
        self._lifeline = lifeline
        self.pidfd = pidfd if pidfd >= 0 else os.pidfd_open(pid)
        self.reaped = False  # once true, another process may have its pid
        _known.setdefault(pid, set()).add(self)

    @classmethod
    def of_child(cls, pid: int, lifeline: int = -1) -> Process:
        """Return the object of a child that was just started.

        Raises OSError after killing the child.
        """
        with on_error(_kill, pid):  # without a pidfd we would not notice its end
            child = cls(pid, lifeline=lifeline)
        # The pidfd's owner becomes the group itself, not its number: see _is_anothers_number().
        with suppress(OSError):  # it leads no group
            fcntl.fcntl(child.pidfd, _F_SETOWN_EX, _OWNER.pack(_F_OWNER_PGRP, pid))
        return child

    def signal(self, number: int) -> None:
        """Send a signal to the process; do nothing if it has ended.

        Raises PermissionError if the process has changed its user.
        """
        if not self.reaped:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def kill_group(self) -> None:
        """Send KILL to the process and its group.

        Raises PermissionError if all processes of the group have changed their user.
        """
        if not self.signal_group(signal.SIGKILL):
            self.signal(signal.SIGKILL)  # it has not made its group yet, or has left it

    def signal_group(self, number: int) -> bool:
        """Send a signal to the group that the process leads or led; return whether it exists.

        Raises PermissionError if all processes of the group have changed their user.
        """
        try:
            # The pidfd never reaches another group.
            signal.pidfd_send_signal(self.pidfd, number, None, _PROCESS_GROUP)
        except ProcessLookupError:
            return False
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return True
        # Before Linux 6.9, use its number, which is not reused while the group has a process.
        if self._is_anothers_number():
            return False
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def has_group(self) -> bool:
        """Return whether the group that it leads or led has a process, unreaped ones included."""
        try:
            return self.signal_group(0)
        except PermissionError:
            return True

    def _is_anothers_number(self) -> bool:
        """Return whether it was reaped, and another process or group has its number.

        Before Linux 5.12 its group cannot be distinguished from another whose leader has ended.
        """
        if not _is_gone(lambda: signal.pidfd_send_signal(self.pidfd, 0)):
            return False
        if not _is_gone(lambda: os.kill(self.pid, 0)):
            return True  # the number was reused, so its own group is empty
        kind, group = _OWNER.unpack(fcntl.fcntl(self.pidfd, _F_GETOWN_EX, bytes(_OWNER.size)))
        return kind == _F_OWNER_PGRP and not group

    def has_ended(self) -> bool:
        """Return whether it has ended, reaped or not."""
        # Check twice, because poll() fails while our descriptor limit is 0.
        return bool(events_of(self.pidfd, select.POLLIN)) or self._is_zombie()

    def _is_zombie(self) -> bool:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        with suppress(ChildProcessError):  # it is another process's child
            return os.waitid(os.P_PIDFD, self.pidfd, options) is not None
        return _is_gone(lambda: signal.pidfd_send_signal(self.pidfd, 0))

    def is_stopped(self) -> bool | None:
        """Return whether it is suspended (SIGSTOP, a debugger); None if unknown."""
        found = procfs.stat_of(self.pid)
        return found.state in (b"T", b"t") and not self.has_ended() if found is not None else None

    def reap(self) -> End | None:
        """Return how it ended, or None while it runs.

        Raises ChildProcessError if it has ended and is not, or no longer, our child: another
        process gets its status.
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
        # Use the pid, because waitid() does not return the resource usage.  The pid cannot be
        # reused before this call.
        _, status, used = os.wait4(self.pid, os.WNOHANG)
        self._note_reaped()
        clean, how = exit_text.status_of(status)
        return End(clean, how, used.ru_utime + used.ru_stime, self._own_kib(used.ru_maxrss))

    def _own_kib(self, peak_kib: int) -> int | None:
        """Return its peak memory; None if that may be our own memory, from before its exec.

        Source: setmax_mm_hiwater_rss() in exec_mmap() of fs/exec.c, which counts the old memory.
        """
        ours_kib = None if self._adopted else procfs.peak_kib()
        if ours_kib is None:  # the peak of all programs that were executed in our process
            ours_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak_kib if peak_kib > ours_kib + _INEXACT_KIB else None

    def discard(self) -> None:
        """Kill the process with its group, and close the pidfd.

        reap_orphans() reaps it later: it may be waiting for a disk, and we must not wait for it.
        """
        if not self.reaped:
            with suppress(PermissionError):  # it has changed its user, and cannot be killed
                self.kill_group()
        self.close()

    def close(self) -> None:
        """Close the pidfd; reap_orphans() reaps a child that still runs."""
        os.close(self.pidfd)
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._forget()

    def _note_reaped(self) -> None:
        self.reaped = True
        self._forget()

    def _forget(self) -> None:
        objects = _known.get(self.pid, set())
        objects.discard(self)
        if not objects:
            _known.pop(self.pid, None)


def _is_gone(probe: Callable[[], None]) -> bool:
    """Return whether a signal 0 reaches no process; a process of another user does exist."""
    try:
        probe()
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _kill(pid: int) -> None:
    """Kill an unreaped child and its group; reap_orphans() reaps it later.

    Do not wait here, because the child may wait for a disk.
    """
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, os.WNOHANG)


def boot_ticks() -> int:
    """Return the time in the unit of a process's start: clock ticks since the boot."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def known_pids() -> frozenset[int]:
    """Return the pids of all processes that have an object, and perhaps of ended ones."""
    return frozenset(_known)


def reap_orphans() -> tuple[int, bool]:
    """Reap ended children that no Process owns.

    They were discarded, or we became their parent as PID 1 of a container or as a sub-reaper.
    Returns their number, and whether to call this again soon: more may have ended, or waitid()
    returns an owned process that is not reaped yet.
    """
    # Counting SIGCHLD would miss children, because several signals merge into one.  waitid()
    # returns the same child again until it is reaped.
    for reaped in range(_REAPED_AT_ONCE):
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return reaped, False
        if found is None:
            return reaped, False
        if found.si_pid in _known:
            return reaped, True
        os.waitpid(found.si_pid, os.WNOHANG)  # it has ended; WNOHANG, because no call may wait
    return _REAPED_AT_ONCE, True
