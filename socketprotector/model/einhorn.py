"""What a worker of einhorn's says when it is ready.  Pure.

Source: einhorn's worker protocol: one line, JSON or a block of YAML with its line ends written
as %0A and its percent signs as %25; no answer is expected.
"""

from __future__ import annotations

import json
import re

_ACK = re.compile(r"""^\s*:?["']?command["']?\s*:\s*["']?worker:ack["']?\s*$""", re.MULTILINE)
_PID = re.compile(r"""^\s*:?["']?pid["']?\s*:\s*(\d{1,10})\s*$""", re.MULTILINE)


def ack(line: bytes) -> int | None:
    """Return the pid in a `worker:ack`, 0 where it names none; None for any other line."""
    text = line.decode("utf-8", "replace").replace("%0A", "\n").replace("%25", "%")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if _ACK.search(text) is None:
            return None
        pid = _PID.search(text)
        return int(pid[1]) if pid else 0
    if not isinstance(found, dict) or found.get("command") != "worker:ack":
        return None
    named = found.get("pid")
    return named if type(named) is int and named > 0 else 0
