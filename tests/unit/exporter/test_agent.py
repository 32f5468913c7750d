"""HAProxy's agent-check: the words that it is answered with, and over the socket."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from socketserver import BaseRequestHandler
from typing import Any

import pytest
from socketprotector_exporter import bounded
from socketprotector_exporter.agent import READY_S, Advice, Agent, advise
from socketprotector_exporter.bounded import CONNECTIONS, BoundedServer
from socketprotector_exporter.http import Server

from socketprotector.ctl.query_all import SocketAnswer
from tests.running import DEADLINE_S
from tests.scenarios.starting import needs_ipv6
from tests.together import together
from tests.unit.ctl.fake import Fake, status
from tests.unit.exporter.conftest import Exporter

Start = Callable[..., Exporter]
Look = tuple[float, dict[str, Any]]
DUCK = {"lame_duck": "on"}
STOPPING = {"phase": "stopping", "lame_duck": "stopping"}


def told(*looks: Look) -> list[str]:
    """What HAProxy is told at these times of one instance, by one exporter."""
    before: Advice | None = None
    lines = []
    for now_s, more in looks:
        before, line = advise(before, status(**more), now_s)
        lines.append(line)
    return lines


def test_ready_is_said_for_a_minute_after_the_first_look_and_no_longer() -> None:
    """Longer, it would undo what an operator has set in HAProxy."""
    assert told((1000, {}), (1000 + READY_S - 1, {}), (1000 + READY_S, {}), (2000, {})) == [
        "up ready 100%",
        "up ready 100%",
        "up 100%",
        "up 100%",
    ]


@pytest.mark.parametrize("duck", [DUCK, STOPPING])
def test_only_a_drain_of_ours_is_undone_once_it_is_over(duck: dict[str, Any]) -> None:
    looks: tuple[Look, ...] = (
        (0, {}),
        (100, {}),
        (200, duck),
        (999, duck),
        (2000, {}),
        (2059, {}),
        (2060, {}),
    )
    assert told(*looks) == [
        "up ready 100%",
        "up 100%",
        "up drain",
        "up drain",
        "up ready 100%",
        "up ready 100%",
        "up 100%",
    ]


def test_one_that_is_started_anew_is_ready_from_its_first_good_look_on() -> None:
    """Who drained it may have been an exporter that is gone, as before a reboot."""
    later = {"started_at": 777.0}
    starting = {**later, "phase": "starting", "route": None}

    looks: tuple[Look, ...] = (
        (0, {}),
        (100, {}),
        (200, starting),
        (500, starting),
        (600, later),
        (700, later),
    )
    assert told(*looks) == [
        "up ready 100%",
        "up 100%",
        "down #starting",
        "down #starting",
        "up ready 100%",
        "up 100%",
    ]


def test_one_that_serves_nobody_for_a_while_is_down_and_no_drain_is_undone() -> None:
    waiting = {"phase": "waiting", "route": None}

    assert told((0, {}), (100, {}), (200, waiting), (300, {})) == [
        "up ready 100%",
        "up 100%",
        "down #waiting",
        "up 100%",
    ]


def test_a_hold_is_ready_for_its_clients_wait() -> None:
    assert told((0, {}), (100, {"held_s": 3.0})) == ["up ready 100%", "up 100%"]


@together("phase", ["no such phase", "x\ny", "a" * 99, 7, None])
def test_the_word_is_a_word_whatever_the_status_says(phase: object) -> None:
    assert told((0, {"phase": phase, "route": None})) == ["down #not-serving"]


class Said:
    """Instances that answer, without a process."""

    def __init__(self) -> None:
        self.status = {"web": status(), "shop": status(name="shop")}

    def query_one(self, name: str) -> list[tuple[str, SocketAnswer | None]]:
        return [(name, SocketAnswer(f"/run/{name}", self.status.get(name), why="dead"))]


@pytest.fixture
def agent() -> Iterator[Agent]:
    """One in this process, whose clock stands at `now_s`, and which no limit of time helps on."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("socketprotector_exporter.agent.CONNECTION_S", 3600.0)
        patched.setattr("socketprotector_exporter.bounded.CONNECTION_S", 3600.0)
        with Agent(("127.0.0.1", 0), Said(), lambda: Clock.now_s) as made:  # type: ignore[arg-type]
            Clock.now_s = 1000.0
            with serving(made):
                yield made


