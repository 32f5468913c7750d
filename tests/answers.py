"""Validates what a test reads from a control socket: by the package's schema, and more strictly.

The schema lets a later version add fields.  Here an added field fails, too, so that each change
of an answer or event is a change of the schema.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema.validators

import socketprotector

PATH = Path(socketprotector.__file__).with_name("control.schema.json")
SCHEMA: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
Message = dict[str, Any]


def strict(schema: Any) -> Any:
    """Return a schema whose objects have no field but those that it names."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(each) for name, each in schema.items()}
    if "allOf" in schema:
        found["unevaluatedProperties"] = False
    elif schema.get("type") == "object" and "properties" in schema:
        found["additionalProperties"] = False
    return found


def lost(old: Any, new: Any, place: str = "$") -> Iterator[str]:
    """Yield each part of a schema that a later schema lacks or has changed, but no descriptions."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:
            if name == "description" and isinstance(old[name], str):
                continue
            if name in new:
                yield from lost(old[name], new[name], f"{place}/{name}")
            else:
                yield f"{place}/{name}"
    elif place.endswith("/type"):  # one name, or a list of them
        if _types(old) != _types(new):
            yield f"{place}: {old}, now {new}"
    elif isinstance(old, list) and isinstance(new, list):
        if old and isinstance(old[0], dict):  # such as anyOf, whose order stays
            shown = new if "/properties/" in place else new[: len(old)]  # of a field: its types
            for at, (each, now) in enumerate(zip_longest(old, shown)):
                yield from lost(each, now, f"{place}/{at}")
        else:
            yield from (f"{place}: {each}" for each in old if each not in new)
    elif old != new:
        yield f"{place}: {old}, now {new}"


def _types(named: str | list[str]) -> set[str]:
    return {named} if isinstance(named, str) else {*named}


#: In JSON Schema 2.0 is an integer.  Here it is not: the field has another type.
_TYPES = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
    "integer", lambda _, value: type(value) is int
)
_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=_TYPES)
_STRICT = strict(SCHEMA)
#: What all events have; each event-NAME adds its own fields.
_STRICT["$defs"]["event"] = SCHEMA["$defs"]["event"]


@cache
def _validator(name: str) -> Any:
    """Return the validator of one of the schema's definitions; a KeyError: there is none."""
    chosen = _STRICT["$defs"][name]
    return _Validator({**chosen, "$defs": _STRICT["$defs"]})


def faults(name: str, value: object) -> list[str]:
    """Return how a value differs from a definition, each difference as one line."""
    if name not in SCHEMA["$defs"]:
        return [f"the schema has no {name}"]
    return [
        f"{name}: {'.'.join(map(str, each.absolute_path)) or 'it'}: {each.message}"
        for each in _validator(name).iter_errors(value)
    ]


def check(command: str | None, message: Message) -> None:
    """Raise AssertionError for an answer or event that the schema does not describe.

    command: that of the request; None: an unknown one, so that only the frame is checked.
    """
    if "event" in message:
        found = faults(f"event-{message['event']}", message)
    elif message.get("ok") is True:
        found = faults("answer", {**message, "result": {}})
        if command is not None:
            found += faults(f"result-{command}", message.get("result"))
    else:
        found = faults("refusal", message)
    assert not found, f"{found} in {message}"


#: The exit status of a client of the package that was answered with something else.
OTHER_ANSWER = 99


def check_clients() -> None:
    """Let clients of the package check what protectors answer, in this process and its forks.

    Such a client exits with OTHER_ANSWER.  What a test itself answers is not checked: a stand-in
    may leave out what its test does not need.
    """
    from socketprotector.ctl.client import Client

    send, read = Client.send, Client._message
    asked: dict[tuple[int, int], str] = {}

    def sends(client: Client, command: str, arguments: Message, until: float) -> None:
        asked[id(client), client._last_id + 1] = command
        send(client, command, arguments, until)

    def reads(client: Client, until: float) -> tuple[Message, int] | None:
        found = read(client, until)
        if found is not None and client.peer[0] != os.getppid():
            try:
                check(asked.get((id(client), found[0].get("id"))), found[0])  # type: ignore[arg-type]
            except AssertionError as error:
                os.write(2, f"{error}\n".encode())
                os._exit(OTHER_ANSWER)
        return found

    Client.send, Client._message = sends, reads  # type: ignore[assignment, method-assign]
    _check_outputs()


def output_faults(command: str, value: dict[str, Any]) -> list[str]:
    """Return how the JSON that a command of socketprotectorctl prints differs from the schema.

    That is its own output, or the protector's result or event, of whatever version that is.
    """
    named = f"output-{command}"
    return faults(named, value) if named in SCHEMA["$defs"] else []


def _check_outputs() -> None:
    import click

    from socketprotector.ctl import cli

    def dumps(value: dict[str, Any]) -> str:
        found = output_faults(str(click.get_current_context().command.name), value)
        if found:
            os.write(2, f"{found} in {value}\n".encode())
            os._exit(OTHER_ANSWER)
        return json.dumps(value)

    vars(cli)["json"] = SimpleNamespace(dumps=dumps)
