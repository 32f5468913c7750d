"""The command that shows the journal of our unit, by the cgroups that /proc shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from socketprotector.daemon.log_output import journal_command

_USER = "/user.slice/user-1000.slice"
_MANAGER = f"{_USER}/user@1000.service"


@pytest.mark.parametrize(
    ("cgroup", "command"),
    [
        ("/system.slice/shop.service", "journalctl -u shop.service"),
        ("/system.slice/shop.service/workers", "journalctl -u shop.service"),
        ("/system.slice/system-shop.slice/shop@a.service", "journalctl -u shop@a.service"),
        (f"{_MANAGER}/app.slice/shop.service", "journalctl --user-unit shop.service"),
        (f"{_MANAGER}/app.slice/vte.scope", "journalctl -u user@1000.service"),
        (f"{_USER}/session-3.scope", "journalctl"),
        ("/", "journalctl"),
    ],
)
@pytest.mark.parametrize("lines", ["0::{}", "2:name=systemd:{}\n1:cpu,cpuacct:/\n0::{}"])
def test_the_command_finds_the_journal_of_our_unit(
    cgroup: str, command: str, lines: str, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(lines.format(cgroup, cgroup) + "\n")
    assert journal_command(str(tmp_path)) == command


def test_without_proc_the_command_names_no_unit(tmp_path: Path) -> None:
    assert journal_command(str(tmp_path)) == "journalctl"
