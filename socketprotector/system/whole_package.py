"""Loads what other processes of this program need: for the check of an upgrade."""

from __future__ import annotations

import os
import sys

_PACKAGE = __name__.partition(".")[0]
#: The modules that other processes load, at their start or later: the launching process, a
#: configuration reader, socketprotectorctl, and the workers of --handoff stdio and legacy.
_OTHERS = (
    *("launch.cli", "launch.config_file", "launch.reload_child"),
    *("ctl.__main__", "ctl.render", "ctl.status_table"),
    *("programs.stdio.__main__", "programs.legacy.adapter"),
)


def load() -> None:
    """Load _OTHERS, and compile all modules; raise the error of a broken or missing module."""
    for each in _OTHERS:
        __import__(f"{_PACKAGE}.{each}")
    for root in sys.modules[_PACKAGE].__path__:
        for folder, _, names in os.walk(root, onerror=_fail):
            for name in names:
                if name.endswith(".py"):
                    with open(os.path.join(folder, name), "rb") as file:
                        compile(file.read(), file.name, "exec")


def _fail(error: OSError) -> None:
    raise error
