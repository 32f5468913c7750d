"""The JSON Schema of the package: it says what the code answers, in the same names and types."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from socketprotector.core.fleet import LameDuck, Phase, State
from socketprotector.core.waiting import Wait
from socketprotector.ctl import main
from socketprotector.ctl.cli import program
from socketprotector.ctl.connections import Connection, HiddenWorker
from socketprotector.ctl.errors import ControlError, NotReady
from socketprotector.model.control_requests import COMMANDS
from socketprotector.model.handoff_modes import MODES
from socketprotector.model.history import Crash, Reload
from socketprotector.model.log_format import LEVELS
from socketprotector.model.ready_kinds import READY_BY
from tests import answers
from tests.pages.tooling import tool
from tests.running import ROOT
from tests.unit.ctl import fake

DEFINITIONS = answers.SCHEMA["$defs"]
STATUS = DEFINITIONS["result-status"]["properties"]
GENERATION = DEFINITIONS["generation"]["properties"]
#: In the log alone: the guard has no control socket, and a crash loop is no event there.
LOG_ONLY = {
    *("guard-cannot-execute", "guard-cannot-keep", "guard-cannot-read", "guard-cannot-start"),
    *("guard-gives-up", "protector-died", "crash-loop"),
}
_TYPES = {"int": "integer", "float": "number", "str": "string", "bool": "boolean", "None": "null"}


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(answers.SCHEMA)


def test_a_loss_from_one_schema_to_the_next_is_found() -> None:
    assert [*answers.lost(answers.SCHEMA, answers.SCHEMA)] == []
    new = copy.deepcopy(answers.SCHEMA)
    status = new["$defs"]["result-status"]
    status["properties"]["added"] = {"type": "integer"}
    status["properties"]["phase"]["description"] = "other words"
    health = status["properties"]["health"]["anyOf"]
    health[0]["properties"]["added"] = {"type": "integer", "description": "words"}
    assert [*answers.lost(answers.SCHEMA, new)] == []

    del health[0]["properties"]["probe"]
    del health[1]
    del status["properties"]["pid"]
    status["required"].remove("name")
    status["properties"]["version"]["type"] = "integer"
    gained = ["boolean", *STATUS["held_s"]["type"]]
    status["properties"]["held_s"]["type"] = gained
    del status["properties"]["log_level"]["enum"][0]
    status["properties"]["dry_run"]["anyOf"].append({"type": "string"})

    at = "$/$defs/result-status"
    assert {*answers.lost(answers.SCHEMA, new)} == {
        f"{at}/properties/pid",
        f"{at}/properties/health/anyOf/0/properties/probe",
        f"{at}/properties/health/anyOf/1: {{'type': 'null'}}, now None",
        f"{at}/required: name",
        f"{at}/properties/dry_run/anyOf/2: None, now {{'type': 'string'}}",
        f"{at}/properties/version/type: string, now integer",
        f"{at}/properties/held_s/type: {gained[1:]}, now {gained}",
        f"{at}/properties/log_level/enum: {STATUS['log_level']['enum'][0]}",
    }


def test_each_command_has_a_result() -> None:
    named = {name for name in DEFINITIONS if name.startswith("result-")}

    assert named == {f"result-{command}" for command in COMMANDS}


def test_each_command_that_prints_json_of_its_own_has_an_output() -> None:
    """The others print the protector's result, or events."""
    assert main.COMMANDS  # which its import has added to the program
    named = {name.removeprefix("output-") for name in DEFINITIONS if name.startswith("output-")}
    others = {"top", "events", *COMMANDS} - named

    assert named | others == {*program.commands}
    assert DEFINITIONS["output-connections"]["properties"].keys() == {"connections", "unseen"}
    for of, fields in (("connections", Connection), ("unseen", HiddenWorker)):
        items = DEFINITIONS["output-connections"]["properties"][of]["items"]
        assert items["properties"].keys() == {*fields.__annotations__}


