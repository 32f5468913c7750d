"""Parses the ready message of an einhorn worker.  Pure.

Source: einhorn's worker protocol.  The message is a line of JSON, or a block of YAML in which line
ends are written as %0A and percent signs as %25.  The worker expects no answer.
"""

from __future__ import annotations

import json

#: The longest accepted line; the line that einhorn sends has 50 bytes.
ACK_BYTES = 512
_ACK = "worker:ack"


def ack(line: bytes) -> int | None:
    """Return the pid in a `worker:ack`; 0 if the ack has no pid; None for any other line."""
    if len(line) > ACK_BYTES or _ACK.encode() not in line:
        return None
    text = line.decode("utf-8", "replace").replace("%0A", "\n").replace("%25", "%")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = _yaml(text)
    if not isinstance(found, dict) or found.get("command") != _ACK:
        return None
    named = found.get("pid")
    return named if type(named) is int and named > 0 else 0


def _yaml(text: str) -> dict[str, str | int]:
    """Return the `name: value` lines of a block; names may be Ruby's symbols (`:name: value`)."""
    found: dict[str, str | int] = {}
    for line in text.split("\n"):
        name, _, value = line.strip().removeprefix(":").partition(":")
        value = value.strip()
        is_number = value.isascii() and value.isdigit() and len(value) <= 10
        found[name.strip("\"' \t")] = int(value) if is_number else value.strip("\"'")
    return found
