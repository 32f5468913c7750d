"""The process that asks by HTTP: good answers, and bad ones, each told in one line."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from socketprotector.daemon import prober_client
from socketprotector.daemon.delivery.probe_target import ProbeTarget
from socketprotector.model.probe_spec import ProbeSpec
from socketprotector.programs import prober
from socketprotector.system.loop import Loop
from tests import needs
from tests.running import DEADLINE_S
from tests.together import together

HTTP = b"HTTP/1.1 "
Serve = Callable[[socket.socket], object]


@contextmanager
def serving(serve: Serve) -> Iterator[tuple[str, int]]:
    """A server of one thread on a port of its own, until this is over."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as kept:

        def run() -> None:
            with suppress(OSError):
                while True:
                    one, _ = listening.accept()
                    kept.callback(one.close)
                    with suppress(OSError):
                        one.recv(65536)
                        serve(one)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listening.getsockname()
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def told(address: tuple[str, int], **words: object) -> bytes:
    request = {"source": "", "options": (), "kind": "http", "host": "", "path": "/healthz"}
    return json.dumps({**request, "address": address, "good": (200, 204), **words}).encode()


def asked(serve: Serve, **words: object) -> str:
    """Ask once, in this process."""
    with serving(serve) as address:
        return prober.ProbeRequest(told(address, **words)).send()


def says(*parts: bytes, close: bool = True) -> Serve:
    def serve(one: socket.socket) -> None:
        for part in parts:
            one.sendall(part)
        if close:
            one.shutdown(socket.SHUT_RDWR)

    return serve


def drips(one: socket.socket) -> None:
    """A byte now and then, for ever."""
    for byte in b"HTTP/1.1 200 OK\r\nX: " + bytes(1 << 20):
        one.sendall(bytes([byte]))
        select.select([], [], [], 0.01)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "LIMIT_S", 0.3)


@together(
    "parts",
    [
        (HTTP + b"200 OK\r\n\r\n",),
        (b"HTTP/1.0 204 None\r\nX: y\r\n\r\n",),
        (HTTP + b"100 Continue\r\n\r\n", HTTP + b"200 OK\r\nContent-Length: 3\r\n\r\nabc"),
        (HTTP + b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"3\r\nabc\r\n0\r\n\r\n"),
        (HTTP + b"200 OK\r\nContent-Length: 100000000\r\n\r\n",),
        (b"HTTP/1.1  200  OK\r\n\r\n",),
        (HTTP + b"103 Early Hints\r\nLink: </x>\r\n\r\n", HTTP + b"200 OK\r\n\r\n"),
    ],
)
def test_a_good_status_is_a_good_answer(parts: Sequence[bytes]) -> None:
    assert asked(says(*parts)) == ""
    assert asked(says(*parts, close=False)) == ""


