"""What is checked inside of the machine, by the promise that each check is named after."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
Check = Callable[[Say], None]

CHECKS: dict[str, Check] = {}
#: Those that take the Debian packages, which are built outside.
PACKAGED: set[str] = set()


def promise(name: str, *, packaged: bool = False) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[name] = check
        if packaged:
            PACKAGED.add(name)
        return check

    return register
