"""Reads how often the kernel killed a process of our memory cgroup, and the limit of that cgroup.

The kernel kills a process when memory runs out in the cgroup, an outer cgroup or the machine.

Events: version 2 wakes a process that polls `memory.events`.  Version 1 writes to an eventfd at
each shortage of the cgroup, before the kill, but not at a shortage of the whole machine.

Source: `memory.events` in Documentation/admin-guide/cgroup-v2.rst, and `memory.oom_control` in
Documentation/admin-guide/cgroup-v1/memory.rst of Linux.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress

from ..model.lazy_dataclass import frozen
from .cgroups import PROC, folders, read

#: The files of each version: how often a process was killed, how often the cgroup was at its own
#: limit, and that limit.
_FILES = {
    2: (("memory.events", "oom_kill"), ("memory.events.local", "oom"), "memory.max"),
    1: (("memory.oom_control", "oom_kill"), ("memory.failcnt", ""), "memory.limit_in_bytes"),
}
#: Version 1 writes LONG_MAX, rounded down to a page, for no limit.
_NO_LIMIT = 1 << 62
_READ_BYTES = 4096


@frozen
class OutOfMemory:
    """The kernel's counts so far; zeros if they are unknown."""

    kills: int = 0  # at any limit
    at_limit: int = 0  # at the cgroup's own limit


def counts(proc: str = PROC) -> OutOfMemory:
    """Return the present counts."""
    version, folder = _own(proc)
    if not version:
        return OutOfMemory()
    kills, at_limit, _ = _FILES[version]
    return OutOfMemory(_number(folder, *kills) or 0, _number(folder, *at_limit) or 0)


def limit(proc: str = PROC) -> int | None:
    """Return the cgroup's own limit in bytes; None: it has none, or it is unknown."""
    version, folder = _own(proc)
    found = _number(folder, _FILES[version][2]) if version else None
    return found if found is not None and found < _NO_LIMIT else None


class Events:
    """A descriptor that reports that memory has run out.  Owns it."""

    def __init__(self, fd: int, awaited: int) -> None:
        """awaited: the events of epoll to wait for."""
        self.fd, self.awaited = fd, awaited

    @classmethod
    def open(cls, proc: str = PROC) -> Events | None:
        """Return the events of our cgroup from now on; None if we cannot get them."""
        version, folder = _own(proc)
        fd = -1
        try:
            if version == 2:
                fd = os.open(f"{folder}/{_FILES[2][0][0]}", os.O_RDONLY | os.O_CLOEXEC)
                found = cls(fd, select.EPOLLPRI)
                found.take()
                return found
            if version == 1:
                fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                _register(folder, fd)
                return cls(fd, select.EPOLLIN)
        except OSError:
            if fd >= 0:
                os.close(fd)
        return None

    def take(self) -> None:
        """Note the events so far, so that only later ones are reported."""
        with suppress(OSError):
            if self.awaited == select.EPOLLPRI:
                os.pread(self.fd, _READ_BYTES, 0)
            else:
                os.eventfd_read(self.fd)

    def close(self) -> None:
        os.close(self.fd)


def _register(folder: str, fd: int) -> None:
    """Make version 1 write to an eventfd at each shortage.  Raises OSError."""
    file = os.open(f"{folder}/{_FILES[1][0][0]}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        order = os.open(f"{folder}/cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(order, b"%d %d" % (fd, file))
        finally:
            os.close(order)
    finally:
        os.close(file)


def _own(proc: str) -> tuple[int, str]:
    """Return the version and the folder of our memory cgroup; (0, ""): it is not known."""
    with suppress(OSError):
        for version, folder in folders("memory", proc):
            if _number(folder, *_FILES[version][0]) is not None:
                return version, folder
    return 0, ""


def _number(folder: str, file: str, key: str = "") -> int | None:
    """Return the number in a file, or in its line of a key; None: there is none."""
    with suppress(OSError):
        for line in read(f"{folder}/{file}").splitlines():
            name, _, value = line.rpartition(" ")
            if name == key and value.isdecimal():
                return int(value)
    return None
