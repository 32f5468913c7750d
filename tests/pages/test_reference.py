"""tools/reference.py: tables say what the code is, and a row too many or too few is not accepted.

`make lint` compares the pages themselves.
"""

from __future__ import annotations

import ast
import re
from types import ModuleType

import pytest

from socketprotector.model.log_format import LEVELS
from tests.pages.tooling import tool
from tests.running import ROOT

#: One process parses the code for them.
pytestmark = pytest.mark.xdist_group("code facts")
TABLE = """\
text

| name | made | |
|---|---|---|
| `one`, `two` | old | what they mean |
| `three` | | a \\| b |
"""
FACTS = {"one": ("a, b",), "two": ("b, c",), "three": ("",)}


@pytest.fixture(scope="module")
def tools() -> ModuleType:
    return tool("reference")


def test_columns_are_made_and_the_last_one_is_kept(tools: ModuleType) -> None:
    made = tools.filled(TABLE, FACTS)

    assert made == TABLE.replace("old", "a, b, c")
    assert tools.filled(made, FACTS) == made


def test_a_row_too_many_is_refused(tools: ModuleType) -> None:
    with pytest.raises(tools.Wrong, match="the code has no two"):
        tools.filled(TABLE, {name: FACTS[name] for name in ("one", "three")})


def test_a_row_too_few_is_refused(tools: ModuleType) -> None:
    with pytest.raises(tools.Wrong, match="no row for four"):
        tools.filled(TABLE, {**FACTS, "four": ("",)})


def test_each_way_to_write_a_line_of_the_log_is_known(tools: ModuleType) -> None:
    """No text that looks like an event stands behind a level in a call that was overlooked."""
    events = tools.code_facts.log_events()
    found = {
        node.args[1].value
        for path in (ROOT / "socketprotector").rglob("*.py")
        if any(f'"{level}"' in (text := path.read_text(encoding="utf-8")) for level in LEVELS)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and len(node.args) > 1
        if isinstance(node.args[0], ast.Constant) and node.args[0].value in LEVELS
        if isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str)
    }

    assert found <= events.keys()
    assert events["orphans"] == (["warning"], ["generation", "worker", "group", "hint"])
    assert events["exited"][1][:4] == ["generation", "worker", "how", "lost"]
    assert "signal" in events["signalled"][1]
    assert "again_in_s" in events["guard-cannot-start"][1]
    assert all(set(levels) <= set(LEVELS) and levels for levels, _ in events.values())


def test_variables_are_found_by_every_way_to_name_them(tools: ModuleType) -> None:
    names = tools.code_facts.environment()

    assert {
        "LISTEN_FDS",
        "LISTEN_PID",
        "NO_COLOR",
        "XDG_RUNTIME_DIR",
        "SOCKETPROTECTOR_NOFILE",
    } <= names
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*", name) for name in names)


def test_exit_statuses_are_those_of_the_errors(tools: ModuleType) -> None:
    assert tools.code_facts.exit_statuses() == {0, 2, 3, 100, 111, 130}


def test_socketprotectorctl_waits_for_no_event_that_is_never_logged(tools: ModuleType) -> None:
    awaited = set[str]()
    for path in (ROOT / "socketprotector/ctl").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "refresh_after":
                awaited.update(ast.literal_eval(node.value))
            if isinstance(node, ast.Compare) and ast.unparse(node.left) == "event.get('event')":
                awaited.update(re.findall(r"'([^']+)'", ast.unparse(node.comparators[0])))
            if isinstance(node, ast.Match) and ast.unparse(node.subject) == "name":
                awaited.update(ast.unparse(case.pattern).strip("'") for case in node.cases)

    assert {"upgrade-failed", "drained", "route"} <= awaited
    assert awaited <= tools.code_facts.log_events().keys()
