"""The quotas of our cgroup: in files as the kernel writes them, and in a real cgroup."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from socketprotector.system.cpu_quota import Quota
from tests import needs

CPU = Path("/sys/fs/cgroup/cpu")


class System:
    """What /proc shows a process, and the cgroup folders that it names."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.mount = folder / "cgroup"
        self.proc.mkdir()
        self.mount.mkdir()

    def shows(self, path: str, *, new: bool, root: str = "/") -> Quota:
        line = f"0::{path}" if new else f"4:cpuacct,cpu:{path}\n3:cpuset:/elsewhere\n0::/"
        kind = "cgroup2 cgroup2 rw" if new else "cgroup cgroup rw,cpu,cpuacct"
        (self.proc / "cgroup").write_text(line + "\n")
        (self.proc / "mountinfo").write_text(
            "22 1 0:20 / /proc rw - proc proc rw\n"
            f"30 23 0:26 {root} {self.mount} rw,nosuid shared:4 - {kind}\n"
        )
        return Quota(str(self.proc))

    def allows(self, path: str, **files: str) -> None:
        folder = self.mount / path.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("cpu_", "cpu.")).write_text(text + "\n")


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def test_without_a_quota_nothing_limits_it(system: System) -> None:
    system.allows("/a", cpu_max="max 100000")

    assert system.shows("/a", new=True).processors() == math.inf
    assert system.shows("/not/there", new=True).processors() == math.inf


def test_the_smallest_quota_counts_also_one_further_up(system: System) -> None:
    system.allows("/slice", cpu_max="50000 100000")
    system.allows("/slice/unit", cpu_max="300000 200000")
    system.allows("/slice/other", cpu_max="10000 100000")

    assert system.shows("/slice/unit", new=True).processors() == 0.5


def test_what_it_says_now_counts(system: System) -> None:
    system.allows("/a", cpu_max="50000 100000")
    quota = system.shows("/a", new=True)
    assert quota.processors() == 0.5
    system.allows("/a", cpu_max="max 100000")
    assert quota.processors() == math.inf


def test_a_process_that_is_moved_into_another_group_has_the_quota_of_that_one(
    system: System,
) -> None:
    system.allows("/a", cpu_max="max 100000")
    system.allows("/b", cpu_max="50000 100000")
    quota = system.shows("/a", new=True)
    assert quota.processors() == math.inf

    system.shows("/b", new=True)

    assert quota.processors() == 0.5


def test_of_the_older_kind(system: System) -> None:
    system.allows("/a", cpu_cfs_quota_us="150000", cpu_cfs_period_us="100000")
    system.allows("/a/b", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")

    assert system.shows("/a/b", new=False).processors() == 1.5


@pytest.mark.parametrize("root", ["/docker/4f1", "/"], ids=["its own root", "a path of outside"])
def test_in_a_container_the_mount_begins_at_its_own_group(system: System, root: str) -> None:
    system.allows("/", cpu_max="25000 100000", cpu_cfs_quota_us="25000", cpu_cfs_period_us="100000")

    assert system.shows("/docker/4f1", new=True, root=root).processors() == 0.25
    assert system.shows("/docker/4f1", new=False, root=root).processors() == 0.25


def test_where_nothing_can_be_read_there_is_none(tmp_path: Path) -> None:
    assert Quota(str(tmp_path / "none")).processors() == math.inf


@pytest.fixture
def group() -> Iterator[Path]:
    """A real cgroup, of the older kind."""
    folder = CPU / f"sp-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        needs.skip("a cgroup of its own", error)
    yield folder
    folder.rmdir()


def test_a_real_one_is_seen_and_its_change_as_well(group: Path) -> None:
    says = (
        "import os; from socketprotector.system.cpu_quota import Quota\n"
        f"open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "quota = Quota(); print(quota.processors(), flush=True); input(); print(quota.processors())"
    )
    (group / "cpu.cfs_quota_us").write_text("50000")
    with subprocess.Popen(
        [sys.executable, "-c", says], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert float(child.stdout.readline()) == 0.5
        (group / "cpu.cfs_quota_us").write_text("300000")
        out, _ = child.communicate("\n")
        assert float(out) == 3.0
