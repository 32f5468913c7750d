"""Missing or broken files: one line, and for `upgrade` the status of a failed upgrade."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import socketprotector
from tests.running import DEADLINE_S

PACKAGE = Path(socketprotector.__file__).parent
SPOILED = {
    "a missing package": ("system", None, "ModuleNotFoundError: No module named 'socketprotector."),
    "a missing module": ("ctl/main.py", None, "ImportError: cannot import name 'main' from "),
    "a missing module of errors": ("model/errors.py", None, "ModuleNotFoundError: No module "),
    "no syntax": ("ctl/client.py", "def", "SyntaxError: invalid syntax "),
    "no syntax in a command": ("ctl/upgrade.py", "def", "SyntaxError: invalid syntax "),
    "an error": ("ctl/cli.py", "raise RuntimeError('one\\ntwo')", "RuntimeError: one two)"),
    "an exit": ("ctl/cli.py", "raise SystemExit(0)", "SystemExit: 0)"),
}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the package."""
    ignore = shutil.ignore_patterns("__pycache__", "sample_client")
    return Path(shutil.copytree(PACKAGE, tmp_path / "there" / PACKAGE.name, ignore=ignore))


def ctl(installed: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "socketprotector.ctl", *words],
        env={**os.environ, "PYTHONPATH": str(installed.parent)},
        cwd=installed.parent,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_broken_installation_cannot_take_over(installed: Path, spoiled: str) -> None:
    name, text, why = SPOILED[spoiled]
    place = installed / name
    if text is not None:
        place.write_text(text)
    elif place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    words = ("--control", str(installed / "none.control"), "upgrade", "--check")

    status, out, err = ctl(installed, *words)

    assert (status, out) == (3, "")
    [line] = err.splitlines()
    start = "socketprotectorctl: this installation of SocketProtector is broken ("
    assert line.startswith(start + why)
    assert line.endswith("); install it again")


def test_only_an_upgrade_fails_with_the_status_of_a_failed_upgrade(installed: Path) -> None:
    shutil.rmtree(installed / "system")

    assert ctl(installed, "status")[0] == 1


def test_a_whole_copy_runs(installed: Path) -> None:
    """The positive control."""
    status, _, err = ctl(installed, "--control", str(installed / "none.control"), "upgrade")

    assert status == 1
    assert "broken" not in err
