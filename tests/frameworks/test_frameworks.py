"""Each framework of docs/frameworks.md on a Listener, under the real command and alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import needs
from tests.frameworks.asking import GUNICORN, PATH, PROGRAMS, port_of
from tests.rounds import rounds
from tests.running import Protector
from tests.web import Connection, Traffic, ask_once

RELOADS = rounds(1, 5)


@dataclass(frozen=True)
class Framework:
    """How one is started, and what it does with idle connections when the worker drains."""

    name: str
    #: What is imported; skipped, in words, where it is not installed.
    needs: str
    #: Behind the interpreter; ADDRESS stands for where to listen.
    arguments: tuple[str, ...]
    #: An idle keep-alive connection is closed at the drain, or else the next answer on it
    #: is the last one.
    closes_idle: bool = True

    def command(self, address: str) -> list[str]:
        return [sys.executable, *(address if a == "ADDRESS" else a for a in self.arguments)]


def program(name: str, needs: str, *, closes_idle: bool = True) -> Framework:
    arguments = (str(PROGRAMS / f"{name}.py"), "ADDRESS")
    return Framework(name, needs, arguments, closes_idle)


FRAMEWORKS = [
    program("asyncio_streams", "asyncio", closes_idle=False),
    program("uvicorn_app", "uvicorn"),
    program("aiohttp_app", "aiohttp"),
    program("hypercorn_app", "hypercorn"),
    program("tornado_app", "tornado", closes_idle=False),
    program("waitress_app", "waitress"),
    Framework("gunicorn_sync", "gunicorn", (*GUNICORN, "-k", "sync")),
    Framework("gunicorn_gthread", "gunicorn", (*GUNICORN, "-k", "gthread", "--threads", "8")),
    program("gevent_app", "gevent"),
    program("gevent_patched", "gevent"),
    program("gevent_stream", "gevent", closes_idle=False),
    program("trio_streams", "trio", closes_idle=False),
    program("trio_listeners", "trio", closes_idle=False),
    Framework(
        "anyio_asyncio", "anyio", (str(PROGRAMS / "anyio_streams.py"), "ADDRESS", "asyncio"), False
    ),
    Framework("anyio_trio", "trio", (str(PROGRAMS / "anyio_streams.py"), "ADDRESS", "trio"), False),
    program("http_server", "http", closes_idle=False),
]

each_framework = pytest.mark.parametrize(
    "framework",
    [
        pytest.param(
            each,
            id=each.name,
            marks=needs.unless(find_spec(each.needs) is not None, each.needs),
        )
        for each in FRAMEWORKS
    ],
)


@pytest.fixture
def serve(protector: Callable[..., Protector]) -> Callable[[Framework], Protector]:
    def start(framework: Framework) -> Protector:
        # Where it would listen without a protector is of no account.
        command = framework.command("127.0.0.1:1")
        return protector("127.0.0.1:0", "--", *command, **PATH).ready()

    return start


@pytest.mark.costly
@each_framework
def test_no_connection_fails_while_it_is_reloaded_under_load(
    serve: Callable[[Framework], Protector], framework: Framework
) -> None:
    daemon = serve(framework)

    with Traffic(("127.0.0.1", daemon.port)) as traffic:
        traffic.wait_for_answers(30)
        for _ in range(RELOADS):
            daemon.reload()
            traffic.wait_for_answers(30)

    daemon.stop()
    assert not traffic.seen.failures
    assert len(traffic.seen.answers) == 1 + RELOADS


@each_framework
def test_a_draining_worker_answers_what_it_was_asked_and_lets_idle_clients_go(
    serve: Callable[[Framework], Protector], framework: Framework, tmp_path: Path
) -> None:
    daemon = serve(framework)
    address = "127.0.0.1", daemon.port
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    with Connection(address) as idle, Connection(address) as asking:
        old = idle.ask()
        asking.send(str(gate))
        with gate.open("wb"):  # waits until the worker is at the gate
            daemon.reload()
            assert ask_once(address) != old
            if framework.closes_idle:
                assert idle.at_end()
            else:
                assert (idle.ask(), idle.closing) == (old, True)
                assert idle.at_end()
        assert asking.answer() == old
        if not framework.closes_idle:
            asking.close()
        line = daemon.log.wait_for(r"event=exited generation=1\b")
        assert "lost=" not in line
    daemon.stop()


@each_framework
@pytest.mark.costly
def test_without_a_protector_the_same_program_listens_by_itself(
    framework: Framework, marked_environment: dict[str, str]
) -> None:
    process = subprocess.Popen(
        framework.command("127.0.0.1:0"),
        env={**os.environ, **marked_environment, **PATH},
        start_new_session=True,
    )
    try:
        pid = ask_once(("127.0.0.1", port_of(process.pid)))

        assert os.getpgid(pid) == process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
