"""The sample client and the worker that uses nothing but the protocol."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.channel import LIBRARY, PYTHON, Channel
from tests.procfs import ports_of
from tests.running import ROOT

SAMPLE = (PYTHON, "-m", "sample_client")
MINIMAL = ROOT / "tests" / "workers" / "minimal.py"


def test_it_prints_and_echoes_each_line(channel: Channel) -> None:
    worker = channel.start(*SAMPLE, "4321")
    client = channel.connect()

    assert client.ask("hello") == f"[{worker.pid}] hello"
    assert client.ask("world") == f"[{worker.pid}] world"

    assert [worker.read_line(), worker.read_line()] == ["hello", "world"]


def test_quit_closes_the_connection(channel: Channel) -> None:
    channel.start(*SAMPLE, "4321")
    client, other = channel.connect(), channel.connect()

    assert client.ask("quit") == ""
    assert other.ask("hello").endswith("hello")


def test_it_serves_many_at_once_and_finishes_them_at_drain(channel: Channel) -> None:
    worker = channel.start(*SAMPLE, "4321")
    clients = [channel.connect() for _ in range(100)]
    for client in clients:
        assert client.ask("hello") == f"[{worker.pid}] hello"

    channel.end_channel()

    for client in clients:
        assert client.ask("still here") == f"[{worker.pid}] still here"
        client.close()
    assert worker.wait() == 0


def test_a_client_that_resets_is_no_error(channel: Channel) -> None:
    worker = channel.start(*SAMPLE, "4321")
    client = channel.connect()
    client.say("hello")
    assert worker.read_line() == "hello"
    client.close()  # with the answer unread

    channel.end_channel()

    assert worker.wait() == 0
    assert channel.log.read_text() == ""


def test_the_pause_comes_before_it_is_ready(channel: Channel) -> None:
    started = time.monotonic()

    channel.start(*SAMPLE, "4321", "0.3")

    assert time.monotonic() - started >= 0.3


def test_alone_it_serves_its_port(channel: Channel) -> None:
    worker = channel.start(*SAMPLE, "0", alone=True)
    port = ports_of(worker.pid)[0]

    client = channel.client(("127.0.0.1", port))

    assert client.ask("hello") == f"[{worker.pid}] hello"
    client.close()
    worker.term()
    assert worker.wait() == 0


def test_alone_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [*SAMPLE, port],
            cwd=ROOT,
            env={**os.environ, **LIBRARY},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    line = f"SampleClient: cannot listen on tcp:0.0.0.0:{port}: Address already in use\n"
    assert (ended.returncode, ended.stderr) == (1, line)


def test_alone_ctrl_c_ends_it_without_a_word(channel: Channel) -> None:
    worker = channel.start(*SAMPLE, "0", alone=True)

    worker.process.send_signal(signal.SIGINT)

    assert worker.wait() == 0
    assert channel.log.read_text() == ""


@pytest.mark.parametrize(
    "arguments", [(), ("x",), ("1", "x"), ("1", "-1"), ("1", "nan"), ("1", "2", "3"), ("99999",)]
)
def test_wrong_usage_is_one_line_and_status_2(channel: Channel, arguments: tuple[str, ...]) -> None:
    worker = channel.spawn(*SAMPLE, *arguments)

    assert worker.wait() == 2
    assert channel.log.read_text() == "usage: SampleClient PORT [STARTUP-PAUSE]\n"


def test_the_minimal_worker_echoes_and_ends_with_the_channel(channel: Channel) -> None:
    worker = channel.start(PYTHON, MINIMAL)
    assert worker.ready_lines == ["READY=1"]
    client = channel.connect()
    assert client.ask("hello") == "hello"
    client.close()

    queued = channel.connect()
    channel.end_channel()

    assert queued.ask("hello") == "hello"
    queued.close()
    assert worker.wait() == 0


def test_the_minimal_worker_is_shorter_than_20_lines_and_uses_no_library() -> None:
    text = Path(MINIMAL).read_text()

    assert len(text.splitlines()) < 20
    assert "socketprotector" not in text
