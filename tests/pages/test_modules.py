"""`make map`: each module says in one line what it is for."""

from __future__ import annotations

from tests.pages.tooling import tool


def test_each_module_says_what_it_is_for() -> None:
    described = tool("modules").described()
    assert {path.parts[0] for path in described} == {"socketprotector", "client_lib", "exporter"}
    assert [str(path) for path, sentence in described.items() if not sentence] == []
