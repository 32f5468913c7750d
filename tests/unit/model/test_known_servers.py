"""Which servers are known by their command, and what is said of a program that takes no client."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

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
        ("", "", ""),
        ("", None, "a program that binds its own port, or accepts on descriptor 3, needs"),
        ("bind(): Address already in use", None, "it binds its own address, which is in use"),
        ("error while attempting to bind: [Errno 98] error", None, "which is in use; a program"),
        ("Error: listen EADDRINUSE: address already in use :::80", None, "--handoff listener"),
        ("errno 981", "", ""),
        ("accept unixpacket @: accept4: invalid argument", None, "accepts on descriptor 3, needs"),
        ("Custom { kind: Other }: Invalid argument (os error 22)", None, "--handoff listener"),
        ("Error: listen EINVAL: invalid argument", None, "accepts on descriptor 3, needs"),
        ("ValueError: invalid literal", "", ""),
        (
            "cannot connect: Connection refused",
            "",
            "C++ SocketProtector, it needs --handoff legacy",
        ),
        (
            "",
            "127.0.0.1:8000",
            "it listens on its own socket at 127.0.0.1:8000; a program that binds",
        ),
    ],
)
def test_what_is_known_of_a_program_that_takes_no_client_is_said(
    said: str, listens: str | None, advice: str
) -> None:
    found = None if listens == "" else lambda: listens  # "": the program has exited
    advised = known_servers.advice(PROGRAM, said=said, listens=found)

    assert advice in advised
    assert bool(advised) == bool(advice)


@pytest.mark.parametrize(
    "said",
    [
        "ConnectionRefusedError: [Errno 111] Connection refused",
        "redis: Error 111 connecting to localhost:6379. Connection refused.",
        'connection to server at "db" (10.0.0.7), port 5432 failed: Connection refused\n\tIs it?',
        'server on socket "/run/postgresql/.s.PGSQL.5432" failed: Connection refused',
        "Error: connect ECONNREFUSED 127.0.0.1:5432",
        "dial tcp 127.0.0.1:5432: connect: connection refused",
        "Error: Io(Connection refused (os error 111))",
        "Caused by: java.net.ConnectException: Connection refused",
        "PDOException: SQLSTATE[HY000] [2002] Connection refused",
    ],
)
def test_a_program_whose_database_is_down_gets_no_advice_about_its_socket(said: str) -> None:
    assert known_servers.advice(PROGRAM, said=said) == ""


def test_of_a_program_whose_output_is_not_seen_both_modes_are_named() -> None:
    advised = known_servers.advice(PROGRAM, unseen=True)

    assert "--handoff listener" in advised
    assert "--handoff legacy" in advised


def test_at_a_reload_only_an_address_in_use_is_a_cause() -> None:
    def advised(said: str) -> str:
        return known_servers.advice(PROGRAM, said=said, unseen=True, proved_ready=True)

    assert "which is in use; a program" in advised("bind(): Address already in use")
    assert advised("listen EINVAL: invalid argument") == advised("") == ""
    assert advised("database: connection refused") == ""


@pytest.mark.parametrize("mode", [handoff_modes.STDIO, handoff_modes.LEGACY])
def test_nothing_is_said_of_another_handoff(mode: HandoffMode) -> None:
    program = replace(PROGRAM, argv=("gunicorn", "app"), handoff=mode.name)

    assert known_servers.advice(program, said="address already in use", listens=lambda: "x:1") == ""


@pytest.mark.parametrize("argv", [("uvicorn", "app:app"), ("./daemon", "80")])
def test_the_advice_for_one_that_binds_the_socket_it_was_handed_is_to_take_it_over(
    argv: tuple[str, ...],
) -> None:
    program = replace(PROGRAM, argv=argv, handoff="listener")

    advised = known_servers.advice(program, said="bind: Address already in use")

    assert "accept on the inherited socket" in advised
    assert "a proxy in front (docs/comparison.md)" in advised
    assert ("uvicorn --fd {fd:http}" in advised) is (argv[0] == "uvicorn")
    assert known_servers.advice(program, said="no such module") == ""


def lacks(
    command: str,
    *variables: str,
    mode: HandoffMode = handoff_modes.LISTENER,
    settles: bool = False,
    after_s: float | None = None,
    drain_signal: str = "",
    unix: bool = False,
    passed: bool = False,
    files: str = "",
) -> str | None:
    words = shlex.split(command)
    name = known_servers.known(words)
    graceful = known_servers.KNOWN[name].drain_signal if name else ""
    return known_servers.lacks(
        words,
        variables,
        mode=mode,
        settles=settles,
        after_s=after_s,
        drain_signal=drain_signal or graceful or "TERM",
        unix=unix,
        passed=passed,
        files=files,
    )


@together(
    ("command", "variables", "said"),
    [
        ("uvicorn app:app", (), "uvicorn was not given the socket"),
        ("uvicorn --port 80 app:app", (), "uvicorn was not given the socket"),
        ("python -m uvicorn app:app", (), "uvicorn was not given the socket"),
        ("uvicorn --fd 3 app:app", (), None),
        ("uvicorn --fd={fd:http} app:app", (), None),
        ("uvicorn app:app", ("UVICORN_FD=3",), None),
        ("hypercorn --bind 127.0.0.1:80 app", (), "hypercorn was not given the socket"),
        ("hypercorn --bind=fd://3 app", (), None),
        ("hypercorn -c hypercorn.toml app", (), None),
        ("hypercorn --bind fd://3 --workers 2 app", (), "cut off each other's requests"),
        ("hypercorn --bind fd://3 -w12 app", (), "cut off each other's requests"),
        ("hypercorn --bind fd://3 --workers=1 app", (), None),
        ("hypercorn --bind fd://3 -w 0 --backlog 2 app", (), None),
        ("nginx -c own.conf", ("PATH=/bin",), "nginx was not given the socket"),
        ("nginx -c own.conf", ("NGINX={fd:http};",), None),
        ("env 'NGINX=3;' nginx", (), None),
        ("gunicorn app:app", (), "reports READY before it has loaded the application"),
        ("gunicorn --preload app:app", (), None),
        ("gunicorn -c gunicorn.conf.py app:app", (), None),
        ("gunicorn --chdir /srv app:app", (), "reports READY before it has loaded the application"),
        ("haproxy -db -f haproxy.cfg", (), None),
        ("./daemon", (), None),
    ],
)
def test_the_advice_for_a_known_server_that_would_only_seem_to_serve_is_what_it_lacks(
    command: str, variables: tuple[str, ...], said: str | None
) -> None:
    advised = lacks(command, *variables)

    assert (advised is not None) is (said is not None)
    assert (said or "") in (advised or "")


@together(
    ("command", "unix", "dies"),
    [
        ("starman --preload-app app.psgi", True, True),
        ("starman --preload-app app.psgi", False, False),
        ("plackup -s Starman app.psgi", True, True),
        ("plackup --server=Starman app.psgi", True, True),
        ("plackup -s Starlet --starman app.psgi", True, False),
        ("gunicorn --preload starman:app", True, False),
        ("env SERVER_STARTER_PORT= starman --preload-app app.psgi", True, False),
    ],
)
def test_starman_is_warned_of_on_a_unix_socket(command: str, unix: bool, dies: bool) -> None:
    advised = lacks(command, unix=unix) or ""

    assert ("dies of its first client" in advised) is dies


def test_nginx_finds_no_unix_socket_by_its_path() -> None:
    assert "finds a UNIX socket only by" in (lacks("nginx", "NGINX={fd:http};", unix=True) or "")
    assert lacks("nginx", "NGINX={fd:http};", unix=False) is None
    assert lacks("nginx", "NGINX={fd:http};", unix=True, passed=True) is None


@pytest.mark.parametrize("unix", [False, True])
def test_puma_finds_no_unix_socket_by_its_path(unix: bool) -> None:
    """It compares its -b with the name of a generation's socket, which is not the path."""
    said = "puma was not given the socket" if unix else None
    assert lacks("puma config.ru", unix=unix) == lacks("puma -b unix:///x", unix=unix) == said

    as_advised = " ".join(["puma", known_servers.KNOWN["puma"].adds, "config.ru"])
    assert lacks(as_advised, unix=unix) is None
    assert lacks("puma -b unix:///x", unix=unix, passed=True) is None
    assert lacks("puma", unix=unix, files="bind_to_activated_sockets 'only'") is None


