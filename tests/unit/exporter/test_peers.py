"""Other hosts are asked over HTTPS: who is believed, and what one that misbehaves costs the others.

The hosts are servers in the test's own event loop, with certificates of an authority made here.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from socketprotector_exporter import peers
from socketprotector_exporter.collector import ProtectorCollector
from socketprotector_exporter.http import Server
from socketprotector_exporter.main import _address, _command
from socketprotector_exporter.names import Names
from socketprotector_exporter.peers import Files, Peers, why_not
from socketprotector_exporter.peers_file import parse
from socketprotector_exporter.peers_model import Host
from socketprotector_exporter.web_hub import Hub

from socketprotector.model.errors import UsageError
from tests.pages import page
from tests.running import DEADLINE_S, ROOT, Lines
from tests.together import together
from tests.unit.ctl.fake import Fake
from tests.unit.exporter.conftest import Exporter, run

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
METRICS = b'socketprotector_up{instance="web"} 1.0\nsocketprotector_serving{instance="web"} 1.0\n'
HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n"
TOKEN = "right"


class Authority:
    """Signs certificates: NAME.pem with its key, for an address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate = folder / "ca.pem"
        self._make("ca", "-subj", "/CN=ours", "-addext", "keyUsage=keyCertSign")

    def sign(self, name: str, address: str) -> ssl.SSLContext:
        """Return what a server speaks TLS with."""
        self._make(
            name,
            *("-CA", "ca.pem", "-CAkey", "ca.key", "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName={address}", "-addext", "basicConstraints=CA:FALSE"),
        )
        return self.tls(name)

    def tls(self, name: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        return context

    def _make(self, name: str, *words: str) -> None:
        made = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        files = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
        subprocess.run(
            ["openssl", "req", "-x509", *made, "-days", "2", *words, *files],
            cwd=self.folder,
            check=True,
            capture_output=True,
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> ssl.SSLContext:
    return authority.sign("right", "IP:127.0.0.1")


@pytest.fixture(autouse=True)
def pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask as it is asked outside, in less time."""
    for name, value in (("EVERY_S", 0.05), ("TURN_S", 0.005), ("TURNS", 2)):
        monkeypatch.setattr(peers, name, value)


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> Files:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    return Files(str(tmp_path / "hosts"), str(authority.certificate), str(token))


def says(*parts: bytes) -> Answer:
    """Answer a whole request with these."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for each in parts:
            writer.write(each)
            await writer.drain()

    return answer


async def wants_token(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer as an exporter with --token does."""
    request = (await reader.readuntil(b"\r\n\r\n")).decode()
    assert request.startswith("GET /metrics HTTP/1.0\r\nHost: ")
    if f"\r\nAuthorization: Bearer {TOKEN}\r\n" in request:
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(METRICS) + METRICS)
    else:
        writer.write(b"HTTP/1.0 401 Unauthorized\r\n\r\n")


class World:
    """Servers, and a page that somebody looks at."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.said: list[str] = []
        self.asked: dict[str, int] = {}
        self.rounds = 0  # how many reports about the hosts it got: one in each round of questions
        self.looked = asyncio.Event()
        self._lines: dict[str, str] = {}
        self._servers: dict[str, asyncio.Server] = {}
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.peers: Peers

    async def serve(
        self, name: str, answer: Answer, tls: ssl.SSLContext | None, port: int = 0
    ) -> int:
        """Be a host that answers so.  Returns its port."""

        async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.asked[name] = self.asked.get(name, 0) + 1
            try:
                await answer(reader, writer)
            except (OSError, asyncio.IncompleteReadError):
                pass  # it was given up
            finally:
                writer.close()

        server = await asyncio.start_server(one, "127.0.0.1", port, ssl=tls)
        self._servers[name] = server
        made: int = server.sockets[0].getsockname()[1]
        self.lists(name, f"https://127.0.0.1:{made}")
        return made

    async def ends(self, name: str) -> None:
        server = self._servers.pop(name)
        server.close()
        await server.wait_closed()

    def lists(self, name: str, address: str) -> None:
        """Have a line in the file."""
        self._lines[name] = f"{name} {address}"
        self.write("\n".join(self._lines.values()))

    def write(self, text: str) -> None:
        path = Path(self.files.peers)
        made = path.with_suffix(".new")
        made.write_text(text)
        made.rename(path)

    def look(self) -> None:
        """Begin to ask."""
        self.peers = Peers(self.files, self.said.append)
        self.looked.set()
        self.begin(self.peers.run(self.looked, self._tell))

    def begin(self, what: Any) -> None:
        self._tasks.add(asyncio.create_task(what))

    def _tell(self, hosts: Iterable[Host]) -> None:
        self.rounds += 1
        self._news.set()

    @property
    def seen(self) -> dict[str, str]:
        """What is said of each host: its note where it does not answer."""
        all_of_them = {host.name: host.shown() for host in self.peers.hosts}
        return {
            name: one["note"] if one["state"] == "not answering" else one["state"]
            for name, one in all_of_them.items()
        }

    async def until(self, fact: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not fact():
                self._news.clear()
                await self._news.wait()

    async def close(self) -> None:
        for each in self._tasks:
            each.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended
        for name in list(self._servers):
            await self.ends(name)


@pytest.fixture
def inside(files: Files) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    """Run a test in an event loop with a world of its own."""

    def go(test: Callable[[World], Awaitable[None]]) -> None:
        async def whole() -> None:
            world = World(files)
            try:
                await test(world)
            finally:
                await world.close()

        asyncio.run(whole())

    return go


Inside = Callable[[Callable[[World], Awaitable[None]]], None]


# -- who is believed, and what is said ---------------------------------------------


async def hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"\r\n")
    while True:
        writer.write(b"# never to be continued\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"\r\n")
    while True:  # drain() raises at the end, once the loop has had a turn
        writer.write(b"# more and more of what nobody asked for\n" * 500)
        await writer.drain()
        await asyncio.sleep(0)


async def is_plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")


HUNG = {"hung": hangs, "dripping": drips}
WRONG = {
    "huge": (floods, "sends more than 2 MiB"),
    "long": (says(HEAD + b"\r\n", b"x" * 70_000), "sends no metrics of ours"),
    "page": (says(HEAD + b"\r\n<html>log in</html>"), "sends no metrics of ours"),
    "junk": (says(b"\x00\xff\r\n\r\n"), "speaks no HTTP"),
    "endless": (says(b"y" * 200_000), "speaks no HTTP"),
    "cut": (says(HEAD + b"Content-Length: 999\r\n\r\n" + METRICS), "connection ended"),
    "mute": (says(), "connection ended"),
    "busy": (says(b"HTTP/1.1 503 Busy\r\n\r\n"), "answers 503"),
    "moved": (says(b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n"), "answers 302"),
    "zipped": (says(HEAD + b"Content-Encoding: gzip\r\n\r\n\x1f"), "sends its answer encoded"),
    "chunked": (
        says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n"),
        "sends its answer encoded",
    ),
}


def test_each_that_gives_no_metrics_is_told_why_and_waits_for_no_other(
    inside: Inside,
    authority: Authority,
    tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    other = Authority(tmp_path)
    lookup = socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **named: Any) -> Any:
        if host == "nowhere.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return lookup(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    # Those that hang do so until the end of the test, and each is asked once.
    monkeypatch.setattr(peers, "ANSWER_S", DEADLINE_S)
    monkeypatch.setattr(peers, "EVERY_S", 2 * DEADLINE_S)

    async def test(world: World) -> None:
        for name, hung in HUNG.items():
            await world.serve(name, hung, tls)
        await world.serve("not-ours", wants_token, other.sign("x", "IP:127.0.0.1"))
        await world.serve("misnamed", wants_token, authority.sign("y", "IP:127.0.0.9"))
        await world.serve("plain", is_plain, None)
        port = await world.serve("refused", wants_token, tls)
        await world.ends("refused")
        world.lists("nameless", f"https://nowhere.invalid:{port}")
        for name, (answer, _) in WRONG.items():
            await world.serve(name, answer, tls)
        await world.serve("good", wants_token, tls)
        wanted = {
            "hung": "asking",
            "dripping": "asking",
            "not-ours": "its certificate is not from our CA",
            "misnamed": "its certificate is for another name",
            "plain": "speaks no TLS",
            "refused": "connection refused",
            "nameless": "its name is not known",
            **{name: why for name, (_, why) in WRONG.items()},
            "good": "serving",
        }

        world.look()
        await world.until(lambda: list(world.seen.values()).count("asking") == len(HUNG))

        assert world.seen == wanted
        # Who is not believed has seen no token.
        assert not world.asked.keys() & {"not-ours", "misnamed"}

    inside(test)


def test_a_host_is_asked_again_once_its_time_has_come_and_not_before(
    inside: Inside, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(peers, "EVERY_S", 5.0)
    monkeypatch.setattr(
        peers, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 1_000_000_000.0)
    )

    async def test(world: World) -> None:
        await world.serve("web", wants_token, tls)
        world.look()
        await world.until(lambda: world.seen == {"web": "serving"})

        def is_asked(rounds: int, times: int) -> bool:
            return world.rounds >= rounds and world.asked["web"] >= times

        for at, asked in ((1004.9, 1), (1005.0, 2), (1009.9, 2), (1010.0, 3)):
            now[0] = at
            rounds = world.rounds + 3
            await world.until(partial(is_asked, rounds, asked))
            assert world.asked == {"web": asked}, at

    inside(test)


def test_one_that_gives_no_answer_in_time_is_told_so(
    inside: Inside, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "ANSWER_S", 0.3)
    monkeypatch.setattr(peers, "EVERY_S", 0.4)

    async def test(world: World) -> None:
        for name, hung in HUNG.items():
            await world.serve(name, hung, tls)
        with socket.create_server(("127.0.0.1", 0)) as unaccepting:
            world.lists("stopped", f"https://127.0.0.1:{unaccepting.getsockname()[1]}")
            world.look()
            await world.until(lambda: set(world.seen.values()) == {"no answer in 300ms"})

    inside(test)


def test_no_token_is_sent_without_tls(inside: Inside) -> None:
    """At a loopback address, any local user may be the one who listens."""
    heard: list[bytes] = []

    async def listens(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.0 401 Unauthorized\r\n\r\n")

    async def test(world: World) -> None:
        port = await world.serve("own", listens, None)
        world.lists("own", f"http://127.0.0.1:{port}")
        world.look()
        await world.until(lambda: heard)
        assert b"Authorization" not in heard[0]
        await world.until(lambda: world.seen["own"] == "wants a token: https, --peers-token")

    inside(test)


@together(
    ("token", "why"),
    [("wrong", "refuses our token"), (None, "wants a token: https, --peers-token")],
)
def test_a_wrong_token_is_told(
    files: Files, tls: ssl.SSLContext, token: str | None, why: str
) -> None:
    assert files.token is not None
    Path(files.token).write_text(token or "")
    mine = Files(files.peers, files.ca, files.token if token else None)

    async def test() -> None:
        world = World(mine)
        await world.serve("web", wants_token, tls)
        world.look()
        await world.until(lambda: world.seen["web"] != "asking")
        assert world.seen == {"web": why}
        await world.close()

    asyncio.run(test())


@together(
    ("error", "why"),
    [
        (10, "its certificate has expired"),
        (9, "its certificate is not valid yet"),
        (62, "its certificate is for another name"),
        (7, "its certificate: certificate signature failure"),
        (ssl.SSLError(1, "[SSL: TLSV1_ALERT] x"), "TLS: failed"),
        (OSError(113, "Connect call failed ('10.0.0.1', 1)"), "no route to host"),
        (ConnectionResetError(), "connection ended"),
        (ZeroDivisionError(), "cannot be polled: ZeroDivisionError"),
    ],
)
def test_each_error_has_its_words(error: int | Exception, why: str) -> None:
    if isinstance(error, int):
        number, error = error, ssl.SSLCertVerificationError(1, "x")
        error.verify_code = number
        error.verify_message = "certificate signature failure"

    assert why_not(error) == why


# -- over time --------------------------------------------------------------------


def test_nobody_is_asked_while_nobody_looks(inside: Inside, tls: ssl.SSLContext) -> None:
    async def test(world: World) -> None:
        await world.serve("web", wants_token, tls)
        world.look()
        await world.until(lambda: world.asked.get("web", 0) > 2)
        world.looked.clear()
        await world.until(lambda: world.seen == {"web": "asking"})
        asked = world.asked["web"]
        for _ in range(100):
            await asyncio.sleep(0)
        assert world.asked["web"] == asked

        world.looked.set()
        await world.until(lambda: world.seen == {"web": "serving"})
        assert world.asked["web"] > asked

    inside(test)


def test_a_host_that_dies_and_comes_back_is_told_so(inside: Inside, tls: ssl.SSLContext) -> None:
    async def test(world: World) -> None:
        port = await world.serve("web", wants_token, tls)
        await world.serve("other", wants_token, tls)
        world.look()
        await world.until(lambda: world.seen == {"web": "serving", "other": "serving"})
        await world.ends("web")
        await world.until(lambda: world.seen["web"] == "connection refused")
        assert world.seen["other"] == "serving"
        await world.serve("web", wants_token, tls, port)
        await world.until(lambda: world.seen["web"] == "serving")

    inside(test)


# -- names ------------------------------------------------------------------------

NAME = "good.test"


class NameServer:
    """In the place of getaddrinfo()."""

    def __init__(self) -> None:
        self.asked = self.hung = 0
        self.says: list[str] | Exception | None = ["127.0.0.1"]  # None: it is silent
        self.ends = threading.Event()

    def look_up(self, host: Any, *more: Any, **named: Any) -> Any:
        if host != NAME:
            return self.is_silent()
        self.asked += 1
        if self.says is None:
            self.hung += 1
            return self.is_silent()
        if isinstance(self.says, Exception):
            raise self.says
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in self.says]

    def is_silent(self) -> Any:
        self.ends.wait(DEADLINE_S)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    made = NameServer()
    lookup = socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **named: Any) -> Any:
        numeric = str(host).startswith("127.")
        return (lookup if numeric else made.look_up)(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield made
    made.ends.set()


@pytest.fixture(scope="module")
def named(authority: Authority) -> ssl.SSLContext:
    return authority.sign("named", f"DNS:{NAME}")


def test_a_link_local_host_keeps_its_interface() -> None:
    """As a peer, and as our own address."""
    host, interface = "fe80::1%lo", socket.if_nametoindex("lo")
    assert asyncio.run(Names().addresses(host)) == [host]
    assert _address("--listen", f"[{host}]:9517") == ("fe80::1", 9517, 0, interface)
    with Server(("127.0.0.1", 0), ProtectorCollector(), None) as server:
        assert server.url == f"http://127.0.0.1:{server.server_address[1]}"
        server.server_address = ("fe80::1", 9517, 0, interface)
        assert (server.where, server.url) == (f"[{host}]:9517", "http://[fe80::1%25lo]:9517")


def test_names_that_no_server_answers_for_delay_no_other(
    inside: Inside, named: ssl.SSLContext, names: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "ANSWER_S", DEADLINE_S)
    monkeypatch.setattr(peers, "EVERY_S", 2 * DEADLINE_S)

    async def test(world: World) -> None:
        for each in range(40):
            world.lists(f"dead-{each}", f"https://dead-{each}.test:1")
        port = await world.serve("web", wants_token, named)
        world.lists("web", f"https://{NAME}:{port}")
        world.look()
        await world.until(lambda: world.seen["web"] == "serving")
        assert list(world.seen.values()).count("asking") == 40

    inside(test)


def test_a_host_is_asked_by_its_last_address_until_servers_know_of_none(
    inside: Inside, named: ssl.SSLContext, names: NameServer
) -> None:
    async def test(world: World) -> None:
        port = await world.serve("web", wants_token, named)
        world.lists("web", f"https://{NAME}:{port}")
        world.look()
        await world.until(lambda: world.asked.get("web", 0) > 2)
        names.says = socket.gaierror(socket.EAI_AGAIN, "x")
        asked = names.asked
        await world.until(lambda: names.asked > asked + 2)
        names.says = None
        await world.until(lambda: names.hung)
        answered = world.asked["web"]
        await world.until(lambda: world.asked["web"] > answered + 3)
        assert names.hung == 1  # one look-up at a time
        assert world.seen["web"] == "serving"

        names.says = socket.gaierror(socket.EAI_NONAME, "x")
        names.ends.set()
        await world.until(lambda: world.seen["web"] == "its name is not known")
        names.says = ["127.0.0.9", "127.0.0.1"]
        await world.until(lambda: world.seen["web"] == "serving")

    inside(test)


_HANGS = """
import socket, sys, threading
real = socket.getaddrinfo
def getaddrinfo(host, *more, **named):
    if host == "dead.test":
        print("is asked for", file=sys.stderr, flush=True)
        threading.Event().wait()
    return real(host, *more, **named)
socket.getaddrinfo = getaddrinfo
from socketprotector_exporter.__main__ import main
sys.exit(main())
"""


def test_it_ends_well_while_a_look_up_hangs(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("https://dead.test:1\n")
    words = ("--listen", "127.0.0.1:0", "--web", "127.0.0.1:0", "--peers", str(file))
    receive, send = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", _HANGS, *words], stderr=send)
    os.close(send)
    said = Lines(receive)
    try:
        where = re.search(r"http://([^/]+)/", said.wait_for("serves the page at"))
        assert where
        with contextlib.closing(http.client.HTTPConnection(where[1])) as viewer:
            viewer.request("GET", "/events")
            said.wait_for("is asked for")
            process.terminate()
            status = process.wait(DEADLINE_S)
    finally:
        process.kill()
        process.wait()
        said.join()

    assert status == 0
    assert not [each for each in said.seen if "Traceback" in each]


def test_the_files_are_read_again_when_they_change(inside: Inside, tls: ssl.SSLContext) -> None:
    async def test(world: World) -> None:
        port = await world.serve("web", wants_token, tls)
        world.look()
        await world.until(lambda: world.seen == {"web": "serving"})
        kept = world.peers.hosts[0]

        await world.serve("new", wants_token, tls)
        await world.until(lambda: world.seen == {"web": "serving", "new": "serving"})
        assert world.peers.hosts[0] is kept
        world.write("nonsense")
        await world.until(lambda: world.said)
        assert world.said[0].startswith(f"--peers {world.files.peers}: line 1: write [NAME] https")
        assert world.said[0].endswith("; until this is fixed, the old values stay")
        asked = world.asked["web"]
        await world.until(lambda: world.asked["web"] > asked + 3)
        assert len(world.said) == 1
        world.write(f"web https://127.0.0.1:{port}")
        await world.until(lambda: world.seen == {"web": "serving"})

        token = world.files.token
        assert token is not None
        Path(token).write_text("wrong")
        await world.until(lambda: world.seen == {"web": "refuses our token"})
        Path(token).write_text(TOKEN)
        await world.until(lambda: world.seen == {"web": "serving"})

    inside(test)


def test_the_file_is_read_again_before_all_hosts_were_asked(
    inside: Inside, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round of many hosts takes minutes; a token that was changed is not sent meanwhile."""
    monkeypatch.setattr(peers, "EVERY_S", 2 * DEADLINE_S)

    async def test(world: World) -> None:
        await world.serve("web", wants_token, tls)
        world.look()
        await world.until(lambda: world.seen == {"web": "serving"})
        await world.serve("new", wants_token, tls)
        await world.until(lambda: world.seen == {"web": "serving", "new": "serving"})
        assert world.asked == {"web": 1, "new": 1}

    inside(test)


def test_the_file_may_begin_with_a_mark_of_its_encoding(files: Files) -> None:
    Path(files.peers).write_text("https://127.0.0.1:1", encoding="utf-8-sig")

    assert [each.name for each in Peers(files, print).hosts] == ["127.0.0.1"]


def test_more_hosts_than_one_moment_asks_have_their_turn(
    inside: Inside, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "AT_ONCE", 1)

    async def test(world: World) -> None:
        port = await world.serve("web", wants_token, tls)
        world.write("".join(f"web-{each} https://127.0.0.1:{port}\n" for each in range(20)))
        world.look()
        await world.until(lambda: set(world.seen.values()) == {"serving"})
        assert len(world.seen) == 20

    inside(test)


def test_viewers_are_told_of_hosts_and_the_last_one_ends_the_asking(
    inside: Inside, tls: ssl.SSLContext
) -> None:
    async def test(world: World) -> None:
        await world.serve("web", wants_token, tls)
        world.peers = Peers(world.files, world.said.append)
        hub = Hub(list, world.peers)
        world.begin(hub.run())
        told: list[dict[str, Any]] = []

        async def hear(news: asyncio.Event, fact: Callable[[], object]) -> None:
            async with asyncio.timeout(DEADLINE_S):
                messages = hub.watch(news)
                async for message in messages:
                    told.append(json.loads(message.partition(b"data: ")[2]))
                    if fact():
                        return await messages.aclose()  # type: ignore[attr-defined, no-any-return]

        def states() -> dict[str, str]:
            return {host["name"]: host["state"] for each in told for host in each.get("hosts", ())}

        with hub.viewer() as news:
            with hub.viewer():
                pass  # one that goes while another stays
            await hear(news, lambda: states() == {"web": "serving"})
            assert told[0]["host_ids"] == [host.id for host in world.peers.hosts]
            told.clear()
            await world.serve("new", wants_token, tls)
            await hear(news, lambda: states() == {"web": "serving", "new": "serving"})
            assert [host.id for host in world.peers.hosts] in [
                each.get("host_ids") for each in told
            ]
        async with asyncio.timeout(DEADLINE_S):
            while set(world.seen.values()) != {"asking"}:
                await asyncio.sleep(0.005)

    inside(test)


def test_the_document_shows_files_that_are_understood() -> None:
    files = {each.file: each.text for each in page.blocks(ROOT / "docs" / "fleet.md") if each.file}
    parsed = parse(files["/etc/socketprotector/peers"], "peers")
    drop_ins = [text for name, text in files.items() if str(name).endswith(".service.d/https.conf")]
    drop_ins += [text for name, text in files.items() if str(name).endswith("/peers.conf")]
    options = {option for each in _command.params for option in each.opts}

    assert [each.name for each in parsed] == ["web-1.example.org", "database"]
    assert len(drop_ins) == 2
    for text in drop_ins:
        [line] = re.findall(r"^ExecStart=(.+)$", text, re.MULTILINE)
        assert set(re.findall(r" (--[\w-]+)", line)) <= options


# -- the program --------------------------------------------------------------------


@pytest.fixture
def two(
    exporter: Callable[..., Exporter], fakes: Callable[[str], Fake], authority: Authority,
    tls: ssl.SSLContext, files: Files,
) -> Exporter:  # fmt: skip
    """An exporter that another one is asked about by, over HTTPS and with a token."""
    fakes("web")
    folder = authority.folder
    words = ("--tls-cert", folder / "right.pem", "--tls-key", folder / "right.key")
    there = exporter("--name", "web", *words, "--token", str(files.token))
    Path(files.peers).write_text(f"web-1 {there.address}\n")
    more = ("--peers-ca", str(files.ca), "--peers-token", str(files.token))
    return exporter("--name", "web", "--web", "127.0.0.1:0", "--peers", files.peers, *more)


def test_the_page_of_one_exporter_has_the_metrics_of_another(two: Exporter) -> None:
    connection = http.client.HTTPConnection(two.page.removeprefix("http://"), timeout=DEADLINE_S)
    connection.request("GET", "/events")
    answer = connection.getresponse()
    seen: dict[str, Any] = {}
    while seen.get("state") in (None, "asking"):
        _, _, data = answer.readline().decode().partition("data: ")
        for host in json.loads(data or "{}").get("hosts", ()):
            seen = host
    answer.close()
    connection.close()

    assert (seen["name"], seen["state"], seen["instances"]) == ("web-1", "serving", 1)


@together(
    ("words", "wanted"),
    [
        (("--peers", "x"), "--peers without --web"),
        (("--web", "127.0.0.1:0", "--peers-ca", "x"), "--peers-ca without --peers"),
        (("--web", "127.0.0.1:0", "--peers-token", "x"), "--peers-token without --peers"),
        (("--web", "127.0.0.1:0", "--peers", "/nowhere"), "--peers /nowhere: No such file"),
        (
            ("--web", "127.0.0.1:0", "--peers", __file__),
            f"--peers {__file__}: line 1: write [NAME]",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(words: tuple[str, ...], wanted: str) -> None:
    ended = run("--listen", "127.0.0.1:0", *words)

    assert (ended.status, len(ended.lines)) == (2, 1)
    assert f"socketprotector-exporter: {wanted}" in ended.err


def test_each_file_that_cannot_be_used_is_named(files: Files, tmp_path: Path) -> None:
    Path(files.peers).write_text("https://127.0.0.1:1")
    nothing = tmp_path / "nothing"
    nothing.touch(0o600)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for wrong, wanted in (
        (Files(str(fifo)), f"--peers {fifo}: a FIFO, but it is read again later"),
        (Files("/dev/zero"), "--peers /dev/zero: no regular file"),
        (Files(files.peers, str(fifo)), f"--peers-ca {fifo}: a FIFO"),
        (Files(str(binary)), f"--peers {binary}: no text in UTF-8"),
        (Files(files.peers, "/nowhere"), "--peers-ca /nowhere: No such file or directory"),
        (Files(files.peers, str(nothing)), f"--peers-ca {nothing}: no PEM certificate"),
        (Files(files.peers, None, str(nothing)), f"--peers-token {nothing}: no token"),
    ):
        with pytest.raises(UsageError) as refused:
            Peers(wrong, print)
        assert str(refused.value).startswith(wanted)
