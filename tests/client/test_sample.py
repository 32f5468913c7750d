"""The sample client and the worker that uses nothing but the protocol."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.client.protector import PYTHON, ROOT, Protector, ports_of

SAMPLE = (PYTHON, "-m", "sample_client")
MINIMAL = ROOT / "tests" / "workers" / "minimal.py"


def test_it_prints_and_echoes_each_line(protector: Protector) -> None:
    worker = protector.start(*SAMPLE, "4321")
    client = protector.connect()

    assert client.ask("hello") == f"[{worker.pid}] hello"
    assert client.ask("world") == f"[{worker.pid}] world"

    assert [worker.read_line(), worker.read_line()] == ["hello", "world"]


def test_quit_closes_the_connection(protector: Protector) -> None:
    protector.start(*SAMPLE, "4321")
    client, other = protector.connect(), protector.connect()

    assert client.ask("quit") == ""
    assert other.ask("hello").endswith("hello")


def test_it_serves_many_at_once_and_finishes_them_at_drain(protector: Protector) -> None:
    worker = protector.start(*SAMPLE, "4321")
    clients = [protector.connect() for _ in range(100)]
    for client in clients:
        assert client.ask("hello") == f"[{worker.pid}] hello"

    protector.end_channel()

    for client in clients:
        assert client.ask("still here") == f"[{worker.pid}] still here"
        client.close()
    assert worker.wait() == 0


def test_a_client_that_resets_is_no_error(protector: Protector) -> None:
    worker = protector.start(*SAMPLE, "4321")
    client = protector.connect()
    client.send("hello")
    assert worker.read_line() == "hello"
    client.close()  # with the answer unread

    protector.end_channel()

    assert worker.wait() == 0
    assert protector.log.read_text() == ""


def test_the_pause_comes_before_it_is_ready(protector: Protector) -> None:
    started = time.monotonic()

    protector.start(*SAMPLE, "4321", "0.3")

    assert time.monotonic() - started >= 0.3


def test_alone_it_serves_its_port(protector: Protector) -> None:
    worker = protector.start(*SAMPLE, "0", alone=True)
    port = ports_of(worker.pid)[0]

    client = protector.client(socket.AF_INET, ("127.0.0.1", port))

    assert client.ask("hello") == f"[{worker.pid}] hello"
    client.close()
    worker.term()
    assert worker.wait() == 0


def test_alone_ctrl_c_ends_it_without_a_word(protector: Protector) -> None:
    worker = protector.start(*SAMPLE, "0", alone=True)

    worker.process.send_signal(signal.SIGINT)

    assert worker.wait() == 0
    assert protector.log.read_text() == ""


@pytest.mark.parametrize(
    "arguments", [(), ("x",), ("1", "x"), ("1", "-1"), ("1", "nan"), ("1", "2", "3"), ("99999",)]
)
def test_wrong_usage_is_one_line_and_status_2(
    protector: Protector, arguments: tuple[str, ...]
) -> None:
    worker = protector.spawn(*SAMPLE, *arguments)

    assert worker.wait() == 2
    assert protector.log.read_text() == "usage: SampleClient PORT [STARTUP-PAUSE]\n"


def test_the_minimal_worker_echoes_and_ends_with_the_channel(protector: Protector) -> None:
    worker = protector.start(PYTHON, MINIMAL)
    assert worker.ready_lines == ["READY=1"]
    client = protector.connect()
    assert client.ask("hello") == "hello"
    client.close()

    queued = protector.connect()
    protector.end_channel()

    assert queued.ask("hello") == "hello"
    queued.close()
    assert worker.wait() == 0


def test_the_minimal_worker_is_shorter_than_20_lines_and_uses_no_library() -> None:
    text = Path(MINIMAL).read_text()

    assert len(text.splitlines()) < 20
    assert "socketprotector" not in text
