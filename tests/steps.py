"""The steps that something takes of the interpreter: the same on a busy machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def steps_of(act: Callable[[], object], within: str = "") -> int:
    """Count the opcodes that an act runs.

    within: only those of files below this folder.
    """
    count = 0

    def traced(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(within):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return traced

    # Python 3.12 tells of opcodes only if some frame has asked for them before settrace().
    sys._getframe().f_trace_opcodes = True
    before = sys.gettrace()
    sys.settrace(traced)
    try:
        act()
    finally:
        sys.settrace(before)
    return count
