"""A client that gets no answer yet: its kernel tries again until the server answers."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable
from typing import Any

from tests.running import DEADLINE_S, eventually

_SYN_SENT = 2
#: Where tcp_info has the state, and how often it was tried again (tcp.h).
_STATE, _RETRANSMITS = 0, 2


def from_next_door(client: socket.socket) -> None:
    """Make a client's packets arrive with the highest TTL or hop limit."""
    if client.family == socket.AF_INET6:
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 255)
    else:
        client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 255)


class Unanswered:
    """Begins to connect; owns its socket."""

    def __init__(
        self, address: Any, prepare: Callable[[socket.socket], None] = lambda one: None
    ) -> None:
        """prepare: is given the socket before it begins."""
        self.socket = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        prepare(self.socket)
        self.socket.setblocking(False)
        assert self.socket.connect_ex(address) == errno.EINPROGRESS

    def tries_again(self) -> None:
        """Wait until what was sent first has had no answer for a second."""
        eventually(lambda: self._retransmits() > 0, "another try")

    def _retransmits(self) -> int:
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
        assert info[_STATE] == _SYN_SENT, f"state {info[_STATE]}"
        return info[_RETRANSMITS]

    def connects(self) -> None:
        """Wait until the server has answered; raises OSError where it was refused."""
        assert select.select([], [self.socket], [], DEADLINE_S)[1], "no answer"
        error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, "refused")
        self.socket.settimeout(DEADLINE_S)

    def say(self, line: str) -> None:
        """Send a line over what is connected."""
        self.socket.sendall(line.encode() + b"\n")

    def hear(self) -> str:
        """Return the line that comes back."""
        with self.socket.makefile() as answers:
            return answers.readline().rstrip("\n")

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Unanswered:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
