"""Ways to end that are no drain, and what is called when a drain begins."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest
from socketprotector_client import Connection, aserve, connections, serve
from socketprotector_client.serving import _serve_all
from socketprotector_client.source import ListenSource

from tests.channel import Channel

from .sharing import connect, serving


def test_ctrl_c_ends_a_pool_whose_clients_never_hang_up(channel: Channel) -> None:
    worker = channel.start("interrupted.py")
    client = channel.connect()
    assert client.ask("hello") == "echo hello"

    worker.process.send_signal(signal.SIGINT)

    assert (worker.read_last(), worker.wait()) == ("interrupted", 0)


def test_callbacks_are_called_in_order_and_a_failing_one_is_logged(channel: Channel) -> None:
    worker = channel.start("callbacks.py")

    channel.end_channel()

    assert worker.read_rest() == [
        "in the main thread: False",
        "the one after it",
        "at once",
        "ended",
    ]
    assert worker.wait() == 0
    assert "RuntimeError: a callback failed" in channel.log.read_text()


def test_callbacks_come_while_every_thread_is_busy(channel: Channel) -> None:
    worker = channel.start("callbacks.py")
    client = channel.connect()
    assert client.ask("hello") == "echo hello"

    worker.retire()

    assert worker.read_line() == "in the main thread: False"
    client.close()
    assert worker.wait() == 0


def test_cancelling_aserve_cancels_its_handlers_and_closes_everything(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    ended: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        try:
            await reader.read()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def main() -> None:
        service = asyncio.create_task(aserve(handle, f"unix:{path}"))
        await asyncio.sleep(0)
        reader, writer = await asyncio.open_unix_connection(path)
        assert await reader.readexactly(5) == b"hello"

        service.cancel()
        with pytest.raises(asyncio.CancelledError):
            await service

        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()

    asyncio.run(main())
    assert ended == ["cancelled"]
    assert not Path(path).exists()


def test_leaving_the_iteration_closes_the_listeners(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    found = connections(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        for connection, _ in found:
            connection.close()
            break
        found.close()  # type: ignore[attr-defined]

    assert not path.exists()


def test_a_handler_that_closes_the_descriptor_itself_does_not_end_the_service(
    source: ListenSource, caplog: pytest.LogCaptureFixture
) -> None:
    peers = []

    def handle(connection: Connection, peer: object) -> None:
        peers.append(peer)
        if len(peers) == 2:
            intake.drained()
        os.close(connection.fileno())

    # limit=1: the second client comes only if the first connection does not count as open.
    with serving(source, limit=1) as intake, connect(intake) as one, connect(intake) as other:
        _serve_all(intake, handle)

        assert peers == [one.getsockname(), other.getsockname()]
    assert caplog.text.count("Bad file descriptor") == 2


def test_wrong_arguments_are_refused_before_anything_is_bound(tmp_path: Path) -> None:
    path = tmp_path / "socket"

    with pytest.raises(ValueError, match="limit=0: at least 1"):
        connections(f"unix:{path}", limit=0)
    with pytest.raises(ValueError, match="threads=0: at least 1"):
        serve(lambda connection, peer: None, f"unix:{path}", threads=0)
    with pytest.raises(ValueError, match="expected PORT"):
        connections("nonsense")

    assert not path.exists()
