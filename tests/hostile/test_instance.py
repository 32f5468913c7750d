"""A false instance cannot hold up, fill or deceive what asks it, nor hide those that are good.

What never ends fails its test by the test's time limit.
"""

from __future__ import annotations

import ast
import math
import re
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from socketprotector.ctl import discovery, render
from socketprotector.ctl.client import Client
from socketprotector.ctl.errors import NoProtector
from socketprotector.ctl.query_all import query_all
from tests.hostile import instance as false
from tests.running import Ended, eventually
from tests.unit.ctl import fake as good
from tests.unit.ctl.fake import Fake

pytestmark = pytest.mark.timeout(60)

CTL = Path(__file__).parents[2] / "socketprotector" / "ctl"
WITHIN_S = 0.3
Ctl = Callable[..., Ended]


@pytest.mark.parametrize("behaviour", false.BEHAVIOURS)
def test_no_answer_of_one_is_waited_for_too_long(folder: Path, behaviour: str) -> None:
    behave = false.BEHAVIOURS[behaviour]
    with (
        false.instance(folder / "x.control", behave) as path,
        Client(path, WITHIN_S) as client,
        pytest.raises(NoProtector),
    ):
        client.request("status")


@pytest.mark.parametrize("behaviour", false.BEHAVIOURS)
def test_nor_are_its_events(folder: Path, behaviour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has answered the first request, and does its worst at the next."""

    def behave(send: false.Send) -> None:
        send(b'{"v":1,"id":1,"ok":true,"result":{}}\n')
        false.BEHAVIOURS[behaviour](send)

    with (
        false.instance(folder / "x.control", behave) as path,
        Client(path, 30.0, events=True) as client,  # its good answer may be late here
    ):
        monkeypatch.setattr(client, "_answer_s", WITHIN_S)
        try:
            found = client.event(WITHIN_S)
        except NoProtector:
            found = None
        assert (found is not None) == (behaviour == "events")
        with pytest.raises(NoProtector):
            client.request("reload")


@pytest.mark.parametrize("behaviour", ["events", "no_end_of_line"])
@pytest.mark.parametrize("follows", [False, True])
def test_one_that_says_more_than_a_protector_could_is_none_before_its_time_is_over(
    folder: Path, behaviour: str, follows: bool
) -> None:
    """So it cannot fill the memory meanwhile."""

    def behave(send: false.Send) -> None:
        if follows:
            send(b'{"v":1,"id":1,"ok":true,"result":{}}\n')
        false.BEHAVIOURS[behaviour](send)

    with (
        false.instance(folder / "x.control", behave) as path,
        Client(path, 30.0, events=follows) as client,
        pytest.raises(NoProtector) as refused,
    ):
        client.request("status")
    assert refused.value.code == "no protector"
    may_be_one = follows and behaviour == "events"
    assert ("the process there is not SocketProtector" in str(refused.value)) != may_be_one
    assert ("events came before the answer" in str(refused.value)) == may_be_one


def cuts(send: false.Send) -> None:
    """End the connection without an answer."""
    raise OSError


@pytest.mark.parametrize("behave", [false.silence, false.drops, cuts])
@pytest.mark.parametrize("follows", [False, True])
def test_no_wait_for_one_is_longer_than_its_command_has(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    behave: Callable[[false.Send], None],
    follows: bool,
) -> None:
    """--timeout bounds each wait: for an answer, and for a protector that is to come back."""
    monkeypatch.setattr("socketprotector.ctl.client.RETURN_S", 3600.0)
    with (
        false.instance(folder / "x.control", behave) as path,
        Client(path, 3600.0, until=time.monotonic() + WITHIN_S) as client,
    ):
        client._follows = follows
        with pytest.raises(NoProtector) as refused:
            client.query("status")
    assert refused.value.code == "silent"


class Endless(socket.socket):
    """There is always one more event to read; it ends a reader that reads on past its time."""

    until = math.inf
    late = 0

    def recvmsg(self, *_: object) -> tuple[bytes, list[Any], int, Any]:
        self.late += time.monotonic() > self.until
        assert self.late < 3, "it reads on"
        return false.EVENT, [], 0, None


def test_events_that_come_as_fast_as_they_are_read_put_no_deadline_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("socketprotector.ctl.client._MOST_EVENTS", 1 << 40)
    monkeypatch.setattr("socketprotector.ctl.client._MOST_EVENT_BYTES", 1 << 40)
    with Endless(socket.AF_UNIX) as endless:
        client = Client.__new__(Client)
        client.path, client._socket, client._follows, client._last_id = "x", endless, True, 1
        client._reset()
        endless.until = time.monotonic() + 0.05

        assert client.answer(endless.until) is None
        assert client.event(0.0) is not None, "the positive control"


def test_a_good_one_is_heard_beside_all_of_them(
    folder: Path, fakes: Callable[[str], Fake], ctl: Ctl
) -> None:
    names: list[str] = []
    fakes("good")
    good = str(folder / "good.control")
    with false_ones(folder, names):
        # They keep this very process busy: on a busy machine a try may be too late.
        def is_heard() -> bool:
            found = query_all([*names, good])
            answered = [each.path for each in found if each.result is not None]
            assert answered in ([], [good])
            return bool(answered)

        def is_listed() -> bool:
            return re.search(r"^good +serving", ctl("list").out, re.MULTILINE) is not None

        eventually(is_heard, "the answer of the good one")
        eventually(is_listed, "the good one in the list")


def test_answers_without_a_request_are_no_protectors(folder: Path) -> None:
    """One says so at once, and does not read on."""
    with (
        false.instance(folder / "x.control", false.other_answers) as path,
        Client(path) as client,
        pytest.raises(NoProtector) as refused,
    ):
        client.request("status")
    assert refused.value.code == "no protector"


def test_all_of_them_cannot_fill_the_memory_together(
    folder: Path, fakes: Callable[[str], Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more is read than all may send, the longest answers go, and the good one stays."""
    monkeypatch.setattr("socketprotector.ctl.client.LONGEST_LINE", 1 << 40)
    monkeypatch.setattr("socketprotector.ctl.query_all._MOST_BYTES", 300_000)
    fakes("good")
    with ExitStack() as stack:
        for name in "abc":
            path = folder / f"{name}.control"
            stack.enter_context(false.instance(path, false.no_end_of_line))
        found = {
            Path(each.path).stem: each.why
            for each in query_all(sorted(map(str, folder.glob("*.control"))), 60.0)
        }
    assert found == {**dict.fromkeys("abc", "no protector"), "good": ""}


def false_ones(folder: Path, names: list[str]) -> ExitStack:
    """One false instance of each kind."""
    stack = ExitStack()
    for name, behave in false.BEHAVIOURS.items():
        names.append(stack.enter_context(false.instance(folder / f"{name}.control", behave)))
    return stack


def test_many_events_before_an_answer_are_kept_as_long_as_a_protector_could_send_them(
    folder: Path,
) -> None:
    """The positive control: as many as fit into what a protector keeps for a client."""

    def behave(send: false.Send) -> None:
        send(b'{"v":1,"id":1,"ok":true,"result":{}}\n')
        send(false.EVENT * 19_000 + b'{"v":1,"id":2,"ok":true,"result":{"found":true}}\n')

    with (
        false.instance(folder / "x.control", behave) as path,
        Client(path, 30.0, events=True) as client,
    ):
        assert client.request("status") == {"found": True}
        for _ in range(19_000):
            assert client.event(0.0) is not None
        assert client.event(0.0) is None


# -- what reaches a terminal ------------------------------------------------------------------


def poisoned(value: object, key: str = "") -> Any:
    """Put escapes into each text of a message; words by which it is understood stay."""
    if isinstance(value, dict):
        return {name: poisoned(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each, key) for each in value]
    if isinstance(value, str) and key not in ("phase", "state", "result", "kind"):
        return value + false.ESCAPES
    return value


def everything() -> good.Message:
    """A status in which there is something of each kind."""
    serving = good.generation(8, "serving", good.worker(14, status="busy"), settle_check="failed")
    return good.status(
        serving,
        good.generation(9, "starting", good.worker(15, state="starting")),
        health=good.health("unhealthy", "500 from /healthz", "no database"),
        dry_run=good.reload(7, "failed", "exited with status 1; its last words:\nno such table"),
        reloads=[good.reload(9, "failed", "exited with status 1; its last words:\nno such table")],
        crashes=1,
        warnings=["something is missing"],
        lame_duck="on",
    )


@pytest.mark.parametrize(
    "command", ["status", "list", "history", "crashes", "connections", "ready", "reload", "diff"]
)
def test_no_text_of_one_drives_a_terminal(fake: Fake, ctl: Ctl, command: str) -> None:
    clean = everything()
    fake.status = clean
    answers = {
        "status": clean,
        "history": {"history": [good.entry("reload", 9, "failed", "exited\nno such table")]},
        "crashes": {"crashes": [good.crash()]},
        "connections": {"processes": [good.owner(4712)]},
        "diff": {"changes": ["settings.workers: 1 -> 2"]},
        "reload": {"generation": 9},
    }
    for name, result in answers.items():
        fake.answers[name] = lambda _, __, result=result: poisoned(result)  # type: ignore[misc]

    ended = ctl(command)

    said = ended.out + ended.err
    assert said, "the positive control: something was said"
    assert [each for each in said if not each.isprintable() and each != "\n"] == []
    if command == "status":
        assert "unhealthy for" in said
        assert "no database" in said


def test_texts_are_styled_in_one_place_which_escapes_them() -> None:
    """Whatever makes a text for the terminal elsewhere gives it no words."""
    wrong = [
        f"{path.name}:{node.lineno}"
        for path in sorted(CTL.glob("*.py"))
        if path.name != "render.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Text"
        and any(not isinstance(each, ast.Constant) for each in node.args)
    ]

    assert wrong == []
    assert render.styled(false.ESCAPES).plain.isprintable()


def test_the_tools_do_what_they_say(folder: Path) -> None:
    """The positive control of the false instance: what it says is heard by a plain client."""
    with (
        false.instance(folder / "x.control", false.saying({"a": 1})) as path,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(path)
        client.send(b"\n")
        assert b'"a": 1' in client.recv(4096)


@pytest.mark.parametrize("name", ["web;reboot", "$(reboot)", "a`b`", "a b", "a\nb", "a&b", "~x"])
def test_no_name_is_completed_that_a_shell_would_run(fake: Fake, name: str) -> None:
    """Beside one that is good, and completed."""
    assert discovery.names_with_prefix("") == ["web"]
    fake.status["name"] = name
    assert discovery.names_with_prefix("") == []
