"""Starts child processes, with their descriptors, limits, user and scheduling policy.

Source: posix_spawn(3), fork(2), setrlimit(2), sched_setscheduler(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress

from ..model.errors import NO_PROCESSES
from ..model.records import Program
from ..model.settings import LIMITS
from . import privileges
from .cleanup import on_error
from .cpu_quota import scheduler
from .process import Process

#: The resource limits that options may set (--limit), by the option's name.
RLIMITS = {name: getattr(resource, f"RLIMIT_{name.upper()}") for name in LIMITS}


def spawn(
    program: Program,
    extra: Mapping[str, str],
    descriptors: Mapping[int, int],
    tell_pid: str = "",
    *,
    mortal: bool = False,
) -> Process:
    """Start a program as the leader of its own session.

    extra: environment on top of the program's.
    descriptors: number in the child -> our descriptor, which we keep.  The child inherits only
    these and 0, 1, 2, with /dev/null as 0.
    tell_pid: the name of an environment variable for its pid; "": no such variable.
    mortal: kill it with its group when we exit in any way, or execute another program.

    Raises OSError if posix_spawn or the change of directory fails.  Raises ValueError for a limit
    above the hard limit, or a NUL in the environment.  After either no process is left.

    posix_spawn sets neither directory, umask nor limits.  So we set ours before the call and
    restore them afterwards, which is safe because this process has one thread.  Some features need
    a fork, see _fork(): a nice value, which cannot be restored; the pid, which is known only
    afterwards; another user; `mortal`; and a limit below the descriptors that we have.
    """
    environment = {**dict(program.environment), **extra}
    if not mortal:
        return Process.of_child(_spawn(program, environment, descriptors, tell_pid))
    # When the last writer of a pipe exits, the kernel signals the process or group that owns the
    # read end.  Here we are the only writer, and the signal is KILL to the group.
    # PR_SET_PDEATHSIG would reach only its leader.
    # Source: F_SETOWN, F_SETSIG and O_ASYNC in fcntl(2); pipe_release() in fs/pipe.c.
    receive, send = os.pipe2(os.O_CLOEXEC)
    try:
        with on_error(os.close, send):
            lifeline = max((2, *descriptors)) + 1
            with_line = {**descriptors, lifeline: receive}
            pid = _spawn(program, environment, with_line, tell_pid, lifeline)
            return Process.of_child(pid, send)
    finally:
        os.close(receive)


def fork(act: Callable[[], None]) -> Process:
    """Start a child that calls `act` in a copy of our memory, and ends.  Raises OSError.

    It receives no signal except KILL.
    """
    reserved = _reserve_fd()  # for its pidfd
    try:
        pid = _fork_child(act)
    finally:
        os.close(reserved)
    return Process.of_child(pid)


def _spawn(
    program: Program,
    environment: Mapping[str, str],
    descriptors: Mapping[int, int],
    tell_pid: str,
    lifeline: int = -1,
) -> int:
    """Start a program as spawn() does; return its pid.

    lifeline: the number that the pipe's read end has in a mortal child; -1: it is not mortal.
    """
    forked = bool(program.identity is not None or program.nice or tell_pid or lifeline >= 0)
    kept = {RLIMITS[name]: resource.getrlimit(RLIMITS[name]) for name, _ in program.limits}
    reserved = _reserve_fd()  # for its pidfd: without one the process could not be watched
    places: dict[int, int] = {}
    umask = os.umask(program.umask)
    try:
        for theirs, ours in descriptors.items():
            # Copy all out of the way first: a target's number may be another source's number.
            places[theirs] = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, max(descriptors) + 1)
        # posix_spawn accepts no number above the limit of the started process.
        above = max(places.values(), default=0)
        forked = forked or any(n == "nofile" and value <= above for n, value in program.limits)
        if program.identity is None:  # otherwise the child changes to it, with that user's rights
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
        # EAGAIN, "resource temporarily unavailable", does not say which resource.
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
    """Set the soft limits of a program.  Raises ValueError for a limit above the hard limit."""
    for name, value in program.limits:
        which = RLIMITS[name]
        resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def use_batch_policy() -> None:
    """Use SCHED_BATCH, so that the protector does not preempt a worker that it has just woken.

    Under load such a preemption costs both processes time (bench/README.md).  A protector that was
    started with another policy, or a nice value below 0, keeps it.
    """
    if scheduler() == os.SCHED_OTHER and os.getpriority(os.PRIO_PROCESS, 0) >= 0:
        with suppress(OSError):  # a system call filter forbids it: we are slower, but correct
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def needs_normal_policy(program: Program) -> bool:
    """Return whether a program needs the policy that we had before use_batch_policy().

    Return False with musl, which has neither the system call nor posix_spawn's attribute (ENOSYS;
    src/process/posix_spawnattr_sched.c).
    """
    return not program.batch and scheduler() == os.SCHED_BATCH


def _fork(
    program: Program,
    environment: Mapping[str, str],
    places: Mapping[int, int],
    tell_pid: str,
    lifeline: int,
) -> int:
    """Start a program by fork and exec; return its pid.

    spawn() lists the features that need this, because posix_spawn lacks them.

    We do not use a program that changes the user: its loader would obey the worker's environment
    (LD_PRELOAD) while the program can still become any user.  Nor do we use a shell that sets the
    variable, or nice(1), because a small container has neither.

    places: number in the child -> our descriptor, whose number is above all of these.
    """
    above = max((2, *places)) + 1
    receive, send = os.pipe2(os.O_CLOEXEC)

    def become() -> None:
        answer = send
        try:
            answer = fcntl.fcntl(send, fcntl.F_DUPFD_CLOEXEC, above)
            _become(program, environment, places, tell_pid, lifeline)
        except OSError as error:
            file = os.fsencode(error.filename or program.path)
            os.write(answer, b"%d %b" % (error.errno or errno.EIO, file))
        except BaseException as error:  # such as ValueError for a NUL in the environment
            os.write(answer, str(error).encode())

    with open(receive, "rb") as answer:
        try:
            pid = _fork_child(become)
        finally:
            os.close(send)
        failure = answer.read()  # end of file without an answer: the program was executed
    if failure:
        os.waitpid(pid, 0)
        number, _, file = failure.partition(b" ")
        if not number.isdigit():
            raise ValueError(failure.decode())
        raise OSError(int(number), os.strerror(int(number)), os.fsdecode(file))
    return pid


def _fork_child(act: Callable[[], None]) -> int:
    """Fork a child that calls `act` and ends; return its pid.  Raises OSError.

    The child shares our epoll and every socket, so it must do as little as possible.
    """
    # Block signals, because a signal to the child would be reported to our own loop.
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
    """Become the program, in the forked child.  Never returns; raises an exception on failure."""
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
        privileges.become_worker_user(program.identity)
        os.chdir(program.directory)
    if lifeline >= 0:  # after the change of user, because that user must be allowed to kill it
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
    _limit(program)  # last, because our own descriptors may exceed the limit
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execve(program.path, program.argv, environment)


def _reserve_fd() -> int:
    """Open a descriptor to keep one free for later.  Raises OSError if none is free."""
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
