"""Copies of our packages that a test may change."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

#: What another process is compiling to.  It is renamed as soon as it is whole, so a copy fails.
_UNFINISHED = shutil.ignore_patterns("*.pyc.*")


def copy_package(source: Path | str, target: Path) -> None:
    """Copy a package with its bytecode, while other processes may use the package.

    Its files are links: a test removes one before it writes another in its place.
    """
    shutil.copytree(_first_copy(source), target, copy_function=os.link)


@cache
def _first_copy(source: Path | str) -> Path:
    """Copy a package once for this process; its folder is removed with all others of tests."""
    first = Path(tempfile.mkdtemp(prefix="copy-"), "package")
    shutil.copytree(source, first, ignore=_UNFINISHED)
    return first
