"""The prober process: requests over TLS, and forwarded connections."""

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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace

import pytest

from socketprotector.daemon import prober_client
from socketprotector.programs import prober
from socketprotector.system import loopback
from socketprotector.system.loop import Loop
from tests.boundary.serving import Serve, reset, serving
from tests.certificates import self_signed
from tests.running import DEADLINE_S
from tests.together import together

GOOD = b"HTTP/1.1 200 OK\r\n\r\nfine"


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(tmp_path_factory.mktemp("tls")))
    return context


def message(**fields: object) -> bytes:
    """Describe a request."""
    usual = {"host": "", "request": "GET /", "number": 7, "limit_s": DEADLINE_S, "limit": "1m"}
    return json.dumps({**usual, **fields}).encode()


def forwarded(line: socket.socket, address: tuple[str, int]) -> socket.socket:
    """Return a client whose connection the prober forwards to an address."""
    text = json.dumps({"address": address, "source": "", "options": ()}).encode()
    client, server = loopback.pair()
    assert server is not None
    with server:
        socket.send_fds(line, [text], [server.fileno()])
    client.settimeout(DEADLINE_S)
    return client


def carried_out(address: tuple[str, int], **fields: object) -> tuple[str, bytes]:
    """Carry out a request in this process; return the report and the answer."""
    ours, theirs = socket.socketpair()
    with ours:
        request = prober.TlsRequest(message(**fields))
        report = request.carry_out(socket.create_connection(address), theirs)
        with ours.makefile("rb") as stream:
            return report.decode(), stream.read()


def says(*parts: bytes, close: bool = True) -> Serve:
    def serve(one: socket.socket) -> None:
        one.recv(65536)
        for part in parts:
            one.sendall(part)
        if close:
            one.shutdown(socket.SHUT_RDWR)

    return serve


@together("answer", [GOOD, b"", bytes(range(256)) * 100])
def test_an_answer_is_copied_to_its_end(tls: ssl.SSLContext, answer: bytes) -> None:
    with serving(says(answer), tls) as address:
        assert carried_out(address) == ("+7 ", answer)


def test_the_request_is_sent_as_it_is(tls: ssl.SSLContext) -> None:
    seen: list[bytes] = []
    text = "GET /p?q=1 HTTP/1.1\r\n\r\n"

    def serve(one: socket.socket) -> None:
        seen.append(one.recv(65536))
        one.sendall(GOOD)
        one.shutdown(socket.SHUT_RDWR)

    with serving(serve, tls) as address:
        assert carried_out(address, request=text)[0] == "+7 "
    assert seen == [text.encode()]


def test_no_tls_is_reported() -> None:
    with serving(says(b"HTTP/1.1 400 Bad\r\n\r\n")) as address:
        assert carried_out(address)[0].startswith("-7 no TLS: ")


@pytest.mark.parametrize("host", ["", "[::1]:443", "no.such.name:443", "no.such.name"])
def test_the_server_name_has_no_port(tls: ssl.SSLContext, host: str) -> None:
    names: list[str | None] = []

    def note(_connection: object, name: str | None, _context: object) -> None:
        names.append(name)

    tls.sni_callback = note
    try:
        with serving(says(GOOD), tls) as address:
            assert carried_out(address, host=host)[0] == "+7 "
    finally:
        tls.sni_callback = None
    assert names == ["no.such.name" if host.startswith("no") else None]


@pytest.mark.parametrize("host", [".example", "a..b", "x" * 64])
def test_an_impossible_name_is_reported(host: str) -> None:
    with serving(says()) as address:
        assert carried_out(address, host=host)[0].startswith("-7 cannot be probed: ")


def test_without_the_ssl_module_that_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ssl", None)
    with serving(says()) as address:
        assert "cannot be probed" in carried_out(address)[0]
    code = "import sys; sys.modules['ssl'] = None; import socketprotector.programs.prober"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_reset_is_reported_after_what_came_before(tls: ssl.SSLContext) -> None:
    def serve(one: socket.socket) -> None:
        one.recv(65536)
        one.sendall(GOOD)
        reset(one)

    with serving(serve, tls) as address:
        report, answer = carried_out(address)
    assert report in ("-7 Connection reset by peer", "+7 ")
    assert GOOD.startswith(answer)


@together("tls_first", [False, True])
def test_an_answer_that_does_not_end_is_late(tls: ssl.SSLContext, tls_first: bool) -> None:
    """So is a handshake that hangs, and an answer of one byte at a time."""

    def drip(one: socket.socket) -> None:
        one.recv(65536)
        for byte in bytes(1 << 20):
            one.sendall(bytes([byte]))
            select.select([], [], [], 0.01)

    for serve in (says(close=False), drip):
        wrong = not tls_first and serve is drip  # it is no TLS
        limit_s = DEADLINE_S if wrong else 0.3
        with serving(serve, tls if tls_first else None) as address:
            late = carried_out(address, limit_s=limit_s, limit="300ms")
        assert late[0].startswith("-7 no TLS" if wrong else "~7 no answer within 300ms")


