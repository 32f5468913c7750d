"""Socket options after the `?` of a TCP listener: on it, its connections and its sibling.

What the kernel answers, from real sockets.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from socketprotector.launch import socket_options
from socketprotector.launch.bind import Bound, bind_all
from socketprotector.launch.listen_spec import parse
from socketprotector.model.errors import SystemRefused, UsageError
from socketprotector.system import reuseport
from socketprotector.system.listener import accept_of
from socketprotector.system.listeners import listener_of
from tests import needs
from tests.together import together

SOCKET, TCP, IP, IPV6 = (
    socket.SOL_SOCKET,
    socket.IPPROTO_TCP,
    socket.IPPROTO_IP,
    socket.IPPROTO_IPV6,
)
HOSTS = ["127.0.0.1", "[::1]"]
#: What is asked for, where it is seen, as what.
SEEN = [
    ("nodelay=1", TCP, socket.TCP_NODELAY, 1),
    ("keepalive", SOCKET, socket.SO_KEEPALIVE, 1),
    ("keepalive=7", TCP, socket.TCP_KEEPIDLE, 7),
    ("keepalive=7:3:2", TCP, socket.TCP_KEEPINTVL, 3),
    ("keepalive=::2", TCP, socket.TCP_KEEPCNT, 2),
    ("user_timeout=1500ms", TCP, socket.TCP_USER_TIMEOUT, 1500),
    ("user_timeout=2m", TCP, socket.TCP_USER_TIMEOUT, 120_000),
    ("user_timeout=2m30s", TCP, socket.TCP_USER_TIMEOUT, 150_000),
    ("user_timeout=4", TCP, socket.TCP_USER_TIMEOUT, 4000),
    ("rcvbuf=20000", SOCKET, socket.SO_RCVBUF, 40_000),
    ("sndbuf=30000", SOCKET, socket.SO_SNDBUF, 60_000),
    ("tos=0x10", IP, socket.IP_TOS, 0x10),
    ("priority=5", SOCKET, socket.SO_PRIORITY, 5),
]
NEEDS_RIGHTS = [
    ("mark=0xfffffff1", SOCKET, socket.SO_MARK, -15),
    ("transparent=1", IP, socket.IP_TRANSPARENT, 1),
]


@pytest.fixture
def bound(request: pytest.FixtureRequest) -> Iterator[Bound]:
    """A listener for an argument."""
    [found] = bind_all([parse(request.param, "/")], 16, notice=lambda text: None)
    yield found
    found.discard()


def accepted(bound: Bound) -> socket.socket:
    """Accept as the forwarder does."""
    listener = listener_of(os.dup(bound.socket.fileno()), 0, bound.settings)
    listener.socket.setblocking(True)
    with socket.create_connection(bound.socket.getsockname()[:2]):
        fd, _ = accept_of(listener)()
    listener.socket.close()
    return socket.socket(fileno=fd)


@pytest.mark.parametrize(
    ("bound", "level", "option", "value"),
    [
        (f"{host}:0?{asked}", *seen)
        for host in HOSTS
        for asked, *seen in SEEN
        if (host, asked) != ("[::1]", "tos=0x10")
    ]
    + [("[::1]:0?tos=0x10", IPV6, socket.IPV6_TCLASS, 0x10)],
    indirect=["bound"],
)
def test_an_accepted_connection_has_it(bound: Bound, level: int, option: int, value: int) -> None:
    with accepted(bound) as one:
        assert one.getsockopt(level, option) == value


@needs.ROOT
@pytest.mark.parametrize(
    ("bound", "level", "option", "value"),
    [(f"127.0.0.1:0?{asked}", *seen) for asked, *seen in NEEDS_RIGHTS],
    indirect=["bound"],
)
def test_so_what_needs_a_right_that_we_have(
    bound: Bound, level: int, option: int, value: int
) -> None:
    assert bound.socket.getsockopt(level, option) == value


@pytest.mark.parametrize("bound", ["127.0.0.1:0?fastopen=7&congestion=reno"], indirect=True)
def test_the_queue_of_fast_opens_and_the_algorithm_are_the_listeners(bound: Bound) -> None:
    assert bound.socket.getsockopt(TCP, socket.TCP_FASTOPEN) == 7
    found = bound.socket.getsockopt(TCP, socket.TCP_CONGESTION, 16)
    assert found.rstrip(b"\0") == b"reno"


@pytest.mark.parametrize(
    "bound",
    [
        f"{host}:0?"
        + "&".join(each[0] for each in (*SEEN[:1], *SEEN[3:4], *SEEN[6:7], *SEEN[8:-1]))
        for host in HOSTS
    ],
    indirect=True,
)
def test_a_second_socket_for_the_address_has_what_the_first_has(bound: Bound) -> None:
    if bound.socket.family == socket.AF_INET6:  # systemd sets it in a socket that is passed in
        bound.socket.setsockopt(IPV6, socket.IPV6_UNICAST_HOPS, 7)
    second = reuseport.make(bound.socket)
    assert second is not None
    with second:
        for level, option in [(level, option) for _, level, option, _ in SEEN[:-1]]:
            assert second.getsockopt(level, option) == bound.socket.getsockopt(level, option)
        if second.family == socket.AF_INET6:
            assert second.getsockopt(IPV6, socket.IPV6_TCLASS) == 0x10
            assert second.getsockopt(IPV6, socket.IPV6_UNICAST_HOPS) == 7


@together(
    ("asked", "what"),
    [
        ("nodelay=2", "nodelay must be 0 or 1"),
        ("nodelay", "nodelay must be 0 or 1"),
        (
            "keepalive=x",
            "keepalive must be IDLE:INTERVAL:COUNT, the times in seconds; each may be empty",
        ),
        ("keepalive=0", "keepalive must be IDLE"),
        ("keepalive=1:2:3:4", "keepalive must be IDLE"),
        ("keepalive=40000", "keepalive must be IDLE"),
        (
            "user_timeout=0",
            "user_timeout must be a time from 1ms to 24d, like 500ms, 30s or 1h30m",
        ),
        ("user_timeout=soon", "user_timeout must be a time"),
        ("user_timeout=25d", "user_timeout must be a time"),
        ("user_timeout=99999999", "user_timeout must be a time"),
        ("rcvbuf=0", "rcvbuf must be a whole number above 0"),
        ("sndbuf=-1", "sndbuf must be a whole number above 0"),
        ("fastopen=many", "fastopen must be a whole number above 0"),
        ("mark=0x100000000", "mark must be a number from 0 to 0xffffffff"),
        ("priority=16", "priority must be a number from 0 to 15"),
        ("tos=256", "tos must be a number from 0 to 255, like 0x10"),
        ("tos=٣", "tos must be a number"),
        ("transparent=yes", "transparent must be 0 or 1"),
        ("congestion=", "congestion must be the name of an algorithm, like cubic"),
        ("congestion=an-algorithm-with-a-long-name", "congestion must be the name"),
        ("defer_accept=0", "defer_accept must be a whole number above 0"),
        ("device=", "device must be a name, like eth0"),
        ("v6only=0x1", "v6only must be 0 or 1"),
        ("nonblock=0x1", "nonblock must be 0 or 1"),
        ("sndbuf=1_0", "sndbuf must be a whole number above 0"),
        ("keepalive=٣", "keepalive must be"),
        ("user_timeout=٣", "user_timeout must be"),
        ("user_timeout=1_0s", "user_timeout must be"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_words(asked: str, what: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(f"1?{asked}", "/")

    assert str(refused.value).startswith(f"1?{asked}: {what}")


@pytest.mark.parametrize(("asked", "backlog"), [("0x10", 16), ("010", 10)])
def test_whatever_number_is_allowed_is_understood(asked: str, backlog: int) -> None:
    assert parse(f"1?backlog={asked}", "/").backlog(7) == backlog


@pytest.mark.parametrize(
    "said",
    [
        "congestion=none: No such file or directory; see the sysctl",
        "keepalive=7:3:999: Invalid argument; see the manual page tcp(7)",
    ],
)
def test_what_the_kernel_does_not_have_is_refused_with_where_to_look(said: str) -> None:
    asked = said.partition(": ")[0]
    with pytest.raises(SystemRefused) as refused:
        bind_all([parse(f"127.0.0.1:0?{asked}", "/")], 16, notice=lambda text: None)

    assert said in str(refused.value)


@pytest.mark.parametrize("asked", [each[0] for each in NEEDS_RIGHTS])
def test_what_one_may_not_is_refused_with_the_right_that_is_missing(asked: str) -> None:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            bind_all([parse(f"127.0.0.1:0?{asked}", "/")], 16, notice=lambda text: None)
        except SystemRefused as refused:
            os.write(send, str(refused).encode())
        finally:
            os._exit(0)
    os.close(send)
    with open(receive, encoding="utf-8") as file:
        said = file.read()
    os.waitpid(child, 0)

    assert f"{asked}: Operation not permitted; it needs CAP_NET_ADMIN: start as root" in said


def test_each_option_is_tried_here_or_where_it_was_before() -> None:
    tried = {each[0].partition("=")[0] for each in (*SEEN, *NEEDS_RIGHTS)}
    elsewhere = {"backlog", "defer_accept", "device", "freebind", "nonblock", "v6only"}

    assert tried | elsewhere | {"congestion", "fastopen"} == set(socket_options.OPTIONS)
