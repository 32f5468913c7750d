"""The processor time that the system allows this process: quotas of cgroups, scheduling policy.

The set of allowed processors does not show a quota.  A container with a quota of half a processor
sees all processors, and is suspended once it has used its share of a period.

Source: kernel documentation, admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc
(cpu.cfs_quota_us); cgroups(7), proc(5) for mountinfo.
"""

from __future__ import annotations

import os
from contextlib import suppress

#: The files of cgroup v2, and of v1, where -1 means no quota.
_NEW: tuple[str, ...] = ("cpu.max",)
_OLD: tuple[str, ...] = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


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

    def __init__(self, proc: str = "/proc/self") -> None:
        """Read cgroups and mounts from `proc`; if it cannot be read, assume no quota."""
        self._proc = proc
        self._groups = ""  # the cgroups for which _files was made
        self._files: list[tuple[str, ...]] = []  # each item: the files of a quota and its period

    def _find(self) -> None:
        """Find the files again if this process is in another cgroup now."""
        try:
            groups = _read(f"{self._proc}/cgroup")
            if groups == self._groups:
                return
            mounts = [line.split() for line in _read(f"{self._proc}/mountinfo").splitlines()]
        except OSError:
            return
        self._groups, self._files = groups, []
        named = (line.split(":", 2) for line in groups.splitlines())
        paths = {tuple(words[1].split(",")): words[2] for words in named}
        for words in mounts:
            kind, options = words[words.index("-") + 1], words[-1].split(",")
            if kind == "cgroup2" and ("",) in paths:
                found, files = [paths[("",)]], _NEW
            elif kind == "cgroup" and "cpu" in options:
                found, files = [path for names, path in paths.items() if "cpu" in names], _OLD
            else:
                continue
            folders = [each for path in found for each in _up(path, words[3], words[4])]
            self._files += [tuple(f"{folder}/{file}" for file in files) for folder in folders]

    def processors(self) -> float:
        """Return the allowed processor time as a number of processors; infinity without a quota."""
        self._find()
        least = float("inf")
        for files in self._files:
            # "max" is not a number, and the root cgroup has no such file.
            with suppress(OSError, ValueError):
                quota, period = " ".join(map(_read, files)).split()
                if int(quota) > 0:
                    least = min(least, int(quota) / int(period))
        return least


def _up(path: str, root: str, mount: str) -> list[str]:
    """Return the folders of a cgroup and of its ancestors, as far as they are mounted.

    In a container the mount may begin at the container's cgroup, despite the path in /proc.
    """
    inside = path.removeprefix(root) if root != "/" else path
    names = inside.strip("/").split("/")
    return ["/".join((mount, *names[:count])).rstrip("/") for count in range(len(names), -1, -1)]


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "replace")