def test_the_time_of_the_handshake_counts(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, over = [0.0], threading.Event()
    monkeypatch.setattr(prober, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def take_long(*_: object) -> None:
        now[0] = DEADLINE_S

    def answer(one: socket.socket) -> None:
        one.recv(65536)
        over.wait(5)
        one.sendall(GOOD)

    tls.sni_callback = take_long
    try:
        with serving(answer, tls) as address:
            late = carried_out(address, limit="1m")
            over.set()
    finally:
        tls.sni_callback = None
    assert late == ("~7 no answer within 1m", b"")


@pytest.mark.parametrize("limit_s", [30 * 86_400.0, 999_999_999.0])
def test_an_answer_may_take_longer_than_the_kernel_can_wait(
    tls: ssl.SSLContext, limit_s: float
) -> None:
    """poll(2) and a socket's timeout take 24.8 days at most."""
    with serving(says(GOOD), tls) as address:
        assert carried_out(address, limit_s=limit_s) == ("+7 ", GOOD)


def test_the_report_names_the_limit_that_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "_LONGEST_S", 0.2)  # of a day
    with serving(says(close=False)) as address:
        late = carried_out(address, limit_s=30 * 86_400.0, limit="30d")
    assert late == ("~7 no answer within 1d", b"")


# -- the process --------------------------------------------------------------------


def send(line: socket.socket, address: tuple[str, int], **fields: object) -> socket.socket:
    """Give the prober a request and a connection in progress; return the answer's socket."""
    ours, theirs = socket.socketpair()
    with socket.socket() as one, theirs:
        one.setblocking(False)
        assert one.connect_ex(address) in (0, errno.EINPROGRESS)
        socket.send_fds(line, [message(**fields)], [one.fileno(), theirs.fileno()])
    ours.settimeout(DEADLINE_S)
    return ours


@contextmanager
def process() -> Iterator[socket.socket]:
    """Run the prober, and give our end of its line; it exits when we close the line."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(DEADLINE_S)
    fd = theirs.fileno()
    words = (sys.executable, "-I", "-S", prober.__file__, str(fd))
    with ours, subprocess.Popen(words, pass_fds=(fd,)) as running:
        theirs.close()
        yield ours
        ours.close()
        assert running.wait(DEADLINE_S) == 0


def test_it_sends_one_request_after_another(tls: ssl.SSLContext) -> None:
    with serving(says(GOOD), tls) as address, process() as line:
        for number in (7, 8):
            with send(line, address, number=number) as answer, answer.makefile("rb") as stream:
                assert stream.read() == GOOD
            assert line.recv(4096) == b"+%d " % number


def test_it_reports_nothing_more_than_an_end_when_the_answer_is_not_wanted(
    tls: ssl.SSLContext,
) -> None:
    """The protector closes its socket as soon as it knows the status."""
    with serving(says(GOOD, bytes(10_000_000)), tls) as address, process() as line:
        with send(line, address) as answer:
            assert answer.recv(12) == GOOD[:12]
        assert line.recv(4096) == b"+7 "


def test_a_report_on_an_earlier_request_is_ignored(
    loop: Loop, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generation may be gone."""
    monkeypatch.chdir(".")  # to start a process changes it
    heard: list[str] = []
    came, go_on = threading.Event(), threading.Event()

    def hangs(one: socket.socket) -> None:
        one.recv(65536)
        came.set()
        assert go_on.wait(DEADLINE_S)

    def hear(why: str) -> None:
        heard.append(why)
        loop.running = False

    def ask(address: tuple[str, int]) -> socket.socket:
        with socket.create_connection(address) as one:
            return client.send(b"GET /", "", one, limit_s=DEADLINE_S, left_s=DEADLINE_S)

    client = prober_client.Prober(loop, answered=hear, ended=heard.append)
    try:
        with serving(hangs, tls) as old, serving(says(GOOD), tls) as new, ExitStack() as answers:
            answers.enter_context(ask(old))
            assert came.wait(DEADLINE_S)
            answer = answers.enter_context(ask(new))
            go_on.set()
            loop.run()
            assert heard == [""]
            assert answer.recv(4096) == GOOD
            with serving(says()) as newest:
                answers.enter_context(ask(newest))
                loop.running = True
                loop.run()
    finally:
        assert client._process is not None
        pid = client._process.process.pid
        client.close()
        os.waitpid(pid, 0)
    assert heard[0] == ""
    assert len(heard) == 2
    assert heard[1]


@pytest.mark.parametrize("forwards", [False, True])
def test_one_that_can_have_no_thread_ends_in_silence(forwards: bool) -> None:
    """The protector then starts another."""
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
        fd = theirs.fileno()
        words = (sys.executable, "-c", code, prober.__file__, str(fd))
        with subprocess.Popen(words, pass_fds=(fd,), stderr=subprocess.PIPE) as running:
            theirs.close()
            (forwarded if forwards else send)(ours, probe.getsockname()).close()
            assert running.wait(DEADLINE_S) == 1
            assert running.stderr is not None
            assert running.stderr.read() == b""


def test_it_ends_with_its_line_also_while_a_request_is_under_way() -> None:
    came = threading.Event()

    def serve(one: socket.socket) -> None:
        came.set()

    with serving(serve) as address, process() as line, send(line, address, limit_s=3600.0):
        assert came.wait(DEADLINE_S)


def test_it_ends_in_silence_also_where_its_report_is_never_read(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with serving(says()) as address, process() as line, send(line, address):
        line.recv(4096, socket.MSG_PEEK)

    assert capfd.readouterr().err == ""


def test_it_ends_in_silence_where_its_line_ends_before_its_report(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with serving(says()) as address, process() as line:
        line.shutdown(socket.SHUT_RD)
        with send(line, address):
            ended = select.poll()
            ended.register(line, 0)
            assert ended.poll(DEADLINE_S * 1000)

    assert capfd.readouterr().err == ""


# -- the probe address --------------------------------------------------------------


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
        line = closing.enter_context(process())
        clients = [closing.enter_context(forwarded(line, echo.getsockname())) for _ in range(10)]
        for each in clients:
            each.sendall(whole)
            each.shutdown(socket.SHUT_WR)
        for each in clients:
            with each.makefile("rb") as stream:
                assert stream.read() == whole[::-1]


def test_who_connects_to_what_does_not_listen_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
    with process() as line, forwarded(line, address) as client:
        assert client.recv(1) == b""