def test_starman_that_gets_a_unix_socket_by_another_variable_is_not_warned_of() -> None:
    variables = ("SERVER_STARTER_PORT=", "BOUND_SOCKETS={fd:http}|*|/dev/fd/{fd:http}|UNIX|*")

    assert lacks("starman --preload-app app.psgi", *variables, unix=True) is None


@together(
    ("command", "given", "said"),
    [
        ("starman --preload-app app.psgi", "TERM", "TERM closes open connections of starman"),
        ("starman --preload-app app.psgi", "QUIT", None),
        ("uwsgi --master --module app", "TERM", "HUP does not"),
        ("haproxy -db -f x.cfg", "TERM", "USR1 does not"),
        ("env NGINX=3; nginx", "TERM", "QUIT does not"),
        ("plackup -s Starlet app.psgi", "TERM", None),
        ("gunicorn --preload app", "TERM", None),
        ("node http.js", "QUIT", None),
    ],
)
def test_a_drain_signal_that_cuts_connections_off_is_warned_of(
    command: str, given: str, said: str | None
) -> None:
    found = lacks(command, drain_signal=given)

    assert (found is not None) is (said is not None)
    assert (said or "") in (found or "")


def limit(command: str, drain_limit_s: float = 0.0, **variables: str) -> str | None:
    return known_servers.drain_limit(shlex.split(command), variables, drain_limit_s=drain_limit_s)


