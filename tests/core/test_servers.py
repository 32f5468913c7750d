"""Which servers are known by their command, and what is said of a program that takes nobody."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from socketprotector import handoff, servers
from socketprotector.records import Program

PROGRAM = Program("x", ("./daemon", "80"), "/", (), 0, (), 0)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("gunicorn app", "gunicorn"),
        ("/srv/venv/bin/uvicorn app:app", "uvicorn"),
        ("python -m uvicorn app:app", "uvicorn"),
        ("/usr/bin/python3.11 -m gunicorn app", "gunicorn"),
        ("env A=1 nginx -g 'daemon off;'", "nginx"),
        ("/usr/bin/env B=2 C= node http.js", "node"),
        ("./daemon gunicorn", None),
        ("python gunicorn", None),
        ("python3 -m", None),
        ("gunicorn -c python:socketprotector_client.gunicorn app", None),
        ("A=1", None),
        ("", None),
    ],
)
def test_a_server_is_known_by_the_name_of_its_command(command: str, name: str | None) -> None:
    assert servers.known(shlex.split(command)) == name


@pytest.mark.parametrize("name", servers.KNOWN)
def test_what_is_to_be_copied_starts_that_server_with_names_that_there_are(name: str) -> None:
    words = shlex.split(servers.line(name))
    listens, command = words[: words.index("--")], words[words.index("--") + 1 :]

    assert servers.known(command) == name
    asked = {each for each in handoff.placeholders(words) if each != "{fd:ready}"}
    given = {word.partition("=")[0] for word in listens if not word.startswith(("-", "NGINX"))}
    assert {each[4:-1] for each in asked} <= given


@pytest.mark.parametrize(
    ("said", "listens", "advice"),
    [
        ("", None, ""),
        ("bind(): Address already in use", None, "it binds an address by itself, which is taken"),
        ("error while attempting to bind: [Errno 98] error", None, "which is taken; a program"),
        ("Error: listen EADDRINUSE: address already in use :::80", None, "--handoff listener"),
        ("errno 981", None, ""),
        ("", "127.0.0.1:8000", "it listens on 127.0.0.1:8000 by itself; a program that binds"),
    ],
)
def test_what_is_known_of_a_program_that_takes_nobody_is_said(
    said: str, listens: str | None, advice: str
) -> None:
    told = servers.advice(PROGRAM, said=said, listens=lambda: listens)

    assert advice in told
    assert bool(told) == bool(advice)


@pytest.mark.parametrize("mode", sorted({*handoff.MODES} - {handoff.CONNECTION}))
def test_nothing_is_said_of_another_handoff(mode: str) -> None:
    program = replace(PROGRAM, argv=("gunicorn", "app"), handoff=mode)

    assert servers.advice(program, said="address already in use", listens=lambda: "x:1") == ""


def test_a_known_server_gets_a_line_of_its_own() -> None:
    told = servers.advice(replace(PROGRAM, argv=("gunicorn", "app")))

    assert told.startswith("gunicorn binds its own port; start it as in: SocketProtector ")
    assert told.endswith("(docs/servers.md)")


@pytest.mark.parametrize("advice", ["", "it listens on 127.0.0.1:9090 by itself; ..."])
def test_a_program_that_has_taken_somebody_is_not_told_to_start_otherwise(advice: str) -> None:
    """It may listen elsewhere, too: for its metrics."""
    said = servers.hint(PROGRAM, taken_from=True, advice=lambda: advice)

    assert said is not None
    assert "busy" in said
    assert "listen" not in said


def test_a_program_that_never_took_anybody_is_told_what_is_known_or_what_it_may_want() -> None:
    piped = replace(PROGRAM, handoff=handoff.STDIO)

    assert servers.hint(PROGRAM, taken_from=False, advice=lambda: "known") == "known"
    assert servers.hint(PROGRAM, taken_from=False, advice=str) == servers.WANTS
    assert servers.hint(piped, taken_from=False, advice=str) is None
