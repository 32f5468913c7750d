"""How many processes are forked without a number: allowed processors, and quotas of cgroups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from socketprotector_client import processors as module

from tests import needs

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


@needs.ROOT
@pytest.mark.parametrize(
    ("mount", "quota"),
    [("/sys/fs/cgroup", "cpu.max"), ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us")],
)
def test_a_process_in_a_cgroup_with_half_a_processor_may_use_one(mount: str, quota: str) -> None:
    folder = Path(mount) / f"sp-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        needs.skip("a cgroup of its own")
    try:
        if not (folder / quota).exists():
            needs.skip("a cgroup with a quota")
        enter = f"echo $$ > {folder}/cgroup.procs && exec {sys.executable} -c "
        look = "from socketprotector_client.processors import processors; print(processors())"
        found = []
        for text in ("50000", "150000"):
            (folder / quota).write_text(text)
            words = ["sh", "-c", f'{enter} "{look}"']
            found.append(int(subprocess.run(words, capture_output=True, check=True).stdout))
    finally:
        folder.rmdir()
    assert found == [1, min(2, len(os.sched_getaffinity(0)))]