@together(
    ("command", "said"),
    [
        ("gunicorn app", "still open 30s after a reload (--graceful-timeout)"),
        ("hypercorn --bind fd://3 app", "hypercorn cuts connections still open 3s after a reload"),
        ("uwsgi --master", "still open 1m after a reload (--worker-reload-mercy)"),
        ("chaussette --fd 3 app", "chaussette cuts connections still open at a reload"),
        ("gunicorn -c own.py app", "(--graceful-timeout or its file)"),
        ("puma -w 2", "still open 30s after a reload (worker_shutdown_timeout)"),
        ("puma --workers=1", "30s after"),
        ("uwsgi app.ini", "(--worker-reload-mercy or its file)"),
    ],
)
def test_a_limit_of_the_server_is_named_beside_ours(command: str, said: str) -> None:
    found = limit(command)

    assert found is not None
    assert said in found
    assert "--drain-timeout" not in found
    assert ", before --drain-timeout (1h)" in (limit(command, 3600.0) or "")


def test_the_warning_of_a_servers_limit_says_what_to_do() -> None:
    begin = "gunicorn cuts connections still open 30s after a reload (--graceful-timeout)"

    assert limit("gunicorn app") == f"{begin}; raise it if you serve streams"
    ours = f"{begin}, before --drain-timeout (1h)"
    assert limit("gunicorn app", 3600.0) == f"{ours}; raise --graceful-timeout if you serve streams"
    assert limit("chaussette app") == "chaussette cuts connections still open at a reload"


@together(
    "command",
    [
        "uvicorn --fd 3 app",
        "node http.js",
        "nginx",
        "haproxy -db",
        "starman app.psgi",
        "plackup -s Starlet app.psgi",
        "puma",
        "puma -w 0 -b tcp://127.0.0.1:80",
        "./daemon",
        "gunicorn --graceful-timeout 3600 app",
        "gunicorn --graceful-timeout=5 app",
    ],
)
def test_a_server_without_a_limit_and_one_that_was_chosen_are_not_named(command: str) -> None:
    assert limit(command) is None


@together(
    ("command", "files"),
    [
        ("gunicorn app", "graceful_timeout = 3600"),
        ("hypercorn -c h.toml --bind fd://3 app", "graceful_timeout = 60"),
        ("uwsgi --ini u.ini", "worker-reload-mercy = 600"),
        ("puma -w 2", "worker_shutdown_timeout 300"),
    ],
)
def test_a_limit_that_a_file_sets_was_chosen(command: str, files: str) -> None:
    def found(files: str) -> str | None:
        return known_servers.drain_limit(command.split(), {}, drain_limit_s=90.0, files=files)

    assert found(files) is None
    assert found("bind = 'fd://3'") is not None


