"""What the tests of the pool share: its command, and clients that talk in lines."""

from __future__ import annotations

import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
#: Says its pid, then echoes what it gets; ends with its client.
TALKS = "echo $$; exec cat"
#: How many programs its pool has, itself among them; then it waits for its client's end.
COUNTS = "set -- $(cat /proc/$PPID/task/$PPID/children); echo $#; read line"
#: Answers one line as socketprotector.demo.load expects it.
ANSWERS = 'read line; echo "[$$] $line"'


def pool(at_once: int, *command: str | Path, of: int = 1, shell: bool = False) -> tuple[str, ...]:
    """The command of a worker that starts programs."""
    return (
        *(sys.executable, "-I", "-m", "socketprotector.programs.stdio"),
        *("--at-once", str(at_once), "--of", str(of)),
        *(("--shell",) if shell else ()),
        *("--", *map(str, command)),
    )


def refusing(full: Path, number: int, at_once: int, *command: str) -> tuple[str | Path, ...]:
    """A pool that can start nothing while the file is there."""
    return (
        sys.executable,
        PROGRAMS / "refused.py",
        full,
        str(number),
        *pool(at_once, *command)[4:],
    )


def told(lines: list[str]) -> dict[str, str]:
    """The environment that `env` has printed."""
    return dict(line.split("=", 1) for line in lines if "=" in line)
