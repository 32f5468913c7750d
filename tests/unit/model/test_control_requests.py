"""Lines of the control socket: what is a request, what is not, and the words for it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from socketprotector.model.control_requests import (
    COMMANDS,
    LINE_BYTES,
    Request,
    RequestError,
    answer,
    canary_of,
    event,
    parse,
    refusal,
)
from socketprotector.model.duration import Duration
from tests.rounds import rounds
from tests.together import together

NUMBERS = st.integers(1, 2**31)
#: Command -> arguments that it takes.
VALID: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    **dict.fromkeys(COMMANDS, st.just({})),
    "stop": st.fixed_dictionaries({}, optional={"quick": st.booleans()}),
    "lame-duck": st.fixed_dictionaries({"on": st.booleans()}),
    "scale": st.fixed_dictionaries({"to": st.integers(1, 1_000_000)})
    | st.fixed_dictionaries({"by": st.integers(-1_000_000, 1_000_000)}),
    "hold": st.fixed_dictionaries({"seconds": st.floats(0.1, 86_400) | st.integers(1, 86_400)}),
    "replace": st.fixed_dictionaries({"generation": NUMBERS})
    | st.fixed_dictionaries({"pid": NUMBERS}),
    "kill": st.fixed_dictionaries({"generation": NUMBERS}),
    "log-level": st.fixed_dictionaries(
        {"level": st.sampled_from(["debug", "info", "warning", "error"])}
    ),
    "connections": st.fixed_dictionaries({}, optional={"generation": NUMBERS}),
    "deploy": st.fixed_dictionaries(
        {"release": st.sampled_from(["1", "v1.2"])}, optional={"force": st.booleans()}
    ),
}
IDS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**62), 10**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters() | st.characters(min_codepoint=0xD800), max_size=64)
)
#: Valid requests, whole, as what is sent.
REQUESTS = st.sampled_from(sorted(VALID)).flatmap(
    lambda command: st.tuples(st.just(command), VALID[command], IDS)
)
WILD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
#: What is nearly a request: known names with values of any kind.
NEARLY = st.dictionaries(
    st.sampled_from(("v", "id", "command", "to", "by", "seconds", "pid", "generation", "quick")),
    WILD | st.sampled_from((1, *COMMANDS)),
)
many = examples(
    max_examples=rounds(25, 1000), deadline=None, suppress_health_check=list(HealthCheck)
)


def line(**fields: Any) -> bytes:
    return json.dumps({"v": 1, **fields}).encode()


def wrong(data: bytes) -> RequestError:
    with pytest.raises(RequestError) as refused:
        parse(data)
    return refused.value


@many
@given(REQUESTS)
def test_a_valid_request_comes_back_as_it_was(sent: tuple[str, dict[str, Any], Any]) -> None:
    command, arguments, request_id = sent

    found = parse(line(command=command, id=request_id, **arguments))

    assert found == Request(command, arguments, request_id)
    assert json.loads(answer(found.id, {}))["id"] == request_id


@many
@given(st.binary() | st.text().map(str.encode) | WILD.map(lambda each: json.dumps(each).encode()))
def test_whatever_a_line_is_it_is_a_request_or_refused(data: bytes) -> None:
    refused_or_taken(data)


@many
@given(NEARLY)
def test_whatever_stands_in_the_place_of_an_argument_is_taken_or_refused(
    fields: dict[str, Any],
) -> None:
    refused_or_taken(json.dumps(fields).encode())


def refused_or_taken(data: bytes) -> None:
    """Any other exception is a failure; and what is answered is one line of JSON."""
    try:
        told = answer(parse(data).id, {})
    except RequestError as error:
        told = refusal(error)
    assert told.count(b"\n") == 1
    json.loads(told, parse_constant=pytest.fail)


@together(
    ("data", "code", "words"),
    [
        (b"", "invalid", "a line is one JSON object: Expecting value: line 1 column 1 (char 0)"),
        (b"status", "invalid", "a line is one JSON object: Expecting value"),
        (b"[]", "invalid", "a line is one JSON object"),
        (b"\xff", "invalid", "a line is one JSON object: 'utf-8' codec can't decode byte 0xff"),
        (b'{"v":1}{"v":1}', "invalid", "a line is one JSON object: Extra data"),
        (b'{"v":1,"v":1}', "invalid", "a line is one JSON object: a name appears twice"),
        (b"9" * 5000, "invalid", "a line is one JSON object: Exceeds the limit"),
        (b"[" * LINE_BYTES, "invalid", "a line is one JSON object: maximum recursion depth"),
        (b'{"a":' * 10_000, "invalid", "a line is one JSON object: maximum recursion depth"),
        (b'{"command":"status"}', "invalid", "v: this protector speaks version 1"),
        (line(v=2, command="status"), "invalid", "v: this protector speaks version 1"),
        (line(v=True, command="status"), "invalid", "v: this protector speaks version 1"),
        (line(v=1.0, command="status"), "invalid", "v: this protector speaks version 1"),
        (line(), "unknown", "unknown command None; known: status, history, reload, "),
        (
            line(command="scael"),
            "unknown",
            "unknown command 'scael'; known: status, history, reload, ",
        ),
        (line(command=["status"]), "unknown", "unknown command ['status']; known: "),
        (line(command="x" * 999), "unknown", "unknown command '" + "x" * 99 + "; known: "),
        (line(command="\ud800\x1b[2J"), "unknown", r"unknown command '\ud800\x1b[2J'; known: "),
        (line(command="status", pid=1), "invalid", "status: unknown argument 'pid'; allowed: none"),
        (
            line(command="scale", too=1),
            "invalid",
            "scale: unknown argument 'too'; allowed: to, by",
        ),
        (line(command="scale"), "invalid", "scale: exactly one of to, by is needed"),
        (line(command="scale", to=1, by=1), "invalid", "scale: exactly one of to, by is needed"),
        (
            line(command="scale", to=0),
            "invalid",
            "scale: to: 0 is not a whole number from 1 to 1000000",
        ),
        (line(command="scale", by=1.0), "invalid", "scale: by: 1.0 is not a whole number from -1"),
        (line(command="scale", to=True), "invalid", "scale: to: True is not a whole number"),
        (line(command="lame-duck"), "invalid", "lame-duck: on is needed"),
        (line(command="hold"), "invalid", "hold: seconds is needed"),
        (
            line(command="hold", seconds=0),
            "invalid",
            "hold: seconds: 0 is not seconds from 0.1 to 86400",
        ),
        (line(command="hold", seconds=86_401), "invalid", "hold: seconds: 86401 is not seconds"),
        (line(command="hold", seconds=float("nan")), "invalid", "hold: seconds: nan is not"),
        (line(command="hold", seconds=float("inf")), "invalid", "hold: seconds: inf is not"),
        (line(command="hold", seconds=10**400), "invalid", "hold: seconds: 1000"),
        (line(command="hold", seconds="1"), "invalid", "hold: seconds: '1' is not seconds"),
        (line(command="replace"), "invalid", "replace: exactly one of generation, pid is needed"),
        (
            line(command="replace", pid=2**31 + 1),
            "invalid",
            "replace: pid: 2147483649 is not a whole",
        ),
        (line(command="kill"), "invalid", "kill: generation is needed"),
        (line(command="deploy"), "invalid", "deploy: release is needed"),
        (line(command="deploy", force=True), "invalid", "deploy: release is needed"),
        (line(command="stop", quick=1), "invalid", "stop: quick: 1 is not true or false"),
        (
            line(command="log-level", level="loud"),
            "invalid",
            'log-level: level: \'loud\' is not "debug", "info", "warning" or "error"',
        ),
        (line(command="log-level", level=[]), "invalid", "log-level: level: [] is not"),
    ],
)
def test_each_mistake_has_its_words(data: bytes, code: str, words: str) -> None:
    refused = wrong(data)

    assert refused.code == code
    assert str(refused).startswith(words)
    assert len(str(refused)) < 400


@together("request_id", [None, 7, "web-1", True, 1.5, "é" * 64, "\ud800"])
@together("mistake", [{"v": 2}, {"command": "scael"}, {"to": 0}, {"x": 1}])
def test_the_id_comes_back_with_a_mistake(request_id: object, mistake: dict[str, Any]) -> None:
    refused = wrong(line(**{"id": request_id, "command": "scale", **mistake}))

    assert refused.id == request_id
    told = json.loads(refusal(refused))
    assert told == {
        "v": 1,
        "id": request_id,
        "ok": False,
        "code": refused.code,
        "error": str(refused),
    }


@together("request_id", ["x" * 65, 10**64, [], {}, [7], float("nan"), float("inf"), float("-inf")])
def test_an_id_that_could_not_be_brought_back_is_refused_without(request_id: object) -> None:
    refused = wrong(line(command="status", id=request_id))

    assert refused.id is None
    assert str(refused) == "id: a JSON scalar of up to 64 characters"


def test_however_deep_a_value_is_it_is_refused_in_words() -> None:
    """Above some depth the parser gives up, and just below it everything else must not."""
    for depth in (10, 500, *range(900, 1050)):  # from any stack of a test
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            for name in ("to", "id", "command", "v", "x"):
                deep = f"{opening * depth}1{closing * depth}"
                refusal(wrong(f'{{"v":1,"command":"scale","{name}":{deep}}}'.encode()))


@pytest.mark.parametrize("time", ["1ms", "2d", "11574d"])
def test_a_canary_takes_each_time_that_its_option_takes(time: str) -> None:
    seconds = Duration(zero=False).read(time)

    assert canary_of({"share": "5%", "for_s": seconds}).for_s == seconds


@pytest.mark.parametrize("wrong", [0, -1, True, "1s", None, math.inf, math.nan, 2e9])
def test_a_canary_takes_no_other_time(wrong: object) -> None:
    with pytest.raises(ValueError, match="no canary"):
        canary_of({"share": "5%", "for_s": wrong})


def test_an_event_s_own_fields_never_pass_for_those_of_every_event() -> None:
    told = json.loads(event("ready", 1.5, "info", {"event": "x", "at": 0, "generation": 7}))

    assert told == {"v": 1, "event": "ready", "at": 1.5, "level": "info", "generation": 7}
