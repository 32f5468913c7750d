"""Starts child processes, with their descriptors, limits, user and scheduling policy.

Source: posix_spawn(3), fork(2), setrlimit(2), sched_setscheduler(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from ..model.errors import NO_PROCESSES
from ..model.records import Program
from ..model.settings import LIMITS
from ..model.text import in_units
from . import privileges
from .cleanup import on_error
from .cpu_quota import scheduler
from .polling import events_of
from .process import Process

#: The resource limits that options may set (--limit), by the option's name.
RLIMITS = {name: getattr(resource, f"RLIMIT_{name.upper()}") for name in LIMITS}
#: How long a forked child may take to execute its program, or to answer.
_ANSWER_S = 5.0
_PIPE_BYTES = 65_536
#: How an answer begins: a result, an OSError, another exception.
_RESULT, _SYSTEM, _OTHER = b"r", b"s", b"o"


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

    def become(answer: int) -> bytes:
        _become(program, environment, places, tell_pid, lifeline)
        return b""  # never reached

    try:
        pid, _ = _ask(become, max((2, *places)) + 1)
    except OSError as error:
        error.filename = error.filename or program.path
        raise
    return pid


def in_child(act: Callable[[], bytes]) -> bytes:
    """Return what `act` returns in a forked child, which has none of our descriptors.

    So no path through /proc/self leads to a file of ours.  Raises OSError or ValueError, as `act`
    does, or if the child does not answer in time.
    """

    def act_alone(answer: int) -> bytes:
        os.closerange(0, answer)
        with suppress(FileNotFoundError):  # without /proc no path leads to a descriptor
            # Without close_range(2), as with musl, closerange() would try all numbers up to the
            # limit, which may be a billion.
            for fd in map(int, os.listdir("/proc/self/fd")):
                os.closerange(max(fd, answer + 1), fd + 1)
        return act()

    pid, result = _ask(act_alone)
    _reap(pid)
    if result is None:
        raise OSError(errno.EIO, "the process that should read it was killed")
    return result


def _ask(act: Callable[[int], bytes], above: int = 3) -> tuple[int, bytes | None]:
    """Call `act` in a forked child; return the child's pid, and the result of `act`.

    The result is None if the child has executed a program, or was killed.  Raises OSError or
    ValueError, as `act` does; then no process is left.

    The wait is limited: a child that has become another user can be stopped by that user, and its
    files can be stuck.

    act: gets the number of the descriptor for the answer.  above: the number's lower limit.
    """
    receive, send = os.pipe2(os.O_CLOEXEC)

    def answer() -> None:
        line = send
        try:
            line = fcntl.fcntl(send, fcntl.F_DUPFD_CLOEXEC, above)
            said = _RESULT + act(line)
        except OSError as error:
            words = (str(error.errno or errno.EIO), error.strerror or "", error.filename or "")
            said = _SYSTEM + b"\0".join(map(os.fsencode, words))
        except BaseException as error:  # such as ValueError for a NUL in the environment
            said = _OTHER + os.fsencode(str(error))
        while said:
            said = said[os.write(line, said) :]

    with open(receive, "rb", buffering=0) as answers:
        try:
            pid = _fork_child(answer)
        finally:
            os.close(send)
        said = _read_all(answers.fileno())
    if said is None:
        os.kill(pid, signal.SIGKILL)
        _reap(pid)
        raise OSError(
            errno.ETIMEDOUT, f"no answer in {in_units(_ANSWER_S)}: stopped, or files are stuck"
        )
    kind, said = said[:1], said[1:]
    if kind == _SYSTEM:
        _reap(pid)
        number, why, file = map(os.fsdecode, said.split(b"\0", 2))
        raise OSError(int(number), why, file or None)
    if kind == _OTHER:
        _reap(pid)
        raise ValueError(os.fsdecode(said))
    return pid, said if kind else None


def _read_all(fd: int) -> bytes | None:
    """Read a pipe until its writers have closed it; None: that takes too long."""
    found, until = b"", time.monotonic() + _ANSWER_S
    while events_of(fd, select.POLLIN, max(0.0, until - time.monotonic())):
        part = os.read(fd, _PIPE_BYTES)
        if not part:
            return found
        found += part
    return None


def _reap(pid: int) -> None:
    """Reap a child that has closed its files, or was killed."""
    with suppress(ChildProcessError):  # the caller ignores SIGCHLD, so the kernel has reaped it
        os.waitpid(pid, 0)


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
