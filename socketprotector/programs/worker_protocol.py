"""The worker's side of docs/protocol.md, for the stdio pool and the legacy adapter.

The pool and the adapter run as long as the service, so this module imports little.
"""

from __future__ import annotations

import _socket as socket
import errno
import os
import struct

from socketprotector_client import wire

#: The errors after which a message should be sent again.
_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)
# Never O_NONBLOCK: all workers and the protector share the channel's open file description.
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
# CMSG_SPACE would have room for a second descriptor, which no code here would close.
_CONTROL_BYTES = socket.CMSG_LEN(4)
_HEADER, _HEADER_BYTES = wire.HEADER.unpack, wire.HEADER.size
_FD = struct.Struct("i").unpack
_NO_CONNECTION = (-1, 0, 0)
#: poll(2) takes milliseconds as a C int (24.8 days), but an operator may set any time.
_LONGEST_S = 86_400.0
#: The most digits of a 64-bit number, which systemd accepts; and of a descriptor.
_USEC_DIGITS, _DIGITS = 20, 9
#: The exit status if a system call failed, or the command cannot be started.
FAILED = 111

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Refusal(Exception):
    """One line for the operator, and an exit status."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


class Notifier:
    """Sends sd_notify messages on a socket that stays open, in case descriptors run out."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get(wire.ENV_NOTIFY, "")
        self._address = os.fsencode("\0" + address[1:] if address[:1] == "@" else address)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        usec = environ.get("WATCHDOG_USEC", "")
        #: The interval of WATCHDOG=1: half of the limit at most; 0: it is not required.
        is_number = usec.isdecimal() and len(usec) <= _USEC_DIGITS
        self.watchdog_s = min(int(usec) / 2_000_000, _LONGEST_S) if is_number else 0.0

    def ready(self) -> None:
        """Send READY=1, and wait for room: without READY=1, --start-timeout ends this worker."""
        self.send(f"READY=1\n{wire.RETIRES_ON_RETURN}", wait=True)

    def send(self, text: str, *, wait: bool = False) -> bool:
        """Send a message; return True if there was no room, and the message must be sent again.

        wait: wait for room instead, however long.
        """
        if self._socket is None:
            return False
        flags = socket.MSG_NOSIGNAL if wait else socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
        try:
            self._socket.sendto(text.encode(), flags, self._address)
        except OSError as error:
            return error.errno in _FULL
        return False


def inherited(environ: Mapping[str, str], name: str) -> int:
    """Return the descriptor that a variable names, and set close-on-exec; -1: there is none.

    Raises OSError.
    """
    text = environ.get(name, "").partition(":")[0]
    if not text.isdecimal() or len(text) > _DIGITS:
        return -1
    os.set_inheritable(int(text), False)
    return int(text)


def receive(channel: socket.socket, say: Callable[[str], None]) -> tuple[int, int, int] | None:
    """Return (connection, listener's index, time of accept in ns); None: end of file.

    The connection is -1 if the message has none; the log says so.  Raises OSError;
    BlockingIOError if there is no message.
    """
    data, control, flags, _ = channel.recvmsg(_HEADER_BYTES, _CONTROL_BYTES, _FLAGS)
    if not control:
        if flags & socket.MSG_CTRUNC:
            say("a connection was lost: no descriptor left for it")
        return _NO_CONNECTION if data else None
    (fd,) = _FD(control[0][2])
    version, kind, listener, _, accepted_at_ns = (
        _HEADER(data) if len(data) == _HEADER_BYTES else (0, 0, 0, 0, 0)
    )
    if (version, kind) != (wire.VERSION, wire.KIND_CONNECTION):
        say(f"cannot serve a message of version {version}, kind {kind}: its connection is closed")
        os.close(fd)
        return _NO_CONNECTION
    return fd, listener, accepted_at_ns


def write_line(program: str, text: str) -> None:
    """Write one line to the log, whole.  Never raises."""
    try:
        os.write(2, f"{program}: {text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass
