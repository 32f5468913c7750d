"""How much processor time the system allows us, and by which policy: quotas of cgroups, scheduler.

The set of processors that we may run on does not tell of it.  A container with half a
processor's worth sees them all, and stands still as soon as its share of a period is spent.

Source: kernel documentation, admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc
(cpu.cfs_quota_us); cgroups(7), proc(5) for mountinfo.
"""

from __future__ import annotations

import os
from contextlib import suppress

#: Of cgroup v2, and of v1, where -1 is no quota.
_NEW: tuple[str, ...] = ("cpu.max",)
_OLD: tuple[str, ...] = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


def scheduler() -> int | None:
    """Return our scheduling policy; None where the system has none to tell (musl: ENOSYS)."""
    try:
        return os.sched_getscheduler(0)
    except OSError:
        return None


def processors() -> int:
    """Return how many of the system's processors this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except OSError:
        return os.cpu_count() or 1  # forbidden here


class Quota:
    """The files that say it; what they say may change at any time, and our cgroup, too."""

    def __init__(self, proc: str = "/proc/self") -> None:
        """proc: where this process tells of its cgroups and mounts.

        Nothing is found where that cannot be read: then there is no quota as far as we know.
        """
        self._proc = proc
        self._groups = ""  # in which the files below were found
        self._files: list[tuple[str, ...]] = []  # each with a quota and its period

    def _find(self) -> None:
        """Find the files, if we were moved since they were found."""
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
        """Return how many processors' worth of time we have; infinity where nothing limits it."""
        self._find()
        least = float("inf")
        for files in self._files:
            # "max" is no number, and the root has no such file.
            with suppress(OSError, ValueError):
                quota, period = " ".join(map(_read, files)).split()
                if int(quota) > 0:
                    least = min(least, int(quota) / int(period))
        return least


def _up(path: str, root: str, mount: str) -> list[str]:
    """Return the folders of a cgroup and of those above it, as far as they are mounted.

    In a container the mount may begin at its own cgroup, despite the path in /proc.
    """
    inside = path.removeprefix(root) if root != "/" else path
    names = inside.strip("/").split("/")
    return ["/".join((mount, *names[:count])).rstrip("/") for count in range(len(names), -1, -1)]


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "replace")
