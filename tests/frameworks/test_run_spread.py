"""uvicorn under --drain-spread, by socketprotector-run or on a Listener: how connections end."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import needs
from tests.frameworks.asking import PATH
from tests.running import DEADLINE_S, Protector

RUN = (sys.executable, "-m", "socketprotector_client.run", "tests.frameworks.programs.sockets:app")
LISTENER = ("--handoff", "listener", "--ready", "notify")
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
#: A close frame with code 1012.
RESTART = b"\x88\x02\x03\xf4"

pytestmark = needs.unless(None not in map(find_spec, ("uvicorn", "wsproto")), "uvicorn, wsproto")


def asked(port: int, request: bytes, until: bytes) -> tuple[socket.socket, bytes]:
    """Send a request; return the connection and what came, once this has come."""
    client = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
    client.sendall(request)
    found = b""
    while until not in found:
        data = client.recv(65536)
        assert data, found
        found += data
    return client, found


def rest(client: socket.socket) -> bytes:
    found = b""
    while data := client.recv(65536):
        found += data
    return found


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.mark.costly
@pytest.mark.parametrize("mode", [(), LISTENER], ids=["connection", "listener"])
def test_each_connection_ends_as_its_protocol_wants(
    protector: Callable[..., Protector], mode: tuple[str, ...], tmp_path: Path
) -> None:
    words = (*mode, "--drain-spread", "1s", "127.0.0.1:0", "--", *RUN)
    daemon = protector(*words, **PATH).ready()
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    opened = [asked(daemon.port, REQUEST, b"\r\n\r\n") for _ in range(4)]
    assert all(b" 101 " in found for _, found in opened)
    stream, _ = asked(daemon.port, get("/stream"), b"tick")
    slow, _ = asked(daemon.port, get(str(gate)), b"")

    with gate.open("wb"):
        daemon.reload()
        assert [rest(client) for client, _ in opened] == [RESTART] * 4
        rest(stream)
    said = rest(slow)

    assert b"whole" in said
    for each in (*(client for client, _ in opened), stream, slow):
        each.close()
    daemon.log.wait_for(r'event=exited generation=1 .*how="exited with status 0"$')
    assert not daemon.log.count("event=signalled")
    daemon.stop()


@pytest.mark.costly
def test_on_a_plain_listener_uvicorn_ends_each_connection_at_its_turn(
    protector: Callable[..., Protector], tmp_path: Path
) -> None:
    """Without a close frame, and a request that takes longer than the patience has no answer."""
    program = (sys.executable, "-m", "tests.frameworks.programs.uvicorn_sockets")
    words = ("--drain-spread", "1s", "--workers", "1", "127.0.0.1:0", "--", *program)
    daemon = protector(*words, **PATH).ready()
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    opened = [asked(daemon.port, REQUEST, b"\r\n\r\n") for _ in range(4)]
    idle, _ = asked(daemon.port, get("/"), b"\r\n0\r\n\r\n")
    slow, _ = asked(daemon.port, get(str(gate)), b"")

    with gate.open("wb"):
        daemon.reload()
        ended = [*(client for client, _ in opened), idle, slow]
        assert not b"".join(map(rest, ended))
    for each in ended:
        each.close()
    daemon.log.wait_for("event=exited generation=1 ")
    assert not daemon.log.count("event=signalled")
    assert not daemon.log.count("event=no-spread")
    daemon.stop()


@pytest.mark.costly
def test_a_timeout_ends_a_spread(protector: Callable[..., Protector]) -> None:
    """Under --handoff listener, the first TERM may be the begin of the drain."""
    words = (*LISTENER, "--drain-spread", "1h", "--max-draining", "1", "127.0.0.1:0", "--", *RUN)
    daemon = protector(*words, **PATH).ready()
    client, _ = asked(daemon.port, REQUEST, b"\r\n\r\n")

    daemon.reload()
    other, _ = asked(daemon.port, REQUEST, b"\r\n\r\n")
    daemon.reload()

    assert rest(client) == RESTART
    client.close()
    daemon.log.wait_for(r'event=exited generation=1 .*how="exited with status 0"$')
    other.close()
    daemon.stop()
