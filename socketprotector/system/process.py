"""Worker processes: spawn, signal, reap.  Never by pid alone: each has a pidfd.

Source: posix_spawn(3), pidfd_open(2), pidfd_send_signal(2), waitid(2), setrlimit(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress

from ..model import text
from ..model.errors import NO_PROCESSES
from ..model.lazy_dataclass import frozen
from ..model.records import Program
from . import privileges, procfs
from .cleanup import on_error
from .cpu_quota import scheduler
from .polling import events_of

#: The resource limits that options may set (--limit), by the option's name.
RLIMITS = {"nofile": resource.RLIMIT_NOFILE, "core": resource.RLIMIT_CORE}
#: Processes that an object here reaps.  Any other child that ends was left to us.
#: With their objects: one that was reaped, here or meanwhile, may be let go of when its number is
#: another's already.
_known: dict[int, set[Process]] = {}
#: Of those, so many are reaped in one go.
_REAPED_AT_ONCE = 256
#: PIDFD_SIGNAL_PROCESS_GROUP of pidfd_send_signal(2), from Linux 6.9 on.
_PROCESS_GROUP = 1 << 2
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
    def forked(cls, act: Callable[[], None]) -> Process:
        """Start a child that does this in our own memory, and ends.  Raises OSError.

        It takes no signal but KILL.
        """
        reserved = _reserve_fd()  # for its pidfd
        try:
            pid = _fork_child(act)
        finally:
            os.close(reserved)
        return cls._of_child(pid)

    @classmethod
    def _of_child(cls, pid: int, lifeline: int = -1) -> Process:
        """Own a child that was just started.  Raises OSError, and then it is killed."""
        with on_error(_kill, pid):  # its end would never be noticed
            return cls(pid, lifeline=lifeline)

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
        """Whether it was reaped and another process has its number: then its group was empty."""
        return _is_gone(lambda: signal.pidfd_send_signal(self.pidfd, 0)) and not _is_gone(
            lambda: os.kill(self.pid, 0)
        )

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


def _reserve_fd() -> int:
    """Open a descriptor only to close it for another one.  Raises OSError where none is free."""
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


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


def spawn(
    program: Program,
    extra: Mapping[str, str],
    descriptors: Mapping[int, int],
    tell_pid: str = "",
    *,
    mortal: bool = False,
) -> Process:
    """Start a program as the leader of a session of its own.

    extra: environment on top of the program's.  tell_pid: the variable that its pid goes to.
    mortal: it is killed with its group when we end, in whatever way, or execute another program.
    descriptors: number in the child -> ours, which stays ours; nothing else than these and
    0, 1, 2 is inherited, with /dev/null as 0.  Raises OSError with the reason of posix_spawn,
    or of its directory, and ValueError for a limit above the hard one or a NUL in the
    environment; then no process is left.

    posix_spawn sets neither directory, umask nor limits, so they are set here around
    it and put back: this process has one thread.  What cannot be put back (a nice value), or is
    known only afterwards (its pid), or takes another user, or a limit below the descriptors that
    we have, is done in a fork: see _fork().
    """
    environment = {**dict(program.environment), **extra}
    if not mortal:
        return Process._of_child(_spawn(program, environment, descriptors, tell_pid))
    # Where the last writer of a pipe ends, the kernel sends a signal to the process or group that
    # owns the read end: here KILL to the group, with us as the only writer.  PR_SET_PDEATHSIG
    # would reach its leader alone.
    # Source: F_SETOWN, F_SETSIG and O_ASYNC in fcntl(2); pipe_release() in fs/pipe.c.
    receive, send = os.pipe2(os.O_CLOEXEC)
    try:
        with on_error(os.close, send):
            lifeline = max((2, *descriptors)) + 1
            with_line = {**descriptors, lifeline: receive}
            pid = _spawn(program, environment, with_line, tell_pid, lifeline)
            return Process._of_child(pid, send)
    finally:
        os.close(receive)


def _spawn(
    program: Program,
    environment: Mapping[str, str],
    descriptors: Mapping[int, int],
    tell_pid: str,
    lifeline: int = -1,
) -> int:
    """Do what spawn() does; return the pid.  lifeline: the number in the child of a mortal one."""
    forked = bool(program.identity is not None or program.nice or tell_pid or lifeline >= 0)
    kept = {RLIMITS[name]: resource.getrlimit(RLIMITS[name]) for name, _ in program.limits}
    reserved = _reserve_fd()  # for its pidfd: one that cannot be watched must not be started
    places: dict[int, int] = {}
    umask = os.umask(program.umask)
    try:
        for theirs, ours in descriptors.items():
            # Out of the way first: a target's number may be another source's.
            places[theirs] = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, max(descriptors) + 1)
        # posix_spawn takes no number above the limit of the process that it starts.
        above = max(places.values(), default=0)
        forked = forked or any(n == "nofile" and value <= above for n, value in program.limits)
        os.chdir(program.directory)
        policy = {}
        if needs_normal_policy(program):
            policy["scheduler"] = os.SCHED_OTHER, os.sched_param(0)
        if forked:
            pid = _fork(program, environment, places, tell_pid, lifeline)
        else:
            _limit(program)
            pid = os.posix_spawn(
                program.path,
                program.argv,
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    *((os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in places.items()),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
                **policy,  # type: ignore[arg-type]
            )
    except FileNotFoundError as error:
        if error.filename == program.path and os.path.exists(program.path):
            error.strerror = "the interpreter in its first line is missing"
        raise
    except BlockingIOError as error:
        # EAGAIN, "resource temporarily unavailable", does not tell which one.
        error.strerror = NO_PROCESSES
        raise
    finally:
        for which, pair in kept.items():
            resource.setrlimit(which, pair)
        os.umask(umask)
        os.chdir("/")
        for fd in (reserved, *places.values()):
            os.close(fd)
    return pid


def _limit(program: Program) -> None:
    """Set the soft limits of a program.  Raises ValueError for one above the hard one."""
    for name, value in program.limits:
        which = RLIMITS[name]
        resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def use_batch_policy() -> None:
    """Use SCHED_BATCH, so as not to preempt the worker just woken, and wake several in one go.

    Under load a protector that preempts the worker which it has just woken costs both
    (bench/README.md).  One that was started with another policy, or a nice value below 0, keeps
    it.
    """
    if scheduler() == os.SCHED_OTHER and os.getpriority(os.PRIO_PROCESS, 0) >= 0:
        with suppress(OSError):  # forbidden here (a system call filter): slower, not wrong
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def needs_normal_policy(program: Program) -> bool:
    """Whether a program is to have the policy back that we have left in use_batch_policy().

    Never with musl, which answers ENOSYS to that question and to posix_spawn's attribute for it
    (src/process/posix_spawnattr_sched.c).
    """
    return not program.batch and scheduler() == os.SCHED_BATCH


def _fork(
    program: Program,
    environment: Mapping[str, str],
    places: Mapping[int, int],
    tell_pid: str,
    lifeline: int,
) -> int:
    """Start a program, maybe as another user or with its pid in a variable; return its pid.

    It is also what can have itself killed when we end: see spawn().
    Not through a program that changes the user: the loader in it would follow the worker's
    environment (LD_PRELOAD) while it still has the privilege to become any user.  Nor through a
    shell that sets the variable, or nice(1): a small container has neither.
    places: number in the child -> ours, which is above all of these.
    """
    above = max((2, *places)) + 1
    receive, send = os.pipe2(os.O_CLOEXEC)

    def become() -> None:
        answer = send
        try:
            answer = fcntl.fcntl(send, fcntl.F_DUPFD_CLOEXEC, above)
            _become(program, environment, places, tell_pid, lifeline)
        except OSError as error:
            os.write(answer, b"%d" % (error.errno or errno.EIO))
        except BaseException as error:  # as a NUL in the environment
            os.write(answer, str(error).encode())

    with open(receive, "rb") as answer:
        try:
            pid = _fork_child(become)
        finally:
            os.close(send)
        failure = answer.read()  # end of file: it was executed
    if failure:
        os.waitpid(pid, 0)
        if not failure.isdigit():
            raise ValueError(failure.decode())
        raise OSError(int(failure), os.strerror(int(failure)), program.path)
    return pid


def _fork_child(act: Callable[[], None]) -> int:
    """Fork a child that does this in our own memory, and ends.  Raises OSError.

    It shares our epoll and every socket, so it does as little as possible.
    """
    # Else a signal in the child would be reported to our own loop.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            try:
                act()
            finally:
                os._exit(127)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _become(
    program: Program,
    environment: Mapping[str, str],
    places: Mapping[int, int],
    tell_pid: str,
    lifeline: int,
) -> None:
    """In the forked child: become the worker.  Returns only by raising."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    for theirs, ours in places.items():
        os.dup2(ours, theirs)
    if program.nice:
        os.nice(program.nice)
    if needs_normal_policy(program):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    if tell_pid:
        environment = {**environment, tell_pid: str(os.getpid())}
    if program.identity is not None:
        privileges.hand_over(program.identity)
    if lifeline >= 0:  # as the user that it is from now on, which may kill it
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
    _limit(program)  # the last of all: until then our own descriptors count, which are many
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execve(program.path, program.argv, environment)
