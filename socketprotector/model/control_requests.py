"""Parses requests on the control socket, and writes the lines of answers and events.

Pure.  A request with an unknown or wrong argument is refused as a whole.

Source: docs/control.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from . import json_text
from .lazy_dataclass import field, frozen
from .release import is_name
from .share import CANARY_FOR_S, Canary, read_percent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    #: The allowed values of an argument, in words and as a test.
    Kind = tuple[str, Callable[[Any], bool]]

VERSION = 1
LINE_BYTES = 65_536
_ID_CHARACTERS = 64
#: No generation, worker or process has a higher number.
_MOST = 2**31
_ENVELOPE = ("v", "id", "command")


class RequestError(Exception):
    """A request is wrong; the text and the code are for the answer."""

    def __init__(self, code: str, text: str, request_id: object = None) -> None:
        super().__init__(text)
        self.code = code
        self.id = request_id


@frozen
class Request:
    """A known command with valid arguments."""

    command: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: object = None


def _whole(low: int, high: int) -> Kind:
    text = f"a whole number from {low} to {high}"
    return text, lambda value: type(value) is int and low <= value <= high


def canary_of(value: Mapping[str, Any]) -> Canary:
    """Return the canary that a request describes.  Raises TypeError or ValueError."""
    rest = dict(value)
    share, for_s = read_percent(str(rest.pop("share", ""))), rest.pop("for_s", CANARY_FOR_S)
    at_least = rest.pop("at_least", 0)
    if rest or not _SECONDS[1](for_s) or not _whole(0, _MOST)[1](at_least):
        raise ValueError("no canary")
    return Canary(share, float(for_s), at_least)


_NUMBER = _whole(1, _MOST)
_SECONDS: Kind = (
    "seconds from 0.1 to 86400",
    lambda value: type(value) in (int, float) and 0.1 <= value <= 86_400,
)
_YES_OR_NO: Kind = "true or false", lambda value: isinstance(value, bool)


def _is_canary(value: Any) -> bool:
    try:
        canary_of(value)
    except (TypeError, ValueError):
        return False
    return True


_CANARY: Kind = 'an object with "share", such as "5%"', _is_canary
_RELEASE: Kind = "the name of a release", is_name
_LEVEL: Kind = (
    '"debug", "info", "warning" or "error"',
    lambda value: value in ("debug", "info", "warning", "error"),
)
#: Command -> its arguments.  Exactly one of them is required, except for commands in _OPTIONAL.
COMMANDS: Mapping[str, Mapping[str, Kind]] = {
    "status": {},
    "history": {},
    "reload": {"dry_run": _YES_OR_NO, "canary": _CANARY},
    "promote": {"now": _YES_OR_NO},
    "deploy": {
        "release": _RELEASE,
        "expect": _RELEASE,
        "force": _YES_OR_NO,
        "dry_run": _YES_OR_NO,
    },
    "rollback": {"expect": _RELEASE},
    "releases": {},
    "upgrade": {"check": _YES_OR_NO},
    "stop": {"quick": _YES_OR_NO},
    "lame-duck": {"on": _YES_OR_NO},
    "scale": {"to": _whole(1, 1_000_000), "by": _whole(-1_000_000, 1_000_000)},
    "hold": {"seconds": _SECONDS},
    "release": {},
    "replace": {"generation": _NUMBER, "pid": _NUMBER},
    "kill": {"generation": _NUMBER},
    "log-level": {"level": _LEVEL},
    "reopen": {},
    "connections": {"generation": _NUMBER},
    "crashes": {},
    "diff": {},
    "events": {},
}
#: The read-only commands that --status-group may send.
STATUS_COMMANDS = ("status", "history", "releases", "events")
#: Commands whose arguments are optional.
_OPTIONAL = ("reload", "deploy", "promote", "rollback", "upgrade", "stop", "connections")


def parse(line: bytes) -> Request:
    """Return the request in a line.  Raises RequestError if the line is not a valid request."""
    try:
        found = json_text.parse(line, _each_once)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, too
        raise RequestError("invalid", f"a line is one JSON object: {_short(error)}") from None
    if not isinstance(found, dict):
        raise RequestError("invalid", "a line is one JSON object")
    request_id = found.get("id")
    if not _is_id(request_id):
        raise RequestError("invalid", f"id: a JSON scalar of up to {_ID_CHARACTERS} characters")
    if type(found.get("v")) is not int or found["v"] != VERSION:
        raise RequestError("invalid", f"v: this protector speaks version {VERSION}", request_id)
    command = found.get("command")
    if not isinstance(command, str) or command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise RequestError(
            "unknown", f"unknown command {_short(command)}; known: {known}", request_id
        )
    arguments = {name: value for name, value in found.items() if name not in _ENVELOPE}
    wrong = _fault(command, arguments)
    if wrong is not None:
        raise RequestError("invalid", f"{command}: {wrong}", request_id)
    return Request(command, arguments, request_id)


def _fault(command: str, arguments: Mapping[str, object]) -> str | None:
    allowed = COMMANDS[command]
    for name, value in arguments.items():
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            return f"unknown argument {_short(name)}; allowed: {known}"
        expected, is_one = allowed[name]
        if not is_one(value):
            return f"{name}: {_short(value)} is not {expected}"
    if not allowed or command in _OPTIONAL or len(arguments) == 1:
        return None
    return f"{'exactly one of ' if len(allowed) > 1 else ''}{', '.join(allowed)} is needed"


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")  # parsers differ in which value they use
    return found


def _is_id(value: object) -> bool:
    if isinstance(value, str | list | dict):
        return isinstance(value, str) and len(value) <= _ID_CHARACTERS
    try:
        return len(json.dumps(value, allow_nan=False)) <= _ID_CHARACTERS
    except ValueError:
        return False  # NaN or Infinity: Python reads them, but an answer in valid JSON cannot


def _short(value: object) -> str:
    text = value if isinstance(value, Exception) else repr(value)
    return str(text)[:100]


def answer(request_id: object, result: Mapping[str, object]) -> bytes:
    """Return the answer to a request that was carried out."""
    return _line({"v": VERSION, "id": request_id, "ok": True, "result": result})


def refusal(wrong: RequestError) -> bytes:
    """Return the answer to a wrong request, with the reason."""
    text = {"ok": False, "code": wrong.code, "error": str(wrong)}
    return _line({"v": VERSION, "id": wrong.id, **text})


def event(name: str, at: float, level: str, fields: Mapping[str, object]) -> bytes:
    """Return the line of an event.  at: in seconds since the epoch."""
    # Our own keys are last, so that no field can replace them.
    return _line({**fields, "v": VERSION, "event": name, "at": at, "level": level})


def _line(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"