@contextlib.contextmanager
def serving(server: BoundedServer) -> Iterator[None]:
    """It serves in this process."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield
    server.shutdown()
    thread.join()


class Clock:
    now_s = 0.0


def test_what_haproxy_was_told_is_remembered_of_each_instance(agent: Agent) -> None:
    assert agent.answer("web") == "up ready 100%"
    Clock.now_s += READY_S

    assert agent.answer("web") == "up 100%"
    assert agent.answer("shop") == "up ready 100%"
    assert agent.answer("web") == "up 100%"


# -- over the socket ---------------------------------------------------------------


def agent_of(exporter: Exporter) -> tuple[str, int]:
    found = re.search(r"agent-checks at (\S+):(\d+)$", exporter.said.wait_for("agent-checks at"))
    assert found
    return found[1].strip("[]"), int(found[2])


def check(agent: tuple[str, int], sent: bytes) -> bytes:
    """What HAProxy would read."""
    with socket.create_connection(agent, DEADLINE_S) as line:
        line.sendall(sent)
        line.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: line.recv(4096), b""))


def at(agent: BoundedServer) -> tuple[str, int]:
    return "127.0.0.1", agent.server_address[1]


def test_as_many_can_ask_at_the_same_moment_as_are_answered() -> None:
    with contextlib.ExitStack() as opened:
        agent = opened.enter_context(Agent(("127.0.0.1", 0), Said()))  # type: ignore[arg-type]

        for _ in range(CONNECTIONS):  # it does not accept yet
            opened.enter_context(socket.create_connection(at(agent), DEADLINE_S))


def test_a_client_that_says_nothing_delays_no_other(agent: Agent) -> None:
    with socket.create_connection(at(agent), DEADLINE_S):
        assert check(at(agent), b"web\n") == b"up ready 100%\n"


def test_a_name_that_does_not_end_is_not_read_to_its_end(agent: Agent) -> None:
    with socket.create_connection(at(agent), DEADLINE_S) as line:
        line.sendall(b"w" * 300)  # it says no more, and goes on listening

        with contextlib.suppress(ConnectionResetError):  # of what was not read
            assert line.recv(4096) == b""


@pytest.mark.parametrize("address", ["127.0.0.1:0", pytest.param("[::1]:0", marks=needs_ipv6)])
def test_the_name_that_is_sent_picks_the_instance(
    exporter: Start, fakes: Callable[[str], Fake], address: str
) -> None:
    fakes("web")
    fakes("shop").status = status(name="shop", **DUCK)
    fakes("\u00fc web").status["name"] = "\u00fc web"
    fakes("dead").end()
    agent = agent_of(exporter("--agent", address))

    assert check(agent, b"web\n") == b"up ready 100%\n"
    assert check(agent, b"shop\n") == b"up drain\n"
    assert check(agent, "\u00fc web\n".encode()) == b"up ready 100%\n"
    fakes("late").status["name"] = "late"
    assert check(agent, b"late\r\n") == b"up ready 100%\n"
    for no_answer in (
        b"dead\n",
        b"nowhere\n",
        b"../web\x00\n",
        b"web",
        b"\n",
        b"",
        b"\xff\n",
        b"*\n",
    ):
        assert check(agent, no_answer) == b"", no_answer


def test_one_that_does_not_answer_keeps_what_haproxy_knows(
    exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    web = fakes("web")
    agent = agent_of(exporter("--agent", "127.0.0.1:0"))
    web.status = status(**STOPPING)
    assert check(agent, b"web\n") == b"up drain\n"

    web.answers["status"] = lambda connection, _: connection.cut()

    assert check(agent, b"web\n") == b""


def test_only_that_a_client_has_gone_away_is_not_said(capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with the exporter itself is: its checks fail without a reason otherwise."""
    with BoundedServer(("127.0.0.1", 0), BaseRequestHandler) as server:
        for error in (ConnectionResetError("gone"), TimeoutError("slow"), KeyError("injected")):
            try:
                raise error
            except Exception:
                server.handle_error(None, ("127.0.0.1", 1))

    said = capsys.readouterr().err
    assert "KeyError: 'injected'" in said
    assert "ConnectionResetError" not in said
    assert "TimeoutError" not in said


# -- when all places are taken ------------------------------------------------------


