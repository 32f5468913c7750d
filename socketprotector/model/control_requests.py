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
#: The longest canary; the option canary-for accepts no longer time.
_LONGEST_S = 1e9
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
    is_time = type(for_s) in (int, float) and 0 < for_s <= _LONGEST_S
    if rest or not is_time or not _whole(0, _MOST)[1](at_least):
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


_CANARY: Kind = (
    'an object: "share", such as "5%"; optional "for_s" above 0, "at_least" from 0',
    _is_canary,
)
_RELEASE: Kind = "the name of a release", is_name
_LEVEL: Kind = (
    '"debug", "info", "warning" or "error"',
    lambda value: value in ("debug", "info", "warning", "error"),
)


@frozen
class Command:
    """The arguments of one command, who may send it, and when."""

    arguments: Mapping[str, Kind] = field(default_factory=dict)
    optional: bool = False  # otherwise exactly one of the arguments is required
    required: str = ""  # the argument that is required although the others are optional
    reads: bool = False  # it changes nothing, so a failure leaves nothing half done
    while_stopping: bool = True
    for_status_group: bool = False  # the members of --status-group may send it


COMMANDS = {
    "status": Command(reads=True, for_status_group=True),
    "history": Command(reads=True, for_status_group=True),
    "reload": Command(
        {"dry_run": _YES_OR_NO, "canary": _CANARY}, optional=True, while_stopping=False
    ),
    "promote": Command({"now": _YES_OR_NO}, optional=True, while_stopping=False),
    "deploy": Command(
        {"release": _RELEASE, "expect": _RELEASE, "force": _YES_OR_NO, "dry_run": _YES_OR_NO},
        optional=True,
        required="release",
        while_stopping=False,
    ),
    "rollback": Command({"expect": _RELEASE}, optional=True, while_stopping=False),
    "releases": Command(reads=True, for_status_group=True),
    "upgrade": Command({"check": _YES_OR_NO}, optional=True, while_stopping=False),
    "stop": Command({"quick": _YES_OR_NO}, optional=True),
    "lame-duck": Command({"on": _YES_OR_NO}, while_stopping=False),
    "scale": Command(
        {"to": _whole(1, 1_000_000), "by": _whole(-1_000_000, 1_000_000)}, while_stopping=False
    ),
    "hold": Command({"seconds": _SECONDS}, while_stopping=False),
    "release": Command(),
    "replace": Command({"generation": _NUMBER, "pid": _NUMBER}, while_stopping=False),
    "kill": Command({"generation": _NUMBER}),
    "log-level": Command({"level": _LEVEL}),
    "reopen": Command(),
    "connections": Command({"generation": _NUMBER}, optional=True, reads=True),
    "crashes": Command(reads=True),
    "diff": Command(reads=True),
    "events": Command(reads=True, for_status_group=True),
}
STATUS_COMMANDS = tuple(name for name, each in COMMANDS.items() if each.for_status_group)


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
    allowed, is_optional = COMMANDS[command].arguments, COMMANDS[command].optional
    for name, value in arguments.items():
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            return f"unknown argument {_short(name)}; allowed: {known}"
        expected, is_allowed = allowed[name]
        if not is_allowed(value):
            return f"{name}: {_short(value)} is not {expected}"
    if (required := COMMANDS[command].required) and required not in arguments:
        return f"{required} is needed"
    if not allowed or is_optional or len(arguments) == 1:
        return None
    return f"{'exactly one of ' if len(allowed) > 1 else ''}{', '.join(allowed)} is needed"


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice")  # parsers differ in which value they use
    return found


def _is_id(value: object) -> bool:
    if isinstance(value, str | list | dict):
        return isinstance(value, str) and len(value) <= _ID_CHARACTERS
    try:
        return len(json.dumps(value, allow_nan=False)) <= _ID_CHARACTERS
    except ValueError:
        return False  # Python reads NaN and Infinity, but valid JSON cannot contain them


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
