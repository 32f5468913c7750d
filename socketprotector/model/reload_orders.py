"""The values of --reload-order, and the options and commands that each excludes.

Pure.  Settings and state have an order as flat fields: Policy.stop_first and Policy.surge.
"""

from __future__ import annotations

from .lazy_dataclass import frozen


@frozen
class ReloadOrder:
    """One value of --reload-order."""

    name: str
    excludes: tuple[str, ...] = ()  # the options that do not work with it
    no_dry_run: str = ""  # why a dry run does not work with it; "": it works


START_FIRST = ReloadOrder("start-first")
STOP_FIRST = ReloadOrder(
    "stop-first",
    ("settle", "canary"),
    "with --reload-order stop-first the old workers end before the new ones start",
)
ROLLING = ReloadOrder("rolling", ("canary",))
#: In the order of --help.
ORDERS = (START_FIRST, STOP_FIRST, ROLLING)
