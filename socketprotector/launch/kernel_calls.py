"""Checks that the kernel has and allows the system calls that SocketProtector needs."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress

from ..model.errors import SystemRefused

#: The first version with waitid(P_PIDFD).  pidfd_open came with 5.3, pidfd_send_signal with 5.1,
#: memfd_create with 3.17.  RHEL 8 has no pidfd_open.
OLDEST_KERNEL = (5, 4)


def check() -> None:
    """Refuse a kernel that lacks a required system call, or a filter that forbids such a call."""
    missing: list[str] = []
    forbidden: list[str] = []
    for call, try_call in (
        ("memfd_create", _sealed_memory),
        ("posix_spawn", _spawn),
        ("pidfd_open", lambda: _pidfd(bool)),
        ("pidfd_send_signal", lambda: _pidfd(lambda fd: signal.pidfd_send_signal(fd, 0))),
        ("waitid(P_PIDFD)", lambda: _pidfd(_wait)),
    ):
        if "pidfd_open" in (*missing, *forbidden):
            break  # the calls that follow need a pidfd
        try:
            try_call()
        except AttributeError:  # this Python was built for an older system
            missing.append(call)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EINVAL):
                missing.append(call)
            elif error.errno in (errno.EPERM, errno.EACCES):
                forbidden.append(call)
            # For any other error the call exists; if a resource is short, the start will report it.
    release = os.uname().release
    faults = []
    if missing:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        faults.append(
            f"{', '.join(missing)}: missing; Linux {oldest} or later is needed, this is {release}"
            f"{' with a filter of system calls' if _is_new(release) else ''}"
        )
    if forbidden:
        faults.append(
            f"{', '.join(forbidden)}: forbidden by a filter of system calls; allow it (a "
            "container's seccomp profile, SystemCallFilter= of a unit)"
        )
    if faults:
        raise SystemRefused("; ".join(faults))


def _is_new(release: str) -> bool:
    numbers = [int(each) for each in re.findall(r"\d+", release)[:2]]
    return numbers >= list(OLDEST_KERNEL)


def _sealed_memory() -> None:
    fd = os.memfd_create("sp.check", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    finally:
        os.close(fd)


def _spawn() -> None:
    """Try clone3.  glibc uses clone instead if clone3 is unknown, but not if it is forbidden."""
    with suppress(FileNotFoundError):  # the call works: a process was made, and found no program
        os.posix_spawn("", ("none",), {})


def _pidfd(use: Callable[[int], object]) -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        use(fd)
    finally:
        os.close(fd)


def _wait(fd: int) -> None:
    with suppress(ChildProcessError):  # the call works: it found that we are not our own child
        os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
