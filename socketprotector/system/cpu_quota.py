"""Reads how much processor time this process may use: quotas of cgroups, and scheduling policy.

The set of allowed processors does not show a quota.  A container with a quota of half a processor
sees all processors, and is suspended once it has used its share of a period.

Source: kernel documentation, admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc
(cpu.cfs_quota_us).
"""

from __future__ import annotations

import os
from contextlib import suppress

from . import cgroups

#: The files of each version of cgroups.  In version 1, -1 means no quota.
_FILES: dict[int, tuple[str, ...]] = {2: ("cpu.max",), 1: ("cpu.cfs_quota_us", "cpu.cfs_period_us")}


def scheduler() -> int | None:
    """Return our scheduling policy; None if the system does not report it (musl: ENOSYS)."""
    try:
        return os.sched_getscheduler(0)
    except OSError:
        return None


def processors() -> int:
    """Return the number of processors that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except OSError:
        return os.cpu_count() or 1  # the system call is forbidden


class Quota:
    """The quota files of this process's cgroups; their contents and the cgroup may change."""

    def __init__(self, proc: str = cgroups.PROC) -> None:
        """proc: the folder of `cgroup` and `mountinfo`; without them, assume no quota."""
        self._proc = proc
        self._groups = ""  # the cgroups for which _files was made
        self._files: list[tuple[str, ...]] = []  # each item: the files of a quota and its period

    def _find(self) -> None:
        """Find the files again if this process is in another cgroup now."""
        try:
            groups = cgroups.names(self._proc)
            if groups == self._groups:
                return
            folders = cgroups.folders("cpu", self._proc)
        except OSError:
            return
        self._groups = groups
        self._files = [
            tuple(f"{folder}/{file}" for file in _FILES[version]) for version, folder in folders
        ]

    def processors(self) -> float:
        """Return the allowed processor time as a number of processors; infinity without a quota."""
        self._find()
        least = float("inf")
        for files in self._files:
            # "max" is not a number, and the root cgroup has no such file.
            with suppress(OSError, ValueError):
                quota, period = " ".join(map(cgroups.read, files)).split()
                if int(quota) > 0:
                    least = min(least, int(quota) / int(period))
        return least