def test_a_limit_of_ours_that_comes_first_leaves_nothing_to_say() -> None:
    assert limit("gunicorn app", 30.0) is None
    assert limit("chaussette app", 1.0) is not None


def test_a_chosen_limit_is_named_where_ours_was_chosen_too_and_is_longer() -> None:
    assert "5s after a reload" in (limit("gunicorn --graceful-timeout 5 app", 60.0) or "")
    assert "7s after" in (limit("uvicorn --timeout-graceful-shutdown 7 app", 60.0) or "")
    assert limit("uvicorn --timeout-graceful-shutdown 70 app", 60.0) is None
    assert limit("gunicorn app", GUNICORN_CMD_ARGS="--graceful-timeout 90") is None
    assert "30s after" in (limit("puma", WEB_CONCURRENCY="2") or "")
    assert "8s after" in (limit("uvicorn app", 60.0, UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN="8") or "")


@pytest.mark.parametrize(
    "command", ["uvicorn --fd 3 app", "gunicorn --preload app", "hypercorn --bind fd://3 app"]
)
def test_one_that_loads_an_application_while_a_timer_says_that_it_is_ready_is_warned_of(
    command: str,
) -> None:
    advised = lacks(command, after_s=1.0)

    assert advised is not None
    assert "counts as ready after 1s" in advised
    assert lacks(command, after_s=1.0, settles=True) is None
    assert lacks("haproxy -f haproxy.cfg", after_s=1.0) is None


@together("name", known_servers.KNOWN)
def test_a_known_server_that_is_handed_connections_is_warned_of_at_once(name: str) -> None:
    advised = lacks(f"{name} app", mode=handoff_modes.CONNECTION)

    assert advised is not None
    assert advised.startswith(
        f"{name} binds its own port; it takes connections from SocketProtector only"
    )
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

    assert (
        known_servers.lacks(
            words[at + 1 :],
            words[:at],
            mode=handoff_modes.LISTENER,
            settles="--settle" in words[:at],
            after_s=None,
            drain_signal=words[words.index("--drain-signal") + 1]
            if "--drain-signal" in words
            else "TERM",
        )
        is None
    )


@together("name", known_servers.KNOWN)
def test_what_to_add_is_what_the_line_to_be_copied_has(name: str) -> None:
    server, advised = known_servers.KNOWN[name], known_servers.to_add(name)

    assert "--handoff listener" in advised
    assert server.options in advised
    assert server.adds in advised


def test_a_known_server_gets_a_line_of_its_own() -> None:
    advised = known_servers.advice(replace(PROGRAM, argv=("gunicorn", "app")))

    assert advised.startswith("gunicorn binds its own port; start it as in: SocketProtector ")
    assert advised.endswith("(--check shows your command; docs/servers.md)")


def hint(program: Program = PROGRAM, **facts: Any) -> str | None:
    return known_servers.hint(
        program, **{"has_ready": True, "taken_from": True, "advice": str, **facts}
    )


@pytest.mark.parametrize("advice", ["", "it listens on its own socket at 127.0.0.1:9090; ..."])
def test_a_program_that_has_taken_a_client_is_not_told_to_start_otherwise(advice: str) -> None:
    """It may listen elsewhere, too: for its metrics."""
    assert hint(advice=lambda: advice) == (
        "workers are busy or stuck: check `status`; then `scale +1`, or set --watchdog"
    )


def test_only_advice_that_can_be_followed_is_given() -> None:
    """scale is refused under stdio, and --watchdog may be set already."""
    assert hint(replace(PROGRAM, watchdog_s=5.0)) == (
        "workers are busy or stuck: check `status`; then `scale +1`, or `replace` stuck workers"
    )
    assert hint(replace(PROGRAM, handoff="stdio")) == (
        "programs are busy or stuck: check `connections`; then raise `workers` and reload"
    )
    assert hint(has_ready=False) == "no worker is ready: check `status` and `crashes`"


def test_a_program_that_never_took_a_client_is_told_what_is_known_or_what_it_may_want() -> None:
    piped = replace(PROGRAM, handoff="stdio")

    assert hint(taken_from=False, advice=lambda: "known") == "known"
    assert hint(taken_from=False, advice=str) == known_servers.WANTS
    assert hint(piped, taken_from=False, advice=str) is None
