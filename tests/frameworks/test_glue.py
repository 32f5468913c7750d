"""What only one framework does; and those that cannot use a Listener say which mode works."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.channel import Channel
from tests.frameworks.asking import GUNICORN, PATH, PROGRAMS
from tests.running import ROOT, Protector

UVLOOP = """
import asyncio, sys, uvloop
from socketprotector_client import Listener
async def main():
    await asyncio.start_server(lambda reader, writer: None, sock=Listener("127.0.0.1:0"))
uvloop.run(main())
"""

ACCEPTS_ITSELF = """
import asyncio, sys, uvloop
from socketprotector_client import Listener
listener = Listener("127.0.0.1:0")
listener.setblocking(False)
listener.listen()
async def main():
    loop = asyncio.get_running_loop()
    accepting = loop.create_task(loop.sock_accept(listener))
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    connection, _ = await accepting
    connection.close()
    writer.close()
    print(await reader.read())
uvloop.run(main())
"""


CLOSES = """
import gc, os, weakref
from gevent.server import StreamServer
from socketprotector_client.gevent import Listener
def serve():
    listener = Listener("127.0.0.1:0")
    server = StreamServer(listener, print)
    server.start()
    server.stop()
    return weakref.ref(listener)
serve()
before = os.listdir("/proc/self/fd")
found = serve()
gc.collect()
print(found(), len(os.listdir("/proc/self/fd")) - len(before))
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )


def test_uvloop_is_refused_instead_of_serving_no_client() -> None:
    needs.module("uvloop")

    done = python(UVLOOP)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: cannot use a Listener on uvloop, which accepts below Python: use asyncio's "
        "own event loop (uvicorn: --loop asyncio), or no Listener and the protector's "
        "--handoff listener"
    )


def test_a_program_that_accepts_by_itself_may_run_on_uvloop() -> None:
    needs.module("uvloop")

    done = python(ACCEPTS_ITSELF)

    assert (done.stdout, done.returncode) == ("b''\n", 0), done.stderr


@pytest.mark.costly
def test_gunicorns_other_workers_are_refused(protector: Callable[..., Protector]) -> None:
    needs.module("gunicorn")
    needs.module("gevent")
    options = [word for word in GUNICORN if word != "ADDRESS" and word != "-b"]

    daemon = protector("127.0.0.1:0", "--", sys.executable, *options, "-k", "gevent", **PATH)

    daemon.log.wait_for(
        r"cannot use gunicorn's gevent worker with socketprotector_client.gunicorn: only sync and "
        r"gthread accept from a Listener; .* --handoff listener$"
    )
    assert daemon.wait() != 0


@pytest.mark.costly
def test_a_generation_whose_application_cannot_be_loaded_is_never_ready(
    protector: Callable[..., Protector],
) -> None:
    needs.module("gunicorn")
    options = [word for word in GUNICORN[:-1] if word != "ADDRESS" and word != "-b"]

    daemon = protector("127.0.0.1:0", "--", sys.executable, *options, "no_such_module:app", **PATH)

    assert daemon.wait() != 0
    assert daemon.log.count("event=worker-ready") == 0


@pytest.mark.costly
def test_gunicorns_end_leaves_the_protectors_unix_socket_alone(
    protector: Callable[..., Protector], tmp_path: Path
) -> None:
    needs.module("gunicorn")
    path = tmp_path / "socket"
    options = ["127.0.0.1:1" if word == "ADDRESS" else word for word in GUNICORN]
    daemon = protector(f"unix:{path}", "--", sys.executable, *options, **PATH).ready()
    made = path.stat().st_ino

    daemon.reload()
    daemon.log.wait_for("event=exited generation=1")

    assert path.stat().st_ino == made
    daemon.stop()


@pytest.mark.parametrize("program", ["gevent_patched.py", "gevent_stream.py"])
def test_gevent_never_sets_a_flag_on_the_channel_that_all_workers_share(
    program: str, channel: Channel
) -> None:
    needs.module("gevent")
    worker = channel.start(sys.executable, PROGRAMS / program, "127.0.0.1:1")
    client = channel.connect()
    client.say("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r")
    assert client.hear() == "HTTP/1.1 200 OK\r"

    assert not fcntl.fcntl(channel.reader, fcntl.F_GETFL) & os.O_NONBLOCK

    client.close()
    channel.end_channel()
    assert worker.wait() == 0


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_client_that_resets_in_the_queue_ends_no_handler_of_anyio(
    channel: Channel, loop: str
) -> None:
    needs.module("anyio")
    needs.module("trio")
    gone, client = channel.connect(), channel.connect()
    gone.say("GET / HTTP/1.1\r")
    gone.reset()
    client.say("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r")

    worker = channel.start(sys.executable, PROGRAMS / "anyio_streams.py", "127.0.0.1:1", loop)

    assert client.hear() == "HTTP/1.1 200 OK\r"
    client.close()
    channel.end_channel()
    assert worker.wait() == 0


