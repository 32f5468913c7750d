"""In a container that was made for one program: no /bin/sh, nor anything else in /usr/bin."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.systems.life import ELSEWHERE, Surroundings, lived

pytestmark = needs.ROOT
THROUGH = (*ELSEWHERE, "--no-shell", "--")


@pytest.mark.parametrize("mode", ["connection", "listener"])
@pytest.mark.parametrize("options", [(), ("--limit", "nice=5")], ids=["plain", "nice"])
@pytest.mark.costly
def test_a_whole_life_without_a_shell(
    tmp_path: Path, marked_environment: dict[str, str], mode: str, options: tuple[str, ...]
) -> None:
    lived(Surroundings(tmp_path, marked_environment, THROUGH, mode=mode, options=options))


@pytest.mark.costly
def test_no_process_executes_a_shell_where_there_is_one(
    tmp_path: Path, marked_environment: dict[str, str]
) -> None:
    if shutil.which("strace") is None:
        needs.skip("strace")
    executed = tmp_path / "executed"
    # A tracer that stays a child of its own: what is traced has the pid that was started.
    through = ("strace", "-D", "-f", "-qq", "-e", "trace=execve", "-o", str(executed))

    lived(Surroundings(tmp_path, marked_environment, through))

    programs = set(re.findall(r'execve\("([^"]*)"', executed.read_text()))
    assert programs
    assert all(os.path.basename(each).startswith("python") for each in programs), programs


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--handoff", "stdio", "--shell", "0", "--", "cat"), "cannot run /bin/sh: No such file"),
        (
            ("--handoff", "listener", "--ready", "check:true", "0", "--", sys.executable),
            "--ready check:true",
        ),
        (("--health", "check:true", "0", "--", sys.executable), "--health check:true: there is no"),
    ],
)
def test_what_is_for_the_shell_is_refused_where_there_is_none(
    tmp_path: Path, marked_environment: dict[str, str], words: tuple[str, ...], what: str
) -> None:
    around = Surroundings(tmp_path, marked_environment, THROUGH)

    done: subprocess.CompletedProcess[str] = around.run("--check", *words)

    assert done.returncode == 2
    assert what in done.stderr
    assert done.stderr.count("\n") == 1
