"""Which servers are known by their command, and what is said of a program that takes no client."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from socketprotector.model import handoff_modes, known_servers, listen_fds
from socketprotector.model.handoff_modes import HandoffMode
from socketprotector.model.records import Program
from tests.together import together

PROGRAM = Program("x", ("./daemon", "80"), "/", (), 0, (), 0)


@together(
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
    assert known_servers.known(shlex.split(command)) == name


@together("name", known_servers.KNOWN)
def test_what_is_to_be_copied_starts_that_server_with_names_that_there_are(name: str) -> None:
    words = shlex.split(known_servers.line(name))
    listens, command = words[: words.index("--")], words[words.index("--") + 1 :]

    assert known_servers.known(command) == name
    asked = {each for each in listen_fds.placeholders(words) if each != "{fd:ready}"}
    given = {word.partition("=")[0] for word in listens if not word.startswith(("-", "NGINX"))}
    assert {each[4:-1] for each in asked} <= given


@together(
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
def test_what_is_known_of_a_program_that_takes_no_client_is_said(
    said: str, listens: str | None, advice: str
) -> None:
    told = known_servers.advice(PROGRAM, said=said, listens=lambda: listens)

    assert advice in told
    assert bool(told) == bool(advice)


@pytest.mark.parametrize("mode", [handoff_modes.STDIO, handoff_modes.LEGACY])
def test_nothing_is_said_of_another_handoff(mode: HandoffMode) -> None:
    program = replace(PROGRAM, argv=("gunicorn", "app"), handoff=mode.name)

    assert known_servers.advice(program, said="address already in use", listens=lambda: "x:1") == ""


@pytest.mark.parametrize("argv", [("uvicorn", "app:app"), ("./daemon", "80")])
def test_the_advice_for_one_that_binds_the_socket_it_was_handed_is_to_take_it_over(
    argv: tuple[str, ...],
) -> None:
    program = replace(PROGRAM, argv=argv, handoff="listener")

    told = known_servers.advice(program, said="bind: Address already in use")

    assert "take over the socket that it is handed" in told
    assert "a proxy in front (docs/when-not.md)" in told
    assert ("uvicorn --fd {fd:http}" in told) is (argv[0] == "uvicorn")
    assert known_servers.advice(program, said="no such module") == ""


def lacks(
    command: str,
    *variables: str,
    mode: HandoffMode = handoff_modes.LISTENER,
    settles: bool = False,
    after_s: float | None = None,
) -> str | None:
    return known_servers.lacks(
        shlex.split(command), variables, mode=mode, settles=settles, after_s=after_s
    )


@together(
    ("command", "variables", "said"),
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
def test_the_advice_for_a_known_server_that_would_only_seem_to_serve_is_what_it_lacks(
    command: str, variables: tuple[str, ...], said: str | None
) -> None:
    told = lacks(command, *variables)

    assert (told is not None) is (said is not None)
    assert (said or "") in (told or "")


@pytest.mark.parametrize(
    "command", ["uvicorn --fd 3 app", "gunicorn --preload app", "hypercorn --bind fd://3 app"]
)
def test_one_that_loads_an_application_while_a_timer_says_that_it_is_ready_is_warned_of(
    command: str,
) -> None:
    told = lacks(command, after_s=1.0)

    assert told is not None
    assert "is thought ready after 1s, by a timer" in told
    assert lacks(command, after_s=1.0, settles=True) is None
    assert lacks("haproxy -f haproxy.cfg", after_s=1.0) is None


@together("name", known_servers.KNOWN)
def test_a_known_server_that_is_handed_connections_is_warned_of_at_once(name: str) -> None:
    told = lacks(f"{name} app", mode=handoff_modes.CONNECTION)

    assert told is not None
    assert told.startswith(f"{name} binds its own port, and takes no connection")
    assert lacks(f"{name} app", mode=handoff_modes.STDIO) is None
    assert (
        lacks(f"{name} -c python:socketprotector_client.x app", mode=handoff_modes.CONNECTION)
        is None
    )


def test_one_that_is_rolled_back_when_it_cannot_be_loaded_lacks_nothing() -> None:
    assert lacks("gunicorn app", settles=True) is None
    assert lacks("uvicorn app", settles=True) is not None


@together("name", known_servers.KNOWN)
def test_a_line_to_be_copied_lacks_nothing(name: str) -> None:
    words = shlex.split(known_servers.line(name))
    at = words.index("--")
    after_s = None if "notify" in words else 1.0

    assert (
        known_servers.lacks(
            words[at + 1 :],
            words[:at],
            mode=handoff_modes.LISTENER,
            settles="--settle" in words[:at],
            after_s=after_s,
        )
        is None
    )


@together("name", known_servers.KNOWN)
def test_what_to_add_is_what_the_line_to_be_copied_has(name: str) -> None:
    server, told = known_servers.KNOWN[name], known_servers.to_add(name)

    assert "--handoff listener" in told
    assert server.options in told
    assert server.adds in told


def test_a_known_server_gets_a_line_of_its_own() -> None:
    told = known_servers.advice(replace(PROGRAM, argv=("gunicorn", "app")))

    assert told.startswith("gunicorn binds its own port; start it as in: SocketProtector ")
    assert told.endswith("(--check has your own words; docs/servers.md)")


@pytest.mark.parametrize("advice", ["", "it listens on 127.0.0.1:9090 by itself; ..."])
def test_a_program_that_has_taken_a_client_is_not_told_to_start_otherwise(advice: str) -> None:
    """It may listen elsewhere, too: for its metrics."""
    said = known_servers.hint(PROGRAM, taken_from=True, advice=lambda: advice)

    assert said is not None
    assert "busy" in said
    assert "listen" not in said


def test_a_program_that_never_took_a_client_is_told_what_is_known_or_what_it_may_want() -> None:
    piped = replace(PROGRAM, handoff="stdio")

    assert known_servers.hint(PROGRAM, taken_from=False, advice=lambda: "known") == "known"
    assert known_servers.hint(PROGRAM, taken_from=False, advice=str) == known_servers.WANTS
    assert known_servers.hint(piped, taken_from=False, advice=str) is None
