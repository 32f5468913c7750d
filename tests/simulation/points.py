"""Where in the protector's code a system call is made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import socketprotector

_OURS = str(Path(socketprotector.__file__).parent) + "/"
_DELIVERY = _OURS + "daemon/delivery/"
_RECOVERY = (_OURS + "daemon/recovery.py", _OURS + "daemon/inherited_listeners.py")


def point() -> tuple[str, str]:
    """Return by which verb the protector is in a system call, and where that is made.

    A verb is what the other rooms have called in daemon/delivery; of all that recovery does it is
    told apart.  What has nothing to do with connections is "elsewhere".
    """
    frame: Any = sys._getframe(1)
    where = verb = ""
    recovers = False
    while frame is not None:
        code = frame.f_code
        path = code.co_filename
        if path.startswith(_OURS):
            where = where or f"{path[len(_OURS) :]}:{frame.f_lineno}"
            recovers = recovers or path in _RECOVERY
            if path.startswith(_DELIVERY):
                verb = code.co_qualname
        frame = frame.f_back
    verb = verb.removesuffix(".<locals>.<lambda>") or "elsewhere"
    return f"recovery: {verb}" if recovers else verb, where