@together(
    ("serve", "why"),
    [
        (says(), "closed without an answer"),
        (says(b"garbage\r\n\r\n"), 'no HTTP: "garbage"'),
        (says(b"\x16\x03\x01\n"), 'no HTTP: "???"'),
        (says(HTTP + b"200"), "closed within its header"),
        (says(HTTP + b"200 OK\r\nContent-Le"), "closed within its header"),
        (says(HTTP + b"200 OK\r\nX: y\r\n"), "closed within its header"),
        (says(HTTP + b"100 Continue\r\n\r\n"), "closed within its header"),
        (says(HTTP + b"200 OK\r\nX: " + b"y" * 100_000), "more than 64 KiB"),
        (says(HTTP + b"200 OK\r\n" + b"X: y\r\n" * 200), "closed within its header"),
        (says((HTTP + b"100 Continue\r\n\r\n") * 5000), "more than 64 KiB"),
        (says(HTTP + b"500 Oh\r\n\r\ndatabase \x00\ngone"), '500, "database ? gone"'),
        (says(HTTP + b"503 Busy\r\n\r\n"), "503, Busy"),
        (says(HTTP + b"503 Busy\r\nContent-Length: 0\r\n\r\n", close=False), "503, Busy"),
        (says(HTTP + b"304 Same\r\n\r\n", close=False), "304, Same"),
        (says(HTTP + b"500 Oh\r\ncontent-length :  4 \r\n\r\nlost?"), '500, "lost"'),
        (says(HTTP + b"500 Oh\r\nContent-Length: four\r\n\r\nlost"), "500, Oh"),
        (says(HTTP + b"500 Oh\n\nlost"), '500, "lost"'),
        (says(b"HTTP/2 200\r\n\r\n"), 'no HTTP: "HTTP/2 200"'),
        (says(HTTP + b"+20 OK\r\n\r\n"), 'no HTTP: "HTTP/1.1 +20 OK"'),
        (says(HTTP + b"099 OK\r\n\r\n"), 'no HTTP: "HTTP/1.1 099 OK"'),
        (says(HTTP + b"503\r\n\r\n"), "503, no text"),
        (says(HTTP + b"503 \x1b[2J\x00\r\n\r\n"), "503, ?[2J?"),
        (says(HTTP + b"503 " + b"x" * 50_000 + b"\r\n\r\n"), "503, " + "x" * 120),
        (says(HTTP + b"101 Switching\r\n\r\n"), "101, Switching"),
        (says(HTTP + b"302 Found\r\nLocation: /x\r\n\r\n"), "302, Found"),
        (
            says(HTTP + b"500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nlost\r\n", close=False),
            '500, "lost"',
        ),
        (says(HTTP + b"500 Oh\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "500, Oh"),
        (says(HTTP + b"500 Oh\r\n\r\n" + b"x" * 10_000_000), '500, "' + "x" * 100),
    ],
)
def test_a_bad_answer_is_told_in_one_line(serve: Serve, why: str) -> None:
    found = asked(serve)

    assert found.startswith(f"GET /healthz: {why}")
    assert "\n" not in found
    assert len(found) < 300


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "serve",
    [
        says(close=False),
        says(HTTP + b"200 OK\r\n", close=False),
        says(HTTP + b"100 Continue\r\n\r\n", close=False),
        drips,
    ],
)
def test_each_try_has_an_end(serve: Serve) -> None:
    late = asked(serve, limit_s=0.3, limit="300ms")
    assert late == "GET /healthz: no answer within 300ms"


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("limit_s", [30 * 86_400.0, 999_999_999.0])
def test_an_answer_may_take_longer_than_the_kernel_can_wait(limit_s: float) -> None:
    """poll(2) and a socket's time-out take 24.8 days at most."""
    good = says(HTTP + b"200 OK\r\nContent-Length: 0\r\n\r\n")
    assert asked(good, limit_s=limit_s) == ""
    with serving(good) as address, socket.create_connection(address) as given:
        assert prober.ProbeRequest(told(address, limit_s=limit_s)).send(given) == ""


def test_a_try_that_is_cut_short_says_for_how_long_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "_LONGEST_S", 0.2)  # of a day
    late = asked(says(close=False), limit_s=30 * 86_400.0, limit="30d")
    assert late == "GET /healthz: no answer within 1d"


def test_an_answer_that_has_no_end_is_told_by_its_status() -> None:
    assert asked(says(HTTP + b"500 Oh\r\nContent-Length: 5\r\n\r\n", close=False)) == (
        "GET /healthz: 500, Oh"
    )


def test_what_refuses_or_resets_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
    assert prober.ProbeRequest(told(address)).send() == "GET /healthz: refused"

    def reset(one: socket.socket) -> None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        one.close()

    assert asked(reset) == "GET /healthz: Connection reset by peer"


def test_the_request_is_what_was_asked_for() -> None:
    seen = []

    def serve(one: socket.socket) -> None:
        one.sendall(HTTP + b"200 OK\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(
            target=lambda: prober.ProbeRequest(
                told(listening.getsockname(), host="shop.example", path="/p?q=1")
            ).send()
        )
        thread.start()
        one, _ = listening.accept()
        with one:
            seen = one.recv(65536).decode().split("\r\n")
            serve(one)
        thread.join()
    assert seen[0] == "GET /p?q=1 HTTP/1.1"
    assert "Host: shop.example" in seen
    assert "Connection: close" in seen


