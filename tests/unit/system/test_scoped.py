"""Hosts with an interface, as text and as the socket module has them."""

from __future__ import annotations

import errno
import socket

import pytest

from socketprotector.system.scoped import SocketAddress, host_of, sockaddr, without_interface

LO = socket.if_nametoindex("lo")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", ("127.0.0.1", 80)),
        ("fe80::1%lo", ("fe80::1", 80, 0, LO)),
        ("febf::1%lo", ("febf::1", 80, 0, LO)),
    ],
)
def test_text_and_address_stand_for_each_other(host: str, address: SocketAddress) -> None:
    assert (sockaddr(host, 80), host_of(address)) == (address, host)


@pytest.mark.parametrize("host", ["::", "fe8::1", "fec0::1", "2001:db8::1", "::ffff:127.0.0.1"])
def test_other_addresses_need_no_interface(host: str) -> None:
    assert host_of((host, 80, 0, LO)) == host == host_of((host, 80, 0, 0))


def test_an_interface_that_is_gone_is_named() -> None:
    with pytest.raises(OSError, match="No such device: 'gone'") as raised:
        sockaddr("fe80::1%gone", 80)
    assert raised.value.errno == errno.ENODEV


@pytest.mark.parametrize("address", ["tcp:[fe80::1%eth0]:80", "[fe80::1%e]0]:80", "[fe80::1]:80"])
def test_proc_has_it_without_the_interface(address: str) -> None:
    assert without_interface(address).removeprefix("tcp:") == "[fe80::1]:80"
