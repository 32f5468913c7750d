"""Writes the answer of a program to stdout: help, a version, the result of a check.

The resident process does not load this module.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..model.errors import SystemRefused, what_failed


@contextmanager
def answering() -> Iterator[None]:
    """Raise SystemRefused if what the block prints cannot be written.

    If the reader has exited (`| head`), exit silently with status 0.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        sys.exit(0)
    except OSError as error:
        discard_output()
        raise SystemRefused(f"cannot write to stdout: {what_failed(error)}") from error


class Answering:
    """A base of click commands: writes their help and version by answering()."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the command line, which may print a page or the version."""
        with answering():
            return super().make_context(*arguments, **options)  # type: ignore[misc]


def discard_output() -> None:
    """Send all further output, and what stdout still buffers, to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
