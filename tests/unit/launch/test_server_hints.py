"""A known server's line is made of what was typed, or nothing is made up."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path

from socketprotector.launch import server_hints
from socketprotector.launch.listen_spec import parse
from socketprotector.model import handoff_modes
from socketprotector.model.lazy_dataclass import replace
from socketprotector.model.settings import ListenerSettings, Settings
from tests.together import together

_LISTEN = re.compile(r"(?:[\w.]+[=:])?\d{4}")
_LISTENER = "SocketProtector --handoff listener"


def line(typed: str, mode: handoff_modes.HandoffMode = handoff_modes.CONNECTION) -> str | None:
    words = shlex.split(typed)
    texts = [word for word in words[: words.index("--")] if _LISTEN.fullmatch(word)]
    return server_hints.line(words, [parse(each, "/") for each in texts], mode)


@together(
    ("typed", "made"),
    [
        (
            "127.0.0.1:8000 -- gunicorn myproj.wsgi -w 3",
            "--ready notify 127.0.0.1:8000 -- gunicorn --preload myproj.wsgi -w 3",
        ),
        (
            "--check 8000 -- /srv/bin/gunicorn -b :80 --bind=x --preload -D 'a:app(1)' -bx",
            "--ready notify 8000 -- /srv/bin/gunicorn --preload 'a:app(1)'",
        ),
        (
            "-f --ready after:1s --handoff=connection --env 'A=b c' 8000 -- uvicorn --port 80 app",
            "--settle 5s -f --env 'A=b c' http=8000 -- uvicorn --fd {fd:http} app",
        ),
        (
            "--settle 9s web=8000 -- python3 -m uvicorn --fd 3 app",
            "--settle 9s web=8000 -- python3 -m uvicorn --fd {fd:web} app",
        ),
        (
            "8000 -- env A=1 hypercorn -w 4 app",
            "--settle 5s --workers 4 http=8000 -- env A=1 hypercorn --bind fd://{fd:http} "
            "--workers 0 app",
        ),
        (
            "--workers 2 8000 -- hypercorn --workers=4 app",
            "--settle 5s --workers 2 http=8000 -- hypercorn --bind fd://{fd:http} --workers 0 app",
        ),
        ("8000 9000 -- gunicorn app", "--ready notify 8000 9000 -- gunicorn --preload app"),
    ],
)
def test_the_line_has_what_was_typed_and_what_the_server_wants(typed: str, made: str) -> None:
    assert line(typed) == f"{_LISTENER} {made}"


@together(
    "typed",
    [
        "8000 -- ./daemon",
        "8000 -- nginx -c own.conf",
        "8000 9000 -- uvicorn app",
        "--retire-after 100 8000 -- gunicorn app",
        "--retire-after=100 8000 -- gunicorn app",
    ],
)
def test_where_it_is_not_certain_there_is_none(typed: str) -> None:
    assert line(typed) is None


def test_a_value_that_looks_like_the_address_makes_it_uncertain() -> None:
    words = shlex.split("--name 8000 8000 -- gunicorn app")

    assert server_hints.line(words, [parse("8000", "/")], handoff_modes.CONNECTION) is None


@together(
    ("typed", "kept"),
    [
        (
            "-f --env TOKEN=a 8000 -- uvicorn --header 'Key: b' app",
            "--settle 5s -f --env TOKEN=... http=8000 -- uvicorn --fd {fd:http} ...",
        ),
        (
            "--env=TOKEN=a web=8000 -- env PASS=b uvicorn",
            "--settle 5s --env=TOKEN=... web=8000 -- env PASS=... uvicorn --fd {fd:web}",
        ),
        (
            "--health 'check:curl -u a:b' --settle-check=check:x 8000 -- gunicorn app",
            "--ready notify --health check:... --settle-check=check:... 8000 -- gunicorn --preload "
            "...",
        ),
    ],
)
def test_the_line_that_is_kept_has_nothing_that_may_be_a_secret(typed: str, kept: str) -> None:
    words = shlex.split(typed)
    texts = [word for word in words[: words.index("--")] if _LISTEN.fullmatch(word)]
    listens = [parse(each, "/") for each in texts]

    made = server_hints.line(words, listens, handoff_modes.CONNECTION, whole=False)

    assert made == f"{_LISTENER} {kept}"


def test_one_that_was_handed_the_listener_keeps_its_readiness() -> None:
    typed = "--handoff listener --ready after:3s 8000 -- uvicorn --fd 3 app"

    assert line(typed, handoff_modes.LISTENER) == (
        f"{_LISTENER} --settle 5s --ready after:3s http=8000 -- uvicorn --fd {{fd:http}} app"
    )


@together("foreign", [False, True])
def test_nginx_finds_a_unix_socket_that_was_passed_in(foreign: bool, tmp_path: Path) -> None:
    listens = [parse(each, "/") for each in ("unix:/x", "8000")]
    settings = Settings("x", ("nginx",), str(tmp_path), handoff="listener")
    settings = replace(
        settings,
        drain_signal=signal.SIGQUIT,
        environment=(("NGINX", "3;4;"),),
        listeners=(
            ListenerSettings("unix:/x", foreign=foreign, text="unix:/x"),
            ListenerSettings("tcp:0.0.0.0:8000", text="8000"),
        ),
    )

    assert bool([*server_hints.of(settings, listens, typed=False)]) is not foreign


@together(
    ("command", "variable"),
    [
        ("gunicorn --preload --pid g.pid app", ""),
        ("python3 -m gunicorn --preload -pg.pid app", ""),
        ("env A=1 gunicorn --preload app", "--pid=g.pid"),
    ],
)
def test_gunicorns_pid_file_is_found_in_its_command_and_its_variable(
    command: str, variable: str, tmp_path: Path
) -> None:
    settings = Settings("x", tuple(command.split()), str(tmp_path), handoff="listener")
    settings = replace(settings, environment=(("GUNICORN_CMD_ARGS", variable),))

    [found] = server_hints.of(settings, [parse("8000", "/")], typed=False)

    assert found == "gunicorn's pidfile (--pid) lets each reload fail; leave it out"


@together("named", ["", "-c own.py "])
def test_what_a_configuration_file_sets_is_no_matter_for_a_warning(
    named: str, tmp_path: Path
) -> None:
    command = tuple(f"gunicorn {named}app:app".split())
    settings = Settings("x", command, str(tmp_path), handoff="listener")
    file = tmp_path / ("own.py" if named else "gunicorn.conf.py")

    file.write_text("workers = 2")
    assert [*server_hints.drain_limits(settings)]
    file.write_text("preload_app = True\ngraceful_timeout = 3600")
    listens = [parse("8000", "/")]
    found = [*server_hints.of(settings, listens, typed=False)]
    assert [*found, *server_hints.drain_limits(settings)] == []
    file.unlink()


def test_a_file_that_opens_but_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    settings = Settings("x", ("gunicorn", "app:app", "/proc/self/mem"), str(tmp_path))

    assert len([*server_hints.of(settings, [parse("8000", "/")], typed=False)]) == 1