def test_waitress_is_not_ended_by_the_applications_handler(channel: Channel) -> None:
    """waitress does not finish its requests at SIGTERM, so the library sends none."""
    needs.module("waitress")
    worker = channel.start(sys.executable, PROGRAMS / "waitress_handles.py")

    worker.retire()

    assert (worker.read_rest(), worker.wait()) == (["ended"], 0)


def test_waitress_awaits_the_body_of_a_request_when_it_closes_idle_clients(
    channel: Channel,
) -> None:
    needs.module("waitress")
    sends = channel.connect()
    sends.say("POST / HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r")
    worker = channel.start(sys.executable, PROGRAMS / "waitress_app.py", "127.0.0.1:1")
    assert sends.hear() == "HTTP/1.1 100 Continue\r"
    idle = channel.connect()

    channel.end_channel()

    assert idle.hear() == ""  # closed: by then the client that sends has been silent for longer
    assert sends.hear() == "\r"
    sends.say("x")
    assert sends.hear() == "HTTP/1.1 200 OK\r"
    sends.close()
    assert worker.wait() == 0


def test_waitress_awaits_a_slow_reader_when_it_closes_idle_clients(channel: Channel) -> None:
    needs.module("waitress")
    # Most of the answer waits in waitress.
    channel.listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    worker = channel.start(sys.executable, PROGRAMS / "waitress_app.py", "127.0.0.1:1")
    reads = channel.connect()
    path = "/hello-" + "x" * 240_000
    reads.say(f"GET {path} HTTP/1.1\r\n\r")
    assert reads.hear() == "HTTP/1.1 200 OK\r"
    idle = channel.connect()

    channel.end_channel()

    assert idle.hear() == ""
    while reads.hear() != "\r":
        pass
    assert reads.hear().endswith(path[1:])
    reads.close()
    assert worker.wait() == 0


def test_a_gevent_server_leaves_nothing_behind_when_it_stops() -> None:
    needs.module("gevent")

    done = python(CLOSES)

    assert (done.stdout, done.returncode) == ("None 0\n", 0), done.stderr


@pytest.mark.parametrize("library", ["gevent", "waitress"])
def test_a_server_that_takes_no_more_clients_is_not_stuck(channel: Channel, library: str) -> None:
    """It answers the watchdog, and lets its idle clients go at the drain."""
    needs.module(library)
    worker = channel.start(
        *(sys.executable, PROGRAMS / "full.py", library), env={"WATCHDOG_USEC": "20000"}
    )
    client = channel.connect()
    client.say("GET / HTTP/1.1\r\n\r")
    while client.hear() != "\r":
        pass

    for _ in range(20):  # more than the socket has room for
        assert channel.hear() == (worker.pid, "WATCHDOG=1")

    channel.end_channel()
    assert client.hear() == str(worker.pid)
    assert worker.wait() == 0


@pytest.mark.parametrize("library", ["anyio", "trio"])
def test_a_drain_cancels_no_handler_that_has_closed_its_stream(
    channel: Channel, library: str
) -> None:
    needs.module("anyio")
    needs.module("trio")
    worker = channel.start(sys.executable, PROGRAMS / "ends_late.py", library)
    client = channel.connect()
    assert client.hear() == ""

    channel.end_channel()

    assert (worker.read_rest(), worker.wait()) == (["finished"], 0)


@pytest.mark.parametrize("first", ["tcp", "unix"])
def test_waitress_serves_tcp_and_unix_clients_in_one_worker(
    channel: Channel, tmp_path: Path, first: str
) -> None:
    needs.module("waitress")
    channel.listen_unix(tmp_path / "socket")
    if first == "unix":
        channel.listeners.reverse()
    channel.start(sys.executable, PROGRAMS / "waitress_app.py", "127.0.0.1:1")

    peers = []
    for number in range(2):
        client = channel.connect(number)
        client.say("GET / HTTP/1.1\r\nConnection: close\r\n\r")
        lines = list(iter(client.hear, "\r"))
        assert lines[0] == "HTTP/1.1 200 OK\r"
        peers += [line for line in lines if line.startswith("Peer")]

    assert sorted(peers) == ["Peer: 127.0.0.1\r", "Peer: localhost\r"]


def test_waitress_sets_its_options_of_tcp_clients_beside_a_unix_listener() -> None:
    needs.module("waitress")
    from socketprotector_client.waitress import _take_all_families
    from waitress.adjustments import Adjustments
    from waitress.server import UnixWSGIServer

    server = UnixWSGIServer.__new__(UnixWSGIServer)
    server.adj = Adjustments()
    _take_all_families(server)
    with socket.socket() as client:
        server.set_socket_options(client)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