def test_https_is_asked_without_verification(tmp_path: Path) -> None:
    made = subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=no.such.name",
            "-keyout",
            tmp_path / "key",
            "-out",
            tmp_path / "cert",
            "-days",
            "1",
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        needs.skip("openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with (
                suppress(OSError),
                context.wrap_socket(listening.accept()[0], server_side=True) as one,
            ):
                one.recv(65536)
                one.sendall(HTTP + b"200 OK\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        assert prober.ProbeRequest(told(listening.getsockname(), kind="https")).send() == ""
        thread.join()
    found = asked(says(HTTP + b"400 Bad\r\n\r\n"), kind="https")
    assert found.startswith("GET /healthz: no TLS: ")


@pytest.mark.parametrize("host", ["", "[::1]:443", "no.such.name:443", "no.such.name"])
def test_the_name_that_tls_asks_for_has_no_port(host: str) -> None:
    found = asked(lambda one: one.sendall(b"garbage"), kind="https", host=host)

    assert found.startswith("GET /healthz: no TLS: ")


@pytest.mark.parametrize("host", [".example", "a..b", "x" * 64])
def test_what_cannot_be_asked_at_all_is_told(host: str) -> None:
    found = asked(says(), kind="https", host=host)

    assert found.startswith("GET /healthz: cannot be probed: ")


def test_without_the_ssl_module_http_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ssl", None)

    assert asked(says(HTTP + b"200 OK\r\n\r\n")) == ""
    assert "cannot be probed" in asked(says(), kind="https")
    code = "import sys; sys.modules['ssl'] = None; import socketprotector.programs.prober"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the process --------------------------------------------------------------------


def send(line: socket.socket, request: bytes) -> None:
    """Have it asked, by a connection to where the request says."""
    with socket.create_connection(json.loads(request)["address"]) as one:
        socket.send_fds(line, [request], [one.fileno()])


@contextmanager
def process(request: bytes = b"", *listening: socket.socket) -> Iterator[socket.socket]:
    """Run it; gives our end of its line.  It ends with that."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(DEADLINE_S)
    fds = (theirs.fileno(), *(each.fileno() for each in listening))
    words = (sys.executable, "-I", "-S", prober.__file__, *map(str, fds))
    with ours, subprocess.Popen(words, pass_fds=fds) as running:
        theirs.close()
        if listening:
            ours.send(request)
        elif request:
            send(ours, request)
        yield ours
        ours.close()
        assert running.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(
    ("serve", "says"),
    [
        (says(HTTP + b"200 OK\r\n\r\n"), b"+7 "),
        (says(HTTP + b"500 Oh\r\n\r\n"), b"-7 GET /healthz: 500, Oh"),
        (says(close=False), b"~7 GET /healthz: no answer within 200ms"),
    ],
)
def test_it_asks_once_by_a_connection_that_it_is_given(serve: Serve, says: bytes) -> None:
    """Also while it is being made; and the next one as well."""
    with serving(serve) as address, ExitStack() as closing:
        request = told(address, limit_s=0.2, limit="200ms", number=7)
        line = closing.enter_context(process())
        for _ in range(2):
            one = closing.enter_context(socket.socket())
            one.setblocking(False)
            assert one.connect_ex(address) in (0, errno.EINPROGRESS)
            socket.send_fds(line, [request], [one.fileno()])
            assert line.recv(4096) == says


def test_what_is_said_of_an_earlier_question_is_not_heard_any_more(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generation may be gone."""
    monkeypatch.chdir(".")  # to start a process changes it
    heard: list[str] = []
    came, answer = threading.Event(), threading.Event()

    def hangs(one: socket.socket) -> None:
        came.set()
        assert answer.wait(DEADLINE_S)
        says(HTTP + b"500 Oh\r\n\r\n")(one)

    def hear(why: str) -> None:
        heard.append(why)
        loop.running = False

    def ask(address: tuple[str, int]) -> None:
        way = ProbeTarget(address, None, lambda one: False, lambda: None)
        with way.connecting() as one:
            one.connect_ex(address)
            client.send(one, way, ProbeSpec("http", path="/p"), DEADLINE_S, DEADLINE_S)

    client = prober_client.Prober(loop, answered=hear, ended=heard.append)
    try:
        with serving(hangs) as old, serving(says(HTTP + b"200 OK\r\n\r\n")) as new:
            ask(old)
            assert came.wait(DEADLINE_S)
            ask(new)
            answer.set()
            loop.run()
            assert heard == [""]
            with serving(says(HTTP + b"503 Gone\r\n\r\n")) as newest:
                ask(newest)
                loop.running = True
                loop.run()
    finally:
        assert client._process is not None
        pid = client._process.process.pid
        client.close()
        os.waitpid(pid, 0)
    assert heard == ["", "GET /p: 503, Gone"]


def test_one_that_is_given_ends_while_a_question_is_under_way() -> None:
    came = threading.Event()

    def serve(one: socket.socket) -> None:
        came.set()

    with serving(serve) as address, process() as line, socket.create_connection(address) as one:
        socket.send_fds(line, [told(address, limit_s=3600.0)], [one.fileno()])
        assert came.wait(DEADLINE_S)


@pytest.mark.parametrize("listening", [False, True])
def test_one_that_can_have_no_thread_ends_in_silence(listening: bool) -> None:
    """Another one is started then."""
    code = (
        "import runpy, sys, threading\n"
        "def start(self): raise RuntimeError('no more threads')\n"
        "threading.Thread.start = start\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(DEADLINE_S)
    with ours, socket.create_server(("127.0.0.1", 0)) as probe:
        fds = (theirs.fileno(), probe.fileno()) if listening else (theirs.fileno(),)
        words = (sys.executable, "-c", code, prober.__file__, *map(str, fds))
        with subprocess.Popen(words, pass_fds=fds, stderr=subprocess.PIPE) as running:
            theirs.close()
            if listening:
                ours.send(told(probe.getsockname()))
            else:
                send(ours, told(probe.getsockname()))
            assert running.wait(DEADLINE_S) == 1
            assert running.stderr is not None
            assert running.stderr.read() == b""


def test_it_ends_with_its_line_also_while_a_try_is_under_way() -> None:
    came = threading.Event()

    def serve(one: socket.socket) -> None:
        came.set()

    with serving(serve) as address, process(told(address)):
        assert came.wait(DEADLINE_S)


def test_it_ends_in_silence_also_where_what_it_has_said_is_never_read(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with serving(says(HTTP + b"500 Oh\r\n\r\n")) as address, process(told(address)) as line:
        line.recv(4096, socket.MSG_PEEK)

    assert capfd.readouterr().err == ""


def test_it_ends_in_silence_where_what_it_says_next_comes_to_nobody(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As where it says something just when its line ends."""
    with serving(says(HTTP + b"500 Oh\r\n\r\n")) as address, process() as line:
        line.shutdown(socket.SHUT_RD)
        send(line, told(address))
        ended = select.poll()
        ended.register(line, 0)
        assert ended.poll(DEADLINE_S * 1000)

    assert capfd.readouterr().err == ""


def test_it_forwards_what_comes_to_the_probe_address() -> None:
    """Many at once, both ways, half-closed as they are."""
    whole = os.urandom(300_000)

    with socket.create_server(("127.0.0.1", 0)) as echo, ExitStack() as closing:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    one, _ = echo.accept()
                    threading.Thread(target=back, args=(one,)).start()

        def back(one: socket.socket) -> None:
            with one:
                received = b""
                while data := one.recv(65536):
                    received += data
                one.sendall(received[::-1])

        thread = threading.Thread(target=answer)
        thread.start()
        closing.callback(thread.join)
        closing.callback(echo.shutdown, socket.SHUT_RDWR)
        probe = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
        closing.enter_context(process(told(echo.getsockname()), probe))
        clients = [
            closing.enter_context(socket.create_connection(probe.getsockname(), DEADLINE_S))
            for _ in range(10)
        ]
        for each in clients:
            each.sendall(whole)
            each.shutdown(socket.SHUT_WR)
        for each in clients:
            with each.makefile("rb") as stream:
                assert stream.read() == whole[::-1]


def test_who_connects_to_what_does_not_listen_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
    with (
        socket.create_server(("127.0.0.1", 0)) as probe,
        process(told(address), probe),
        socket.create_connection(probe.getsockname(), DEADLINE_S) as client,
    ):
        assert client.recv(1) == b""
