"""The variables of connections that a machine does not make for every test."""

from __future__ import annotations

import os
import socket

from socketprotector.programs.stdio.environment import Environments, path_of, tcp, unix
from tests.together import together


def test_an_ipv4_client_of_an_ipv6_socket_is_an_ipv4_client() -> None:
    said = tcp(("::ffff:10.0.0.1", 80), ("::ffff:10.0.0.2", 999))

    assert said == tcp(("10.0.0.1", 80), ("10.0.0.2", 999))
    assert said[b"PROTO"] == b"TCP"
    assert said[b"REMOTE_ADDR"] == b"10.0.0.2"


def test_a_link_local_client_is_given_with_its_interface() -> None:
    (index, name), *_ = socket.if_nameindex()
    there = ("fe80::2", 999, 0, index)

    assert tcp(("fe80::1", 80), there)[b"TCP6INTERFACE"] == name.encode()
    assert b"TCP6INTERFACE" not in tcp(("fe80::1", 80), ("fe80::2", 999, 0, 12345678))
    assert b"TCP6INTERFACE" not in tcp(("::1", 80), ("::1", 999, 0, 0))


def test_a_name_that_no_variable_can_hold_is_left_out() -> None:
    said = unix(b"/path", b"\0a\0b", bytes(12))

    assert b"UNIXREMOTEPATH" not in said
    assert b"REMOTE_ADDR" not in said


@together(
    ("word", "path"),
    [
        ("unix:/run/x.sock", b"/run/x.sock"),
        ("unix:@name", b"@name"),
        ("unix:/a%20b%25%C3%A9", b"/a b%\xc3\xa9"),
        ("tcp:[::]:80", b""),
        ("-", b""),
    ],
)
def test_a_listeners_name_is_read_back(word: str, path: bytes) -> None:
    assert path_of(word) == path


def test_what_was_said_of_another_connection_is_not_passed_on() -> None:
    inherited = {
        b"PROTO": b"SSL",
        b"PROTOTYPE": b"kept",
        b"TCPREMOTEINFO": b"x",
        b"TCP6REMOTEHOST": b"x",
        b"UNIXREMOTEEUID": b"x",
        b"REMOTE_USER": b"x",
        b"LISTEN_FDS": b"1",
        b"SOCKETPROTECTOR_CHANNEL": b"3",
        b"HOME": b"/home",
    }
    ours, theirs = socket.socketpair()
    with ours, theirs:
        said = Environments(inherited, "unix:/x").of(theirs.fileno(), 0)

    assert said is not None
    assert said.keys() & inherited.keys() == {b"PROTO", b"PROTOTYPE", b"UNIXREMOTEEUID", b"HOME"}
    assert said[b"PROTO"] == b"UNIX"
    assert said[b"UNIXREMOTEEUID"] == str(os.getuid()).encode()
