"""Descriptors that harm the process that closes them, and how to send them."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import socket
import struct
from collections.abc import Iterator

#: A process that waits for this long has failed its test by the test's own deadline.
LINGER_S = 600
AF_XDP = 44
SO_PASSRIGHTS = 83


def send(sock: socket.socket, data: bytes, *fds: int, to: str = "") -> None:
    """Send a message with descriptors, which stay open here.  to: an abstract address (`@name`)."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    where = ("\0" + to.removeprefix("@"),) if to else ()
    sock.sendmsg([data], rights if fds else [], 0, *where)


def can_be_refused() -> bool:
    """Whether the kernel can refuse what is sent with descriptors (SO_PASSRIGHTS, Linux 6.16)."""
    with socket.socket(socket.AF_UNIX) as one, contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        return True
    return False


@contextlib.contextmanager
def lingering() -> Iterator[int]:
    """Yield a TCP socket, for the block to close: the last close() waits for its silent peer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        with listener.accept()[0]:  # the peer stays for as long as the block
            ours.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    ours.send(b"x" * 65536)
            ours.setblocking(True)
            linger = struct.pack("ii", 1, LINGER_S)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            yield ours.detach()


@contextlib.contextmanager
def slow_to_close(kind: str) -> Iterator[int]:
    """Yield a descriptor, the block's to close, whose last close() waits.

    kind: "lingering", or "nested" for a UNIX socket in whose queue such a one waits.
    """
    with lingering() as fd:
        if kind == "nested":
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            send(near, b"x", fd)
            near.close()
            os.close(fd)
            fd = far.detach()
        yield fd


def of_each_kind() -> list[int]:
    """Return new descriptors of many kinds, some of them of families without getsockname()."""
    found = [os.open("/dev/null", os.O_RDONLY), os.memfd_create("x"), os.eventfd(0), *os.pipe()]
    found += [each.detach() for each in socket.socketpair()]
    for family, type_ in (
        (AF_XDP, socket.SOCK_RAW),
        (socket.AF_ALG, socket.SOCK_SEQPACKET),
        (socket.AF_NETLINK, socket.SOCK_RAW),
        (socket.AF_VSOCK, socket.SOCK_STREAM),
        (socket.AF_PACKET, socket.SOCK_DGRAM),
        (socket.AF_INET6, socket.SOCK_DGRAM),
    ):
        with contextlib.suppress(OSError):  # not in this kernel, or not for this user
            found.append(socket.socket(family, type_).detach())
    return found


@contextlib.contextmanager
def room_for(more: int) -> Iterator[None]:
    """Let this process open so many descriptors more, and no further one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open("/dev/null", os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 64, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(taken[0]))
        for _ in range(more):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
