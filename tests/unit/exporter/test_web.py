"""The page over HTTP: who gets it, what it never does, and server-sent events for many viewers."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
from socketprotector_exporter import web_hub
from socketprotector_exporter.web import VIEWERS, application
from socketprotector_exporter.web_hub import Hub

from tests.running import DEADLINE_S, eventually
from tests.together import together
from tests.unit.ctl.fake import Fake, Refusing, generation, reload, status, worker
from tests.unit.exporter.conftest import COMMAND, Exporter, run

Fakes = Callable[[str], Fake]
Starter = Callable[..., Exporter]
WEB = ("--web", "127.0.0.1:0")
PAGE = Path(__file__).parents[3] / "exporter" / "socketprotector_exporter" / "page"
#: Of the test's own instances: others may run on this machine, in /run.
NAMES = {"web", "late", "silent", "fine", "junk", "huge"}
SCRIPTS = ("events.js", "page.js")
FILES = ("/", "/page.css", *(f"/{script}" for script in SCRIPTS), "/icon.svg")


def ask(
    exporter: Exporter, path: str, method: str = "GET", host: str = "localhost"
) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body."""
    connection = connected(exporter)
    try:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read()
    finally:
        connection.close()


def connected(exporter: Exporter) -> http.client.HTTPConnection:
    where = exporter.page
    if not where.startswith("/"):
        return http.client.HTTPConnection(where.removeprefix("http://"), timeout=DEADLINE_S)
    connection = http.client.HTTPConnection("localhost", timeout=DEADLINE_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(DEADLINE_S)
    connection.sock.connect(where)
    return connection


class Viewer:
    """One that has the page open: what it knows by what it was told of the test's instances."""

    def __init__(self, exporter: Exporter) -> None:
        self._connection = connected(exporter)
        self._connection.request("GET", "/events")
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200, self._answer.read()
        self.hello: dict[str, Any] = {}
        self.instances: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.points: dict[str, Any] = {}

    def hear(self) -> None:
        """Take in one message."""
        name, data = "", ""
        while line := self._answer.readline().decode().rstrip("\n"):
            kind, _, value = line.partition(": ")
            name, data = (value, data) if kind == "event" else (name, value)
        told = json.loads(data) if data else {}
        if name == "hello":
            self.hello = told
        elif name == "state":
            mine = [each for each in told["instances"] if each["name"] in NAMES]
            self.instances |= {each["id"]: each for each in mine}
            self.events += [each for each in told["events"] if each["name"] in NAMES]
            points = told.get("points", {})
            self.points |= {n: each for n, each in points.items() if n in self.instances}
            if "ids" in told:
                self.instances = {n: v for n, v in self.instances.items() if n in told["ids"]}

    def until(self, fact: Callable[[Viewer], object]) -> None:
        """Hear until something is so."""
        until = time.monotonic() + DEADLINE_S
        while not fact(self):
            assert time.monotonic() < until, f"never told: {self.instances} {self.events}"
            self.hear()

    def one(self, name: str) -> dict[str, Any]:
        return next((each for each in self.instances.values() if each["name"] == name), {})

    def names(self) -> set[str]:
        return {each["name"] for each in self.instances.values()}

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


@pytest.fixture
def viewer() -> Iterator[Callable[[Exporter], Viewer]]:
    made: list[Viewer] = []

    def look(exporter: Exporter) -> Viewer:
        made.append(Viewer(exporter))
        return made[-1]

    yield look
    for each in made:
        each.close()


Look = Callable[[Exporter], Viewer]


def refused(*arguments: str) -> tuple[int, str]:
    ended = run("--listen", "127.0.0.1:0", *arguments)
    return ended.status, ended.err


# -- who gets it ---------------------------------------------------------------


@together("address", ["0.0.0.0:9433", "[::]:9433", ":9433", "192.0.2.1:9433", "example.org:9433"])
def test_an_address_that_others_reach_is_refused_in_words(address: str) -> None:
    code, said = refused("--web", address)

    assert code == 2
    assert said.count("\n") == 1
    assert f"--web {address}: the page has no log-in" in said
    assert "and a proxy with a log-in for other users" in said


@together(
    ("words", "wanted"),
    [
        (("--web", "127.0.0.1"), "write 127.0.0.1:9433"),
        (("--web", "127.0.0.1:70000"), "write 127.0.0.1:9433"),
        (("--web", "unix:here"), "an absolute path and its mode"),
        (("--web", "/tmp/x?mode=9"), "an absolute path and its mode"),
        (("--web", "/tmp/x?user=me"), "an absolute path and its mode"),
        (("--web-host", "page.example"), "--web-host without --web"),
    ],
)
def test_what_is_not_understood_is_refused(words: tuple[str, ...], wanted: str) -> None:
    code, said = refused(*words)

    assert code == 2
    assert wanted in said


def test_an_address_that_is_taken_is_a_failed_start(exporter: Starter) -> None:
    taken = exporter(*WEB).page.removeprefix("http://")

    code, said = refused("--web", taken)

    assert (code, said) == (
        111,
        f"socketprotector-exporter: --web {taken}: Address already in use\n",
    )


@pytest.mark.parametrize(("mode", "has"), [("", 0o600), ("?mode=0660", 0o660)])
def test_a_unix_socket_has_a_mode_and_is_gone_at_the_end(
    exporter: Starter, runtime: Path, mode: str, has: int
) -> None:
    path = runtime / "page"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    one = exporter("--web", f"{path}{mode}")

    assert one.page == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == has
    assert ask(one, "/")[0] == 200
    assert "Address already in use" in refused("--web", str(path))[1]
    assert one.end() == 0
    assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(runtime: Path) -> None:
    path = runtime / "page"
    path.write_text("mine")

    assert refused("--web", str(path))[0] == 111
    assert path.read_text() == "mine"


def test_only_names_of_this_machine_are_answered(exporter: Starter) -> None:
    one = exporter("--web", "127.2.3.4:0", "--web-host", "page.example.org")
    own = one.page.removeprefix("http://").rstrip("/")
    assert own.startswith("127.2.3.4:")
    port = own.rpartition(":")[2]
    ours = ("localhost", f"127.0.0.1:{port}", "[::1]:9", "LOCALHOST:1", "page.example.org", own)

    for host in ours:
        for path in (*FILES, "/none"):
            assert ask(one, path, host=host)[0] == (404 if path == "/none" else 200)
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1"):
        for path in (*FILES, "/events", "/none"):
            code, _, body = ask(one, path, host=host)
            assert code in (400, 403)
            assert b"instances" not in body


def test_what_it_runs_on_is_named_where_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError(name='starlette')")
    done = subprocess.run(
        [*COMMAND, *WEB],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "starlette is not installed; pip install 'socketprotector[web]'" in done.stderr


# -- what it never does --------------------------------------------------------


@pytest.mark.parametrize("path", [*FILES, "/events", "/none"])
def test_nothing_but_reading_is_possible(exporter: Starter, fakes: Fakes, path: str) -> None:
    fake = fakes("web")
    one = exporter(*WEB)

    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE", "BREW"):
        assert ask(one, path, method)[0] in (400, 404, 405)
    assert ask(one, path, "HEAD")[0] == (404 if path == "/none" else 200)
    eventually(lambda: "status" in fake.commands(), "a status")
    assert set(fake.commands()) == {"status", "events"}


def test_the_page_asks_for_nothing_from_elsewhere_and_runs_no_text() -> None:
    sources = {path.name: path.read_text() for path in PAGE.iterdir()}

    assert sum(len(each.encode()) for each in sources.values()) <= 50_000
    assert sorted(sources) == sorted(["icon.svg", "page.css", "page.html", *SCRIPTS])
    for name, source in sources.items():
        elsewhere = re.findall(r"https?://[^\"'\s]+", source)
        assert set(elsewhere) <= {"http://www.w3.org/2000/svg"}, name
    assert not re.search(
        r"<form|<button|method=|action=| on\w+=|style=|<script>", sources["page.html"]
    )
    makes_html = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\("
    sends = r"fetch\(|XMLHttp|sendBeacon|WebSocket"
    assert not [name for name in SCRIPTS if re.search(f"{makes_html}|{sends}", sources[name])]


def test_each_answer_says_what_a_browser_may_do_with_it(exporter: Starter) -> None:
    one = exporter(*WEB)
    for path in (*FILES, "/none"):
        headers = ask(one, path)[1]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


# -- viewers -------------------------------------------------------------------


def test_all_instances_are_told_and_those_that_come_and_go(
    exporter: Starter, fakes: Fakes, viewer: Look
) -> None:
    fakes("web")
    seen = viewer(exporter(*WEB))
    seen.until(lambda v: v.one("web").get("phase") == "serving")
    assert seen.hello["host"] == socket.gethostname()

    late = fakes("late")
    seen.until(lambda v: v.one("late").get("phase") == "serving")
    late.end()
    seen.until(lambda v: v.one("late")["why"] == "dead")
    assert seen.one("late")["phase"] == "serving"  # as it was last seen
    late.path.unlink()
    fakes("fine")
    seen.until(lambda v: v.names() == {"web", "late", "fine"})


def test_one_that_is_gone_stays_for_a_while(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_hub, "KEPT_S", 0.3)
    monkeypatch.setattr(web_hub, "_LOOK_FOR_S", 0.05)
    fake = fakes("web")
    paths, ids = [str(fake.path)], list[str]()

    async def follow() -> None:
        hub = Hub(lambda: list(paths))
        running = asyncio.create_task(hub.run())
        with hub.viewer() as news:

            async def shows(whys: set[str]) -> dict[str, Any]:
                async for message in hub.watch(news):
                    data = json.loads(message.partition(b"data: ")[2] or b"{}")
                    ids[:] = data.get("ids", ids)
                    for each in data.get("instances", []):
                        if each["why"] in whys:
                            return dict(each)
                raise AssertionError

            await shows({""})
            [connection] = fake.following()
            connection.event("stopped")
            paths.clear()
            fake.end()
            shown = await shows({"stopped"})
            assert ids == [shown["id"]]
            async for message in hub.watch(news):
                if b'"ids":[]' in message:
                    break
        running.cancel()

    asyncio.run(asyncio.wait_for(follow(), DEADLINE_S))


def test_an_event_is_told_and_the_status_is_asked_for_at_once(
    exporter: Starter, fakes: Fakes, viewer: Look
) -> None:
    fake = fakes("web")
    one = exporter(*WEB)
    seen = viewer(one)
    seen.until(lambda v: v.one("web").get("phase") == "serving")
    [line] = fake.following()
    asked = len(fake.asked)

    fake.status = status(generation(8), reloads=[reload(9, "failed", "why; its last words:\n<b>")])
    line.event("reload-failed", generation=9, reason="why", last_words="<b>")

    seen.until(lambda v: v.events)
    assert seen.events[0]["event"] == "reload-failed"
    assert (seen.events[0]["generation"], seen.events[0]["text"]) == (9, "reason=why")
    seen.until(lambda v: v.one("web").get("failed"))
    assert seen.one("web")["failed"]["words"] == "<b>"
    assert fake.commands()[asked:] == ["status"] * (len(fake.asked) - asked)
    # Who comes later is told of what has happened.
    later = viewer(one)
    later.until(lambda v: v.events and v.one("web"))
    assert later.events[0]["event"] == "reload-failed"
    assert later.one("web")["failed"]["generation"] == 9


def test_there_is_one_control_connection_however_many_viewers(
    exporter: Starter, fakes: Fakes, viewer: Look
) -> None:
    fake = fakes("web")
    one = exporter(*WEB)
    many = [viewer(one) for _ in range(20)]
    for each in many:
        each.until(lambda v: v.one("web").get("phase") == "serving")

    fake.following()[0].event("reloading")
    for each in many:
        each.until(lambda v: v.events)

    assert len(fake._connections) == 1
    assert fake.commands().count("events") == 1


def test_a_viewer_that_reads_nothing_delays_no_other(
    exporter: Starter, fakes: Fakes, viewer: Look, runtime: Path
) -> None:
    fake = fakes("web")
    one = exporter("--web", runtime / "page")  # where the kernel's buffers do not grow
    slow = connected(one)
    slow.request("GET", "/events")
    quick = viewer(one)
    quick.until(lambda v: v.one("web").get("phase") == "serving")
    [line] = fake.following()

    # Far more than the slow one's socket takes, each in a message of its own.
    many = [worker(each, status="z" * 80) for each in range(90)]
    told_bytes = 0
    for number in range(40):
        fake.status = status(
            generation(7, "draining", *many),
            generation(8, "serving", *many),
            reloads=[reload(number, "failed", f"{number}\n" + "x" * 100_000)],
        )
        line.event("reload-failed", generation=number)
        quick.until(lambda v: (v.one("web")["failed"] or {}).get("generation") == number)  # noqa: B023
        told_bytes += len(json.dumps(quick.one("web")))

    # And that one gets the newest state when it reads on, not all that it has missed.
    answer = slow.getresponse()
    told = b""
    while b'"generation":%d,' % number not in told:
        told += answer.readline()
    assert len(told) < told_bytes / 2
    assert told.count(b'"name":"web","at":') == number + 1  # but every event
    answer.close()
    slow.close()


def test_too_many_viewers_are_told_so(exporter: Starter, fakes: Fakes, viewer: Look) -> None:
    fakes("web")
    one = exporter(*WEB)
    for _ in range(64):
        viewer(one).until(lambda v: v.hello)

    code, _, body = ask(one, "/events")

    assert (code, body) == (503, b"there are already 64 viewers\n")
    assert ask(one, "/")[0] == 200


def test_of_many_viewers_that_come_at_once_no_more_are_served_either() -> None:
    async def come_at_once(count: int) -> list[int]:
        hub = Hub(list)
        page, told = application(hub), asyncio.Queue[int]()
        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "method": "GET", "path": "/events", "headers": headers}

        async def stay() -> NoReturn:
            await asyncio.Event().wait()
            raise AssertionError

        async def told_them(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                told.put_nowait(message["status"])

        async def come() -> None:
            await page(dict(scope), stay, told_them)

        viewers = [asyncio.create_task(come()) for _ in range(count)]
        codes = [await told.get() for _ in viewers]
        assert hub.viewers == VIEWERS
        for each in viewers:
            each.cancel()
        await asyncio.wait(viewers)
        assert hub.viewers == 0
        return codes

    codes = asyncio.run(asyncio.wait_for(come_at_once(VIEWERS + 26), DEADLINE_S))

    assert Counter(codes) == {200: VIEWERS, 503: 26}


def test_a_lost_connection_is_shown_and_made_again(
    exporter: Starter, fakes: Fakes, viewer: Look
) -> None:
    fake = fakes("web")
    seen = viewer(exporter(*WEB))
    seen.until(lambda v: v.one("web").get("phase") == "serving")

    fake.status["restarts"] = 1
    fake.cut_all()  # an upgrade

    seen.until(lambda v: v.one("web").get("restarts") == 1 and not v.one("web")["why"])


def test_one_that_does_not_answer_is_told_and_its_late_answer_counts(
    exporter: Starter, fakes: Fakes, viewer: Look
) -> None:
    silent, fine = fakes("silent"), fakes("fine")
    silent.answers["status"] = lambda *_: None
    seen = viewer(exporter(*WEB))

    seen.until(lambda v: v.one("fine").get("phase") == "serving")
    seen.until(lambda v: v.one("silent").get("why") == "silent")
    assert len(silent._connections) == 1
    [line] = silent.following()
    line.send({"v": 1, "id": "status", "ok": True, "result": silent.status})
    seen.until(lambda v: v.one("silent").get("phase") == "serving" and not v.one("silent")["why"])
    fine.end()


@pytest.mark.parametrize("code", ["denied", "busy"])
def test_a_refusal_is_told(exporter: Starter, fakes: Fakes, viewer: Look, code: str) -> None:
    fake = fakes("web")

    def refuse(*_: object) -> None:
        raise Refusing(code, "no")

    fake.answers["events"] = refuse
    seen = viewer(exporter(*WEB))

    seen.until(lambda v: v.one("web").get("why") == code)


def test_junk_is_no_protector_and_does_not_end_the_page(
    exporter: Starter, fakes: Fakes, viewer: Look
) -> None:
    junk, huge, fine = fakes("junk"), fakes("huge"), fakes("fine")
    junk.answers["status"] = lambda *_: {"generations": [{"number": {}, "wait_us": {"buckets": 3}}]}
    huge.answers["status"] = lambda *_: {"forwarded": 10**400}
    fine.answers["status"] = lambda *_: []  # type: ignore[assignment]
    fakes("web")
    seen = viewer(exporter(*WEB))

    seen.until(lambda v: v.one("web").get("phase") == "serving")
    seen.until(lambda v: v.one("huge").get("phase") == "unknown")
    seen.until(lambda v: v.one("fine").get("why") == "no protector")
    seen.until(lambda v: v.one("junk").get("phase") == "unknown")


def test_sparklines_move_on(exporter: Starter, fakes: Fakes, viewer: Look) -> None:
    fakes("web")
    seen = viewer(exporter(*WEB))
    seen.until(lambda v: v.points)

    [points] = seen.points.values()
    assert points["active"][-1] == 3


def test_nothing_is_loaded_that_it_does_not_need() -> None:
    code = "import sys, socketprotector_exporter.web; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()

    heavy = {"httptools", "jinja2", "numpy", "requests", "uvloop", "websockets", "wsproto"}
    assert not heavy & {each.partition(".")[0] for each in loaded}
