"""Where keys stand in a TOML text, against what tomllib reads from it."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socketprotector.launch import toml_lines
from tests.rounds import rounds

TEXT = '''# a comment with = and [brackets]
a = 1 # one
"b.c" . d = """x
# no comment
key = "value"
y""\\"" """
listen = [ # what it listens on
  "80", # ]
  '[8]1',
  [1, {x = 2}],
]

[env]
A = '''
TEXT += """'x = 1' # ' 3
B = {c = 1, "d e" = [3, '''
  4''']}
[[z]]
k = 1
[[z]] # the second
k = 2
[z.w]
q = 1979-05-27 07:32:00
r.s = 07:32:00
"""


def test_each_key_has_its_line() -> None:
    tomllib.loads(TEXT)

    found = toml_lines.find(TEXT)

    assert found == {
        ("a",): 2,
        ("b.c",): 3,
        ("b.c", "d"): 3,
        ("listen",): 7,
        ("listen", 0): 8,
        ("listen", 1): 9,
        ("listen", 2): 10,
        ("env",): 13,
        ("env", "A"): 14,
        ("env", "B"): 15,
        ("env", "B", "c"): 15,
        ("env", "B", "d e"): 15,
        ("z",): 17,
        ("z", "k"): 18,
        ("z", "w"): 21,
        ("z", "w", "q"): 22,
        ("z", "w", "r"): 23,
        ("z", "w", "r", "s"): 23,
    }


@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_lines_are_counted_however_they_end(end: str) -> None:
    found = toml_lines.find(end.join(["", "a = 1", "b = 2", "[c]", "d = 3"]))

    assert found == {("a",): 2, ("b",): 3, ("c",): 4, ("c", "d"): 5}


text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
marks = st.text("\"'[]{}#=,.\\ ", max_size=6)
scalars = st.integers(-9, 9) | st.booleans() | text | marks
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)
)


def quoted(word: str) -> str:
    return json.dumps(word, ensure_ascii=False).replace("\x7f", "\\u007f")


def written(value: Any) -> str:
    """A value in TOML, all lists over several lines."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(k)} = {written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[ # ]\n" + "".join(f"  {written(each)}, # }}\n" for each in value) + "]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)


@settings(max_examples=rounds(12, 500), deadline=None)
@given(st.dictionaries(text | marks, values, max_size=5), st.dictionaries(text, values, max_size=4))
def test_whatever_tomllib_reads_has_a_line_with_it(
    top: dict[str, Any], table: dict[str, Any]
) -> None:
    pairs = [f"{quoted(key)} = {written(value)}" for key, value in top.items()]
    below = [f"{quoted(key)}={written(value)}" for key, value in table.items()]
    source = "\n# top\n".join(["", *pairs, '["the table"] # x', *below])
    read = tomllib.loads(source)
    lines = source.split("\n")

    found = toml_lines.find(source)

    for key, value in [*read.items(), *read["the table"].items()]:
        path = (key,) if read.get(key) is value else ("the table", key)
        assert quoted(key) in lines[found[path] - 1]
        for index, each in enumerate(value if isinstance(value, list) else ()):
            assert written(each).split("\n")[0] in lines[found[*path, index] - 1]
        for name in value if isinstance(value, dict) and value is not read["the table"] else ():
            assert found[*path, name] == found[path]
