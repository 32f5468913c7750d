"""Copies of our packages that a test may change."""

from __future__ import annotations

import shutil
from pathlib import Path

#: What another process is compiling to.  It is renamed as soon as it is whole, so a copy fails.
_UNFINISHED = shutil.ignore_patterns("*.pyc.*")


def copy_package(source: Path | str, target: Path) -> None:
    """Copy a package with its bytecode, while other processes may use the package."""
    shutil.copytree(source, target, ignore=_UNFINISHED)
