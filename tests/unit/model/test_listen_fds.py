"""How a server learns of the listening sockets that it is handed, and what it says back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socketprotector.model import einhorn, listen_fds
from socketprotector.model.listen_fds import PlaceholderError
from socketprotector.model.settings import ListenerSettings, Settings
from tests.together import together

HTTP = ListenerSettings("tcp:[::]:80", text="http=80", name="http")
ADMIN = ListenerSettings("unix:/run/a", text="admin=unix:/run/a", name="admin")
GONE = ListenerSettings("tcp:127.0.0.1:8", text="8", name="8", removed=True)
NUMBERED = ListenerSettings("tcp:127.0.0.1:81", text="127.0.0.1:81?backlog=5", name="81")
SETTINGS = Settings(
    "x", ("server",), "/", handoff="listener", listeners=(HTTP, GONE, ADMIN, NUMBERED)
)


def test_listeners_have_the_numbers_from_3_on_and_removed_ones_none() -> None:
    assert listen_fds.descriptors(SETTINGS.listeners) == {0: 3, 2: 4, 3: 5}


def test_each_protocol_is_announced_its_own_way() -> None:
    assert listen_fds.listener_variables(SETTINGS.listeners) == {
        "LISTEN_FDS": "3",
        "LISTEN_FDNAMES": "http:admin:81",
        "SERVER_STARTER_PORT": "80=3;/run/a=4;127.0.0.1:81=5",
        "EINHORN_FD_COUNT": "3",
        "EINHORN_FDS": "3 4 5",
        "EINHORN_FD_0": "3",
        "EINHORN_FD_1": "4",
        "EINHORN_FD_2": "5",
    }
    assert listen_fds.listener_variables(())["LISTEN_FDS"] == "0"
    assert listen_fds.listener_variables([replace(HTTP, name="a:b")])["LISTEN_FDNAMES"] == "a_b"
    paths = [ListenerSettings(f"unix:/run/{name}") for name in ("a;b", "a=b", "c")]
    assert listen_fds.listener_variables(paths)["SERVER_STARTER_PORT"] == "/run/a=b=4;/run/c=5"


@together(
    ("word", "becomes"),
    [
        ("{fd:http}", "3"),
        ("fd://{fd:ADMIN}/", "fd://4/"),
        ("$(circus.sockets.Http)", "3"),
        ("((circus.sockets.admin))", "4"),
        ("{fd:81},{fd:http}", "5,3"),
        ("{fd:ready}", "9"),
        ("{fd}", "{fd}"),
        ("$(other)", "$(other)"),
    ],
)
def test_a_name_becomes_a_number(word: str, becomes: str) -> None:
    assert listen_fds.fill([word], SETTINGS.listeners, 9) == (becomes,)


@together(
    ("word", "said"),
    [
        ("{fd:web}", "there is: http, admin, 81; write NAME=LISTEN, as in web=4321"),
        ("{fd:8}", "{fd:8}: no listener has this name"),
        ("{fd:}", "as in http=4321"),
        ("{fd:ready}", "{fd:ready}: no listener has this name"),
        ("$(circus.sockets.x)", "$(circus.sockets.x): no listener"),
    ],
)
def test_a_name_that_nothing_has_is_refused(word: str, said: str) -> None:
    with pytest.raises(PlaceholderError) as refused:
        listen_fds.fill([word], SETTINGS.listeners)
    assert said in str(refused.value)


def test_a_name_of_two_listeners_is_refused_with_both() -> None:
    two = [HTTP, replace(NUMBERED, name="http")]
    with pytest.raises(PlaceholderError, match=r"2 listeners \(tcp:\[::\]:80, tcp:127.0.0.1:81\)"):
        listen_fds.fill(["{fd:http}"], two)


def test_a_line_that_says_ready_has_a_number_where_it_is_asked_for() -> None:
    asked = replace(SETTINGS, command=("server", "--notify={fd:ready}"))

    assert listen_fds.ready_fd(SETTINGS) == -1
    assert listen_fds.ready_fd(asked) == 6
    by_environment = replace(SETTINGS, environment=(("READY_FD", "{fd:ready}"),))
    assert listen_fds.ready_fd(by_environment) == 6
    assert listen_fds.ready_fd(replace(asked, ready="fd", ready_fd=12)) == 12
    assert listen_fds.ready_fd(replace(asked, handoff="connection")) == -1


def test_a_listener_called_ready_is_what_its_placeholder_means() -> None:
    called = replace(SETTINGS.listeners[0], name="Ready")
    one = replace(SETTINGS, command=("server", "{fd:ready}"), listeners=(called,))

    assert listen_fds.ready_fd(one) == -1
    assert listen_fds.fill(one.command, one.listeners) == ("server", "3")


@together(
    ("line", "pid"),
    [
        (b'{"command":"worker:ack", "pid":12}', 12),
        (b'{"pid":12,"command":"worker:ack"}', 12),
        (b'{"command":"worker:ack"}', 0),
        (b'{"command":"worker:ack", "pid":"12"}', 0),
        (b"---%0Acommand: worker:ack%0Apid: 123%0A", 123),
        (b"---%0A:command: worker:ack%0A:pid: 7%0A", 7),
        (b'---%0A"command": "worker:ack"', 0),
        (b'{"command":"worker:ping", "pid":12}', None),
        (b'{"command":"worker:ackx"}', None),
        (b"[" * 100_000, None),
        (b"command: worker:ack please", None),
        (b'["worker:ack"]', None),
        (b"\xff\xfe", None),
        (b"", None),
    ],
)
def test_einhorn_s_ack_is_known_in_both_of_its_forms(line: bytes, pid: int | None) -> None:
    assert einhorn.ack(line) == pid