def test_an_outcome_has_each_result_of_the_code() -> None:
    finished = words_of("finish", "ctl") | {"passed", "reloaded"}
    errors = {ControlError.result, *(each.result for each in descendants(ControlError))}
    outcomes = [DEFINITIONS[f"output-{name}"] for name in ("reload", "deploy", "stop")]
    outcomes.append(DEFINITIONS["output-upgrade"]["anyOf"][0])
    results = {result for each in outcomes for result in each["properties"]["result"]["enum"]}

    assert results == finished | errors - {NotReady.result} | {"interrupted"}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "a client's"])
def test_the_output_of_upgrade_is_an_outcome_or_the_result_of_a_check(*, strict: bool) -> None:
    check = {"from": "0.9.0", "version": "0.9.1", "reason": None}
    outcome = {**check, "result": "upgraded", "reason": "", "waited_s": 0.5}
    later = jsonschema.Draft202012Validator(
        {"$ref": "#/$defs/output-upgrade", "$defs": DEFINITIONS}
    )

    def is_described(value: dict[str, Any]) -> bool:
        return not answers.output_faults("upgrade", value) if strict else later.is_valid(value)

    def lacks(value: dict[str, Any], name: str) -> dict[str, Any]:
        return {each: value[each] for each in value if each != name}

    assert is_described(check)
    assert is_described({**check, "version": None, "reason": "no such module"})
    assert is_described(outcome)
    for name in check:
        assert not is_described(lacks(check, name))
    assert not is_described({**check, "result": "upgraded"})
    assert not is_described({**outcome, "result": "another"})
    assert not is_described(lacks(outcome, "waited_s"))
    assert is_described(outcome | {"later": 1}) is not strict


def descendants(kind: type[ControlError]) -> Iterator[type[ControlError]]:
    for each in kind.__subclasses__():
        yield each
        yield from descendants(each)


@pytest.mark.parametrize(
    ("name", "model"),
    [("crash", Crash), ("reload", Reload), ("dry-run", Reload), ("wait", Wait)],
)
def test_a_definition_has_the_fields_of_its_model(name: str, model: type) -> None:
    """The types of the model, as they are written; `result` and others list their values."""
    written = {
        field: {_TYPES[each] for each in kind.split(" | ")}
        for field, kind in model.__annotations__.items()
    }
    properties = DEFINITIONS[name]["properties"]

    assert {field: types_of(properties[field]) for field in properties} == written
    assert set(DEFINITIONS[name]["required"]) == written.keys()


def test_an_entry_of_the_history_is_a_reload_with_a_kind() -> None:
    entry, reload = (DEFINITIONS[name]["properties"] for name in ("history-entry", "reload"))

    assert entry.keys() == {"kind", *reload}
    assert {**entry, "result": None} == {**reload, "kind": entry["kind"], "result": None}


def types_of(schema: dict[str, Any]) -> set[str]:
    if "enum" in schema:
        return {_TYPES[type(each).__name__] for each in schema["enum"]}
    kind = schema["type"]
    return {kind} if isinstance(kind, str) else set(kind)


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (GENERATION["phase"], {each.value for each in Phase}),
        (DEFINITIONS["worker"]["properties"]["state"], {each.value for each in State}),
        (DEFINITIONS["worker"]["properties"]["ready_by"], {*READY_BY, ""}),
        (STATUS["lame_duck"], {each.value for each in LameDuck}),
        (STATUS["handoff"], {*MODES}),
        (STATUS["log_level"], {*LEVELS}),
    ],
    ids=["phase", "state", "ready_by", "lame_duck", "handoff", "log_level"],
)
def test_a_word_is_one_of_those_of_the_code(schema: dict[str, Any], values: set[str]) -> None:
    assert set(schema["enum"]) == values


def called(name: str, folder: str) -> Iterator[ast.Call]:
    for path in (ROOT / "socketprotector" / folder).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if f"{name}(" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
                yield node


def words_of(name: str, folder: str) -> set[str]:
    """The first argument of each call, where it is written out."""
    first = [node.args[0] for node in called(name, folder) if node.args]
    return {str(each.value) for each in first if isinstance(each, ast.Constant)}


