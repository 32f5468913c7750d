"""The client against servers that are slow, rude, or no protectors at all."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from socketprotector.ctl import client as module
from socketprotector.ctl.client import Client
from socketprotector.ctl.errors import ConnectionLost, NoProtector, RequestRefused
from socketprotector.ctl.query_all import query_all
from tests.running import DEADLINE_S
from tests.unit.ctl.fake import (
    Connection,
    Fake,
    Message,
    Refusing,
    generation,
    status,
    worker,
)

Says = Callable[[bytes], str]
LONG = ["x" * 1000] * 3800  # the workers of a reload of 1,900


@pytest.fixture
def says(tmp_path: Path) -> Iterator[Says]:
    """A server that says the same to each client, and hangs up."""
    ends: list[Callable[[], None]] = []

    def start(what: bytes) -> str:
        path = str(tmp_path / f"s{len(ends)}")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    try:
                        sock.sendall(what)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve)
        thread.start()

        def end() -> None:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            listener.close()

        ends.append(end)
        return path

    yield start
    for end in ends:
        end()


def test_events_in_between_are_kept_in_order(fake: Fake) -> None:
    def answer(connection: object, asked: dict[str, object]) -> dict[str, object]:
        connection.event("one")  # type: ignore[attr-defined]
        connection.event("two")  # type: ignore[attr-defined]
        return {"workers": 3}

    fake.answers["scale"] = answer
    with Client(str(fake.path), events=True) as client:
        assert client.request("scale", to=3) == {"workers": 3}
        assert [client.event(1) for _ in range(2)] != [None, None]
        assert client.event(0) is None


def test_a_no_keeps_its_code(fake: Fake) -> None:
    def answer(*_: object) -> None:
        raise Refusing("unknown", "no generation 7")

    fake.answers["kill"] = answer
    with (
        Client(str(fake.path)) as client,
        pytest.raises(RequestRefused, match="no generation 7") as failure,
    ):
        client.request("kill", generation=7)

    assert (failure.value.code, failure.value.status) == ("unknown", 100)


def test_denied_is_heard_although_the_connection_is_closed_already(says: Says) -> None:
    path = says(b'{"v": 1, "id": null, "ok": false, "code": "denied", "error": "not for you"}\n')

    with Client(path) as client, pytest.raises(RequestRefused, match="not for you") as refused:
        client.request("status")
    assert refused.value.code == "denied"
    assert query_all([path])[0].why == "denied"


@pytest.mark.parametrize("what", [b"SSH-2.0\r\n", b"[1]\n", b"\xff\xfe\n"])
def test_another_server_is_found_out(what: bytes, says: Says) -> None:
    path = says(what)

    with Client(path) as client, pytest.raises(NoProtector, match="not SocketProtector"):
        client.request("status")
    assert query_all([path])[0].why == "no protector"


def test_the_status_of_thousands_of_workers_is_no_other_servers_answer(says: Says) -> None:
    path = says(
        json.dumps({"v": 1, "id": 1, "ok": True, "result": {"workers": LONG}}).encode() + b"\n"
    )

    with Client(path) as client:
        assert client.request("status") == {"workers": LONG}


def test_several_protectors_of_thousands_of_workers_answer_at_once(says: Says) -> None:
    paths = []
    for number in range(4):
        line = json.dumps({"v": 1, "id": 1, "ok": True, "result": {"name": number, "x": LONG}})
        paths.append(says(line.encode() + b"\n"))

    assert [each.why for each in query_all(paths, DEADLINE_S)] == [""] * 4


def test_a_line_without_end_is_not_kept(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_LINE", 100_000)

    with (
        Client(says(b"x" * 200_000)) as client,
        pytest.raises(NoProtector, match="not SocketProtector"),
    ):
        client.request("status")


def test_no_answer_is_reported_in_time(fake: Fake) -> None:
    for command in ("status", "diff", "upgrade", "scale"):
        fake.answers[command] = lambda *_: None

    with Client(str(fake.path), answer_s=0.1) as client:
        with pytest.raises(NoProtector, match=r"'status' .* See its log\.$") as failure:
            client.request("status")
        assert not isinstance(failure.value, ConnectionLost)
        with pytest.raises(NoProtector, match=r"'diff' .* See its log\.$"):
            client.request("diff")
        with pytest.raises(NoProtector, match=r"'upgrade' .* See its log\.$"):
            client.request("upgrade", check=True)
        with pytest.raises(
            NoProtector, match=r"'scale' within .* may still carry out the request$"
        ):
            client.request("scale", to=2)


def test_a_cut_connection_is_an_error_of_its_own(fake: Fake) -> None:
    with Client(str(fake.path)) as client:
        client.request("status")
        fake.cut_all()
        with pytest.raises(ConnectionLost):
            client.event(5)


def test_a_client_comes_back_and_follows_again(fake: Fake) -> None:
    with Client(str(fake.path), events=True) as client:
        fake.cut_all()
        with pytest.raises(ConnectionLost):
            client.event(5)
        assert client.reconnect()["name"] == "web"
        fake.cut_all()

        assert client.query("status")["name"] == "web"
    assert fake.commands() == ["events", *["events", "status"] * 2, "status"]


def test_a_client_that_was_not_let_back_in_tries_again_at_the_next_request(tmp_path: Path) -> None:
    first = Fake(tmp_path / "web.control")
    with Client(str(first.path), events=True) as client:
        first.end()
        with pytest.raises(NoProtector, match="no process listens there any more"):
            client.reconnect(0.1)
        with pytest.raises(ConnectionLost):
            client.request("status")
        with pytest.raises(ConnectionLost):
            client.event(0.0)
        first.path.unlink()
        second = Fake(first.path)
        try:
            assert client.query("status")["name"] == "web"
        finally:
            second.end()


def test_a_client_that_may_no_longer_follow_does_not_go_on_without_events(fake: Fake) -> None:
    def refuse(*_: object) -> None:
        raise Refusing("denied", "no events for you")

    with Client(str(fake.path), events=True) as client:
        fake.cut_all()
        fake.answers["events"] = refuse

        with pytest.raises(RequestRefused, match="no events for you"):
            client.reconnect()


def test_the_pids_of_a_status_are_ours_if_its_sender_has_that_pid(fake: Fake) -> None:
    """A protector in a container, as seen from outside, has another pid than it says."""
    with Client(str(fake.path)) as client:
        assert client.shares_pids(client.request("status"))
        fake.status["pid"] = 1
        assert not client.shares_pids(client.request("status"))


def test_a_client_asks_again_as_often_as_it_is_cut(fake: Fake) -> None:
    """As when a crash follows an upgrade."""
    cuts = iter(range(3))

    def answer(connection: Connection, _: Message) -> Message | None:
        if next(cuts, None) is None:
            return {"until_at": 205.0}
        connection.cut()
        return None

    fake.answers["hold"] = answer
    with Client(str(fake.path)) as client:
        assert client.query("hold", seconds=5.0) == {"until_at": 205.0}
    assert fake.commands().count("hold") == 4


def test_after_a_short_wait_to_come_back_an_answer_has_its_usual_time(fake: Fake) -> None:
    """As after a stop, when a guard has started the protector again."""
    with Client(str(fake.path)) as client:
        fake.cut_all()
        client.reconnect(0.2)

        def answer(*_: object) -> Message:
            time.sleep(0.5)
            return {"workers": 3}

        fake.answers["scale"] = answer

        assert client.request("scale", to=3) == {"workers": 3}


def test_a_short_wait_to_come_back_limits_the_connection_and_not_a_slow_answer(fake: Fake) -> None:
    """As top needs it: with a limit for both, no later attempt would succeed either."""

    def answer(*_: object) -> Message:
        time.sleep(0.3)
        return fake.status

    with Client(str(fake.path)) as client:
        fake.cut_all()
        fake.answers["status"] = answer

        assert client.reconnect(0.1, answer_s=10.0)["name"] == "web"
        fake.answers["status"] = lambda *_: None
        before = len(fake.asked)
        with pytest.raises(NoProtector, match=r"within 100ms .*no answer .* within 300ms"):
            client.reconnect(0.1, answer_s=0.3)
    assert len(fake.asked) == before + 1


def test_a_survey_asks_all_at_once(tmp_path: Path) -> None:
    made = [Fake(tmp_path / f"{n}") for n in range(20)]
    try:
        for each in made[:10]:
            each.answers["status"] = lambda *_: None
        found = query_all([str(each.path) for each in made], within_s=0.5)
    finally:
        for each in made:
            each.end()

    assert [each.why for each in found] == ["silent"] * 10 + [""] * 10


def test_an_answer_in_a_survey_may_come_in_parts(fake: Fake) -> None:
    """An answer of 300 KB is more than a socket holds, so its first part is read alone."""
    fake.status = status(generation(1, "serving", *(worker(number) for number in range(1000))))

    [found] = query_all([str(fake.path)], DEADLINE_S)

    assert (found.why, found.result) == ("", fake.status)
