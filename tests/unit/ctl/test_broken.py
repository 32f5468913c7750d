"""Missing or broken files: one line, and for `upgrade` the status of a failed upgrade."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

import socketprotector
from tests.running import DEADLINE_S

PACKAGE = Path(socketprotector.__file__).parent
SPOILED = {
    "a missing package": ("system", None, "ModuleNotFoundError: No module named 'socketprotector."),
    "a missing module": ("ctl/main.py", None, "ImportError: cannot import name 'main' from "),
    "a missing module with .so": ("system/sock_diag.py", None, "ImportError: cannot import name "),
    "a missing module of errors": ("model/errors.py", None, "ModuleNotFoundError: No module "),
    "no syntax": ("ctl/client.py", "def", "SyntaxError: invalid syntax "),
    "an empty program": ("ctl/main.py", "", "ImportError: socketprotector.ctl.main is empty)"),
    "an empty module": ("ctl/upgrade.py", "", "ImportError: socketprotector.ctl.upgrade is empty)"),
    "an error": ("ctl/cli.py", "raise RuntimeError('one\\ntwo\\udcff')", "RuntimeError: one two"),
    "an exit": ("ctl/cli.py", "raise SystemExit(0)", "SystemExit: 0)"),
}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the package."""
    ignore = shutil.ignore_patterns("__pycache__", "sample_client")
    return Path(shutil.copytree(PACKAGE, tmp_path / "there" / PACKAGE.name, ignore=ignore))


def ctl(
    installed: Path, *words: str, stderr: int | IO[str] = subprocess.PIPE
) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "socketprotector.ctl", *words],
        env={**os.environ, "PYTHONPATH": str(installed.parent)},
        cwd=installed.parent,
        stdout=subprocess.PIPE,
        stderr=stderr,
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
    start = "socketprotectorctl: files of SocketProtector are missing or broken ("
    assert line.startswith(start + why)
    assert line.endswith("); install it again")


def test_the_status_is_the_same_if_the_line_cannot_be_written(installed: Path) -> None:
    (installed / "ctl/main.py").unlink()
    with open("/dev/full", "w") as full:
        assert ctl(installed, "upgrade", stderr=full)[0] == 3


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("MemoryError", (1, "socketprotectorctl: out of memory: ")),
        (
            "ImportError('failed to map segment', path='/lib/x.so')",
            (1, "socketprotectorctl: out of memory (failed to map segment): "),
        ),
        ("ImportError('too short', path='/lib/x.so')", (3, "socketprotectorctl: files of ")),
        ("ImportError('failed to map segment', path='x.py')", (3, "socketprotectorctl: files of ")),
        ("KeyboardInterrupt", (130, "")),
    ],
)
@pytest.mark.parametrize("when", ["", "def main(*_): "])
def test_a_lack_of_memory_and_an_interrupt_differ_from_a_broken_file(
    installed: Path, raised: str, expected: tuple[int, str], when: str
) -> None:
    """While the program is loaded, and later."""
    (installed / "ctl/main.py").write_text(f"{when}raise {raised}")

    status, _, err = ctl(installed, "upgrade")

    assert (status, err[: len(expected[1])]) == expected
    assert err.count("\n") == bool(expected[1])


@pytest.mark.parametrize("error", ["SystemError('no')", "OSError(12, 'no')"])
def test_a_lack_of_memory_during_an_import_is_no_broken_file(installed: Path, error: str) -> None:
    (installed / "ctl/main.py").write_text(f"raise {error}")

    status, _, err = ctl(installed, "upgrade")

    assert status == 1
    assert err.startswith("socketprotectorctl: out of memory (")


def test_a_module_that_only_a_command_imports_may_be_broken(installed: Path) -> None:
    (installed / "ctl/completion_script.py").write_text(
        "SHELLS = ('bash',)\ndef make(*_): import socketprotector.none\n"
    )

    status, out, err = ctl(installed, "completion", "bash")

    assert (status, out) == (3, "")
    assert err.startswith("socketprotectorctl: files of SocketProtector are missing or broken (")


def test_a_zip_file_runs(installed: Path) -> None:
    """As zipapps do."""
    there = installed.parent
    shutil.make_archive(str(there / "all"), "zip", there, installed.name)
    shutil.rmtree(installed)
    (there / "all.zip").rename(installed)
    done = subprocess.run(
        [sys.executable, "-c", "from socketprotector.ctl.__main__ import main; main(['--help'])"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=there,
        stdout=subprocess.PIPE,
        timeout=DEADLINE_S,
    )

    assert done.stdout.startswith(b"Usage: ")


def test_a_whole_copy_runs(installed: Path) -> None:
    """The positive control."""
    status, _, err = ctl(installed, "--control", str(installed / "none.control"), "upgrade")

    assert status == 1
    assert "broken" not in err
