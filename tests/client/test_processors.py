"""How many processes are forked without a number: allowed processors, and quotas of cgroups."""

from __future__ import annotations

import pytest
from socketprotector_client import processors as module

NEW = "30 23 0:26 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
OLD = "30 23 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cgroup": "0::/a/b\n", "mountinfo": NEW.format(root="/")}, 8),
        ({"/a/b/cpu.max": "150000 100000"}, 2),
        ({"/a/b/cpu.max": "max 100000", "/a/cpu.max": "300000 100000"}, 3),
        ({"/a/b/cpu.max": "1000 100000"}, 1),
        ({"/a/b/cpu.max": "senseless"}, 8),
        ({"/cpu.max": "400000 100000", "mountinfo": NEW.format(root="/a/b")}, 4),
        (
            {
                "cgroup": "4:cpu,cpuacct:/a\n0::/\n",
                "mountinfo": OLD,
                "/cpu/a/cpu.cfs_quota_us": "200000",
                "/cpu/a/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        ({"/cpu/a/cpu.cfs_quota_us": "-1", "cgroup": "4:cpu,cpuacct:/a\n", "mountinfo": OLD}, 8),
    ],
)
def test_the_smallest_quota_counts(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], count: int
) -> None:
    usual = {"cgroup": "0::/a/b\n", "mountinfo": NEW.format(root="/")}
    known = {
        name if name.startswith("/proc") else f"/sys/fs/cgroup{name}": text
        for name, text in files.items()
        if name.startswith("/")
    }
    for name in usual:
        known[f"/proc/self/{name}"] = files.get(name, usual[name])

    def read(path: str) -> str:
        if path not in known:
            raise FileNotFoundError(path)
        return known[path]

    monkeypatch.setattr(module, "_read", read)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))

    assert module.processors() == count
