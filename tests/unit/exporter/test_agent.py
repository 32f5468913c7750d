"""HAProxy's agent-check: the words that it is answered with, and over the socket."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from typing import Any

import pytest

from socketprotector.exporter.agent import READY_S, Told, advise
from tests.running import DEADLINE_S
from tests.together import together
from tests.unit.ctl.fake import Fake, status
from tests.unit.exporter.conftest import Exporter

Start = Callable[..., Exporter]
Look = tuple[float, dict[str, Any]]
DUCK = {"lame_duck": "on"}
STOPPING = {"phase": "stopping", "lame_duck": "stopping"}


def told(*looks: Look) -> list[str]:
    """What HAProxy is told at these times of one instance, by one exporter."""
    before: Told | None = None
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


# -- over the socket ---------------------------------------------------------------


def agent_of(exporter: Exporter) -> tuple[str, int]:
    found = re.search(r"agent-checks at (\S+):(\d+)$", exporter.said.wait_for("agent-checks at"))
    assert found
    return found[1], int(found[2])


def check(agent: tuple[str, int], sent: bytes) -> bytes:
    """What HAProxy would read."""
    with socket.create_connection(agent, DEADLINE_S) as line:
        line.sendall(sent)
        line.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: line.recv(4096), b""))


def test_the_name_that_is_sent_picks_the_instance(
    exporter: Start, fakes: Callable[[str], Fake]
) -> None:
    fakes("web")
    fakes("shop").status = status(name="shop", **DUCK)
    fakes("dead").end()
    agent = agent_of(exporter("--agent", "127.0.0.1:0"))

    with socket.create_connection(agent):  # one that says nothing delays no other
        assert check(agent, b"web\n") == b"up ready 100%\n"
        assert check(agent, b"shop\n") == b"up drain\n"
        fakes("late").status["name"] = "late"
        assert check(agent, b"late\r\n") == b"up ready 100%\n"
        for no_answer in (
            b"dead\n",
            b"nowhere\n",
            b"../web\x00\n",
            b"web",
            b"\n",
            b"",
            b"w" * 400,
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