def test_a_refusal_has_each_code_of_the_code_and_of_the_document() -> None:
    text = (ROOT / "docs" / "control.md").read_text(encoding="utf-8")
    table = text.partition("| code | what is wrong |")[2].partition("\n\n")[0]
    codes = set(DEFINITIONS["refusal"]["properties"]["code"]["enum"])

    assert set(re.findall(r"^\| `(\w+)`", table, re.M)) == codes
    assert {*words_of("RequestError", "daemon"), *words_of("RequestError", "model")} == codes


def test_a_wait_has_each_kind_of_the_code() -> None:
    kinds = set(DEFINITIONS["wait"]["properties"]["kind"]["enum"])

    assert words_of("Wait", "core")
    assert words_of("Wait", "core") <= kinds


@pytest.mark.xdist_group("code facts")
def test_each_event_has_the_levels_and_fields_of_the_code() -> None:
    made = {
        event: ({*levels} - {"debug"}, {*fields})
        for event, (levels, fields) in tool("code_facts").log_events().items()
        if event not in LOG_ONLY and {*levels} != {"debug"}
    }
    described = {
        name.removeprefix("event-"): (
            set(schema["properties"]["level"]["enum"]),
            schema["properties"].keys() - {"event", "level"},
        )
        for name, schema in DEFINITIONS.items()
        if name.startswith("event-")
    }

    assert described == made


def test_an_event_needs_no_field_that_it_does_not_have() -> None:
    for name, schema in DEFINITIONS.items():
        if name.startswith("event-"):
            assert schema["properties"]["event"] == {"const": name.removeprefix("event-")}
            assert {*schema.get("required", ())} <= schema["properties"].keys(), name


# -- a change of an answer is found ---------------------------------------------------------


def example() -> dict[str, Any]:
    return fake.status(
        reloads=[fake.reload(8, "reloaded")],
        dry_run=fake.reload(9, "passed"),
        rollout=fake.rolling(fake.awaited(5)),
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the path of each field of an object, whole ones among them."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield (*path, name)
            yield from places(each, (*path, name))
    if isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def changes(path: tuple[Any, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return a status without that field, with another name of it, and with another type."""
    for change in ("remove", "rename", "retype"):
        changed = copy.deepcopy(example())
        *before, last = path
        holder: Any = changed
        for each in before:
            holder = holder[each]
        value = holder.pop(last)
        if change == "rename":
            holder[f"{last}_"] = value
        elif change == "retype":
            holder[last] = {"another": "type"}
        yield change, changed


def test_a_field_of_status_that_is_removed_renamed_or_retyped_is_a_fault() -> None:
    assert answers.faults("result-status", example()) == []
    unseen = {
        (change, path)
        for path in places(example())
        for change, changed in changes(path)
        if not answers.faults("result-status", changed)
    }

    assert unseen == {("remove", ("rollout",))}  # the one that is there at some times only


def test_a_later_version_may_add_a_field() -> None:
    """The schema as it is in the package is that of clients."""
    reader = jsonschema.Draft202012Validator(
        {"$ref": "#/$defs/result-status", "$defs": DEFINITIONS}
    )

    assert list(reader.iter_errors({**example(), "later": 1})) == []
    assert answers.faults("result-status", {**example(), "later": 1}) != []


@pytest.mark.parametrize("change", [{"later": 1}, {"generation": "8"}, {"generation": 8.0}])
def test_a_changed_event_is_a_fault(change: dict[str, Any]) -> None:
    event = {"v": 1, "event": "drained", "at": 1.5, "level": "info", "generation": 8}

    answers.check(None, event)
    with pytest.raises(AssertionError):
        answers.check(None, {**event, **change})
    with pytest.raises(AssertionError):
        answers.check(None, {name: event[name] for name in event if name != "generation"})


def test_an_answer_is_checked_with_its_command() -> None:
    answer = {"v": 1, "id": 1, "ok": True, "result": {"workers": 2}}

    answers.check("scale", answer)
    for command in ("status", "hold", "unheard-of"):
        with pytest.raises(AssertionError):
            answers.check(command, answer)
