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


@pytest.mark.parametrize("mode", [handoff.STDIO, handoff.LEGACY])
def test_nothing_is_said_of_another_handoff(mode: str) -> None:
    program = replace(PROGRAM, argv=("gunicorn", "app"), handoff=mode)

    assert servers.advice(program, said="address already in use", listens=lambda: "x:1") == ""


@pytest.mark.parametrize("argv", [("uvicorn", "app:app"), ("./daemon", "80")])
def test_one_that_was_handed_the_socket_and_binds_it_is_told_to_take_it_over(
    argv: tuple[str, ...],
) -> None:
    program = replace(PROGRAM, argv=argv, handoff=handoff.LISTENER)

    told = servers.advice(program, said="bind: Address already in use")

    assert "take over the socket that it is handed" in told
    assert "a proxy in front (docs/when-not.md)" in told
    assert ("uvicorn --fd {fd:http}" in told) is (argv[0] == "uvicorn")
    assert servers.advice(program, said="no such module") == ""


@pytest.mark.parametrize(
    ("command", "variables", "lacks"),
    [
        ("uvicorn app:app", (), "nothing tells uvicorn of the socket"),
        ("uvicorn --port 80 app:app", (), "nothing tells uvicorn of the socket"),
        ("python -m uvicorn app:app", (), "nothing tells uvicorn of the socket"),
        ("uvicorn --fd 3 app:app", (), None),
        ("uvicorn --fd={fd:http} app:app", (), None),
        ("uvicorn app:app", ("UVICORN_FD=3",), None),
        ("hypercorn --bind 127.0.0.1:80 app", (), "nothing tells hypercorn"),
        ("hypercorn --bind=fd://3 app", (), None),
        ("hypercorn -c hypercorn.toml app", (), None),
        ("nginx -c own.conf", ("PATH=/bin",), "nothing tells nginx"),
        ("nginx -c own.conf", ("NGINX={fd:http};",), None),
        ("env 'NGINX=3;' nginx", (), None),
        ("gunicorn app:app", (), "ready before it has loaded the application"),
        ("gunicorn --preload app:app", (), None),
        ("gunicorn -c gunicorn.conf.py app:app", (), None),
        ("gunicorn --chdir /srv app:app", (), "ready before it has loaded the application"),
        ("haproxy -db -f haproxy.cfg", (), None),
        ("./daemon", (), None),
    ],
)
def test_a_known_server_that_would_only_seem_to_serve_is_told_what_it_lacks(
    command: str, variables: tuple[str, ...], lacks: str | None
) -> None:
    told = servers.doubt(shlex.split(command), variables, settles=False)

    assert (told is not None) is (lacks is not None)
    if told is not None and lacks is not None:
        assert lacks in told
        assert "start it as in: SocketProtector --handoff listener " in told


def test_one_that_is_rolled_back_when_it_cannot_be_loaded_lacks_nothing() -> None:
    assert servers.doubt(("gunicorn", "app"), (), settles=True) is None
    assert servers.doubt(("uvicorn", "app"), (), settles=True) is not None


@pytest.mark.parametrize("name", servers.KNOWN)
def test_a_line_to_be_copied_lacks_nothing(name: str) -> None:
    words = shlex.split(servers.line(name))
    at = words.index("--")
    settles = "--settle" in words[:at]

    assert servers.doubt(words[at + 1 :], words[:at], settles=settles) is None


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
