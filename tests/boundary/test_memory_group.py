"""What the kernel counts of our memory cgroup, in files as it writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from socketprotector.system import memory_group
from socketprotector.system.memory_group import OutOfMemory

NEW = {
    "memory.events": "low 0\noom 5\noom_kill 3\noom_group_kill 0\n",
    "memory.events.local": "low 0\noom 2\noom_kill 1\n",
    "memory.max": "536870912\n",
}
OLD = {
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
    "memory.failcnt": "2\n",
    "memory.limit_in_bytes": "536870912\n",
}


class System:
    """What /proc shows a process, and the folder of its cgroup."""

    def __init__(self, folder: Path, version: int) -> None:
        self.proc, self.group = folder / "proc", folder / "mount" / "unit"
        self.proc.mkdir()
        self.group.mkdir(parents=True)
        own = "0::/unit" if version == 2 else "7:memory:/unit\n0::/"
        kind = "cgroup2 none rw" if version == 2 else "cgroup none rw,memory"
        (self.proc / "cgroup").write_text(f"{own}\n")
        mount = f"30 23 0:26 / {folder / 'mount'} rw,nosuid shared:4 - {kind}\n"
        (self.proc / "mountinfo").write_text(mount)

    def has(self, **files: str) -> None:
        for name, text in files.items():
            (self.group / name).write_text(text)

    @property
    def seen(self) -> tuple[OutOfMemory, int | None]:
        proc = str(self.proc)
        return memory_group.counts(proc), memory_group.limit(proc)


@pytest.mark.parametrize(("version", "files"), [(2, NEW), (1, OLD)])
def test_both_versions_count_kills_and_have_a_limit(
    tmp_path: Path, version: int, files: dict[str, str]
) -> None:
    """The own limit counts, not that of a cgroup below."""
    system = System(tmp_path, version)
    system.has(**files)

    assert system.seen == (OutOfMemory(kills=3, at_limit=2), 512 << 20)


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (2, {**NEW, "memory.max": "max\n"}),
        (1, {**OLD, "memory.limit_in_bytes": f"{(1 << 63) - 4096}\n"}),
    ],
)
def test_a_cgroup_without_a_limit(tmp_path: Path, version: int, files: dict[str, str]) -> None:
    system = System(tmp_path, version)
    system.has(**files)

    assert system.seen == (OutOfMemory(kills=3, at_limit=2), None)


def test_what_cannot_be_read_counts_as_nothing(tmp_path: Path) -> None:
    system = System(tmp_path, 2)
    assert system.seen == (OutOfMemory(), None)
    system.has(**{"memory.events": "oom_kill many\n", "memory.max": "512M\n"})
    assert system.seen == (OutOfMemory(), None)
    (system.proc / "cgroup").unlink()
    assert system.seen == (OutOfMemory(), None)
