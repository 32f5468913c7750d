"""Faults for the real command: calls that fail in its own processes, disks of a few pages."""

from __future__ import annotations

import os
from pathlib import Path

#: In front of each fault: whether this process is the resident one, and an error by its name.
_FIRST = """
import errno, os, sys

def resident():
    return "LISTEN_FDS" in os.environ

def fault(name):
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))
"""


def injected(folder: Path, text: str) -> dict[str, str]:
    """An environment in which each Python of the protector begins with `text`.

    Not the guard and the relay, nor the workers of tests: they are told to do without (-I, -E).
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_FIRST + text, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