class Slow(Said):
    """Its answers are made when the test says so, and are longer than a connection takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.may = threading.Semaphore(0), threading.Event()

    def unready(self, name: str) -> tuple[list[str], list[str]]:
        if name == "slow":
            self.asked.release()
            assert self.may.wait(DEADLINE_S)
        return (["x" * (12 << 20)] if name == "long" else []), []


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many places there are; no limit of time helps on."""
    monkeypatch.setattr(bounded, "CONNECTIONS", 3)
    monkeypatch.setattr(bounded, "CONNECTION_S", 3600.0)
    return 3


@pytest.fixture
def slow() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.may.set()


@pytest.fixture
def web(few: int, slow: Slow) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), slow, None) as made, serving(made):  # type: ignore[arg-type]
        yield made


def ready(server: Server, name: str = "") -> bytes:
    """Ask as a balancer does."""
    return check(at(server), f"GET /readyz{name} HTTP/1.0\r\n\r\n".encode())


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET /readyz HTTP/1.1\r\nA: b\r\n", b"GET /readyz/long HTTP/1.0\r\n\r\n"],
    ids=["silent", "begun", "reads nothing"],
)
def test_a_balancer_is_answered_however_many_clients_are_waited_for(
    web: Server, few: int, begun: bytes
) -> None:
    with contextlib.ExitStack() as opened:
        for _ in range(few + 1):
            client = opened.enter_context(socket.create_connection(at(web), DEADLINE_S))
            client.sendall(begun)
            if b"long" in begun:
                client.recv(1)  # its answer is made, and waits for it
        for _ in range(3):
            assert ready(web).endswith(b"\r\n\r\nok\n")


def test_a_target_in_absolute_form_is_understood(web: Server) -> None:
    for target in ("http://web.example:9117/readyz", "HTTP://[::1]/readyz?health"):
        answer = check(at(web), f"GET {target} HTTP/1.0\r\n\r\n".encode())
        assert answer.endswith(b"\r\n\r\nok\n")
    for target in ("http://web.example", "http://web.example?a=/readyz", "ftp://a/readyz"):
        answer = check(at(web), f"GET {target} HTTP/1.0\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.0 404 ")


def test_haproxy_is_answered_however_many_clients_are_waited_for(few: int) -> None:
    with (
        Agent(("127.0.0.1", 0), Said()) as agent,  # type: ignore[arg-type]
        serving(agent),
        contextlib.ExitStack() as opened,
    ):
        for _ in range(few + 1):
            opened.enter_context(socket.create_connection(at(agent), DEADLINE_S)).sendall(b"w")
        for _ in range(3):
            assert check(at(agent), b"web\n") == b"up ready 100%\n"


def test_what_is_cut_off_is_the_one_that_is_waited_for_the_longest_and_no_answer(
    web: Server, few: int, slow: Slow
) -> None:
    with contextlib.ExitStack() as opened:

        def client(sent: bytes) -> socket.socket:
            made = opened.enter_context(socket.create_connection(at(web), DEADLINE_S))
            made.sendall(sent)
            return made

        asking = client(b"GET /readyz/slow HTTP/1.0\r\n\r\n")
        assert slow.asked.acquire(timeout=DEADLINE_S)
        oldest, younger = client(b""), client(b"GET /readyz HTTP/1.0\r\n")

        assert ready(web).endswith(b"ok\n")
        assert oldest.recv(1) == b""
        younger.sendall(b"\r\n")
        assert younger.recv(15) == b"HTTP/1.0 200 OK"
        slow.may.set()
        assert asking.recv(15) == b"HTTP/1.0 200 OK"


def test_one_more_than_are_being_answered_is_closed(web: Server, few: int, slow: Slow) -> None:
    with contextlib.ExitStack() as opened:
        for _ in range(few):
            client = opened.enter_context(socket.create_connection(at(web), DEADLINE_S))
            client.sendall(b"GET /readyz/slow HTTP/1.0\r\n\r\n")
        for _ in range(few):
            assert slow.asked.acquire(timeout=DEADLINE_S)

        with socket.create_connection(at(web), DEADLINE_S) as more:
            assert more.recv(1) == b""


def test_no_name_server_is_asked_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer would keep the exporter from starting for 20 s."""
    asked: list[object] = []
    monkeypatch.setattr(socket, "getfqdn", asked.append)

    Server(("127.0.0.1", 0), Said(), None).server_close()  # type: ignore[arg-type]

    assert not asked
