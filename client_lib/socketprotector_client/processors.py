"""How many processors this process may use: the allowed processors, limited by cgroups' quotas.

The set of allowed processors does not show a quota: a container with half a processor sees all.

Source: kernel documentation, admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc
(cpu.cfs_quota_us); cgroups(7), proc(5) for mountinfo.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Tuple

#: The files of a quota and its period, of cgroup v2 and of v1.
_NEW, _OLD = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")


def processors() -> int:
    """Return how many processors this process may use, at least 1."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except OSError:
        allowed = os.cpu_count() or 1  # the system call is forbidden
    least = float(allowed)
    for files in _quota_files():
        # "max" is not a number, and the root cgroup has no such file.
        try:
            quota, period = " ".join(map(_read, files)).split()
            if int(quota) > 0:
                least = min(least, int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            pass
    return max(1, -int(-least // 1))


def _quota_files() -> Iterator[Tuple[str, ...]]:
    """Yield the quota files of our cgroups and of their ancestors, as far as they are mounted."""
    try:
        groups = [line.split(":", 2) for line in _read("/proc/self/cgroup").splitlines()]
        mounts = [line.split() for line in _read("/proc/self/mountinfo").splitlines()]
    except OSError:
        return
    for words in mounts:
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        for _, names, path in groups:
            if kind == "cgroup2" and not names:
                files: Tuple[str, ...] = _NEW
            elif kind == "cgroup" and "cpu" in options and "cpu" in names.split(","):
                files = _OLD
            else:
                continue
            root, point = words[3], words[4]
            # In a container the mount may begin at the container's cgroup.
            inside = path[len(root) :] if root != "/" and path.startswith(root) else path
            below = inside.strip("/").split("/")
            for count in range(len(below), -1, -1):
                folder = "/".join((point, *below[:count])).rstrip("/")
                yield tuple(f"{folder}/{file}" for file in files)


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "replace")
