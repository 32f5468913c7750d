"""What the workers here that use no client library have in common: a few lines of the protocol.

Those that take connections do so either way: from the channel, or where there is none
(`--handoff listener`) from the listening sockets themselves, until TERM.

Thousands of them are started.  So here are the modules that `socket` and `signal` are built on:
those two, with what they import, are half of a start.
"""

import _signal as signal
import _socket as socket
import os
import select
import sys


class Socket(socket.socket):
    """One that `with` closes."""

    def __enter__(self) -> "Socket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if "SOCKETPROTECTOR_CHANNEL" in os.environ:
    CHANNEL = Socket(fileno=int(os.environ["SOCKETPROTECTOR_CHANNEL"]))
    LISTENERS = []
else:
    LISTENERS = [Socket(fileno=3 + n) for n in range(int(os.environ["LISTEN_FDS"]))]
    for each in LISTENERS:
        os.set_blocking(each.fileno(), False)  # others accept there, too, and may be faster
#: Where connections come from.
SOURCES = LISTENERS or [CHANNEL]
_told: list[int] = []  # a pipe that says that TERM has come


def say(message: bytes) -> None:
    """Tell the protector something, such as READY=1."""
    with Socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(message, os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))


def take(flags: int = 0) -> tuple[bytes, Socket] | None:
    """Wait for a connection and return (header, socket); None when there is to be no more."""
    if LISTENERS:
        return _accept() if flags & socket.MSG_DONTWAIT else _wait_and_accept()
    header, control, _, _ = CHANNEL.recvmsg(16, socket.CMSG_LEN(4), flags)
    if not header:
        return None
    return header, Socket(fileno=int.from_bytes(control[0][2], sys.byteorder))


def _accept() -> tuple[bytes, Socket]:
    for place, each in enumerate(LISTENERS):
        try:
            fd, _ = each._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            continue
        return bytes((0, 0, place & 255, place >> 8)).ljust(16, b"\0"), Socket(fileno=fd)
    raise BlockingIOError


def _wait_and_accept() -> tuple[bytes, Socket] | None:
    if not _told:
        _told.extend(os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        signal.set_wakeup_fd(_told[1])
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: None)
    poll = select.poll()
    poll.register(_told[0], select.POLLIN)
    for source in LISTENERS:
        poll.register(source, select.POLLIN)
    while _told[0] not in [fd for fd, _ in poll.poll()]:
        try:
            return _accept()
        except BlockingIOError:
            continue
    return None


def answer(client: Socket) -> None:
    """Answer each line with `[pid] line` until the client has closed."""
    while data := client.recv(65536):
        client.sendall(b"[%d] %s" % (os.getpid(), data))
