"""The sd_notify protocol, both ways: from workers to us, and from us to systemd.

Source: sd_notify(3); unix(7) for SCM_CREDENTIALS.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

#: Longer datagrams are cut; systemd itself takes a page.
_MAX_BYTES = 4096
#: What waits for a full notify socket; beyond that the oldest is of no interest any more.
_MAX_UNSENT = 16
_CREDENTIALS = struct.Struct("3i")
_ANCILLARY = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * 253)


@dataclass(frozen=True, slots=True)
class Message:
    """One datagram: its assignments, and the descriptor of a BARRIER (else -1).

    Whoever handles the message closes the descriptor, after all earlier ones are handled.
    """

    fields: Mapping[str, str]
    barrier: int = -1


class NotifySocket:
    """Where one worker speaks to us.  Its address says who speaks."""

    def __init__(self, allowed_uids: frozenset[int]) -> None:
        """Bind an abstract address of random name.  Raises OSError."""
        self._allowed = allowed_uids
        self.address = f"@socketprotector-{os.urandom(12).hex()}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self.socket.bind("\0" + self.address[1:])
        except OSError:
            self.socket.close()
            raise

    def fileno(self) -> int:
        return self.socket.fileno()

    def receive(self, pid: int) -> Message | None:
        """Return the next message, or None when there is none.

        A message counts when it comes from the worker (pid) or from one of the allowed
        users: its sender may be gone by now, or the worker may have changed its user.
        A stranger's is returned without fields.  Descriptors other than a barrier's are closed.
        """
        try:
            data, ancillary, _, _ = self.socket.recvmsg(
                _MAX_BYTES, _ANCILLARY, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return None
        descriptors: list[int] = []
        known = False
        for level, kind, content in ancillary:
            if level != socket.SOL_SOCKET:
                continue
            if kind == socket.SCM_RIGHTS:
                whole = len(content) - len(content) % 4
                descriptors.extend(fd for (fd,) in struct.iter_unpack("i", content[:whole]))
            elif kind == socket.SCM_CREDENTIALS:
                sender, uid, _ = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])
                known = sender == pid or uid in self._allowed
        fields = parse(data) if known else {}
        barrier = -1
        if fields.get("BARRIER") == "1" and len(descriptors) == 1:
            barrier = descriptors.pop()
        for fd in descriptors:
            os.close(fd)
        return Message(fields, barrier)

    def close(self) -> None:
        self.socket.close()


def _is_number(text: str) -> bool:
    # isdigit() alone is true of digits that int() does not take.
    return text.isascii() and text.isdigit()


def parse(data: bytes) -> dict[str, str]:
    """Return the NAME=VALUE lines of a datagram; what is no such line is passed over."""
    fields = {}
    for line in data.decode("utf-8", "replace").split("\n"):
        name, separator, value = line.partition("=")
        if separator and name:
            fields[name] = value
    return fields


class Systemd:
    """The service manager that started us, if one did.  Never blocks, never raises."""

    def __init__(
        self, environment: Mapping[str, str], later: Callable[[Callable[[], None]], None]
    ) -> None:
        """`later` calls what it is given after a moment."""
        self._later = later
        self._unsent: deque[bytes] = deque(maxlen=_MAX_UNSENT)
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        self._socket: socket.socket | None = None
        if self._address:
            # For life: where descriptors have run out, the watchdog wants to be fed all the same.
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        usec = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        wanted = ours and self._socket is not None and _is_number(usec)
        #: Seconds between two WATCHDOG=1, half of what the manager allows; 0 without one.
        self.watchdog_s = int(usec) / 2_000_000 if wanted else 0.0

    def send(self, **fields: str) -> None:
        """Send assignments as one datagram, after those that could not be sent yet."""
        if self._socket is None:
            return
        text = "\n".join(f"{name}={value}" for name, value in fields.items())
        # A file's name in a status need not be UTF-8.
        data = text.encode("utf-8", "backslashreplace")
        # Once is enough, or the watchdog's would push READY=1 out; the last word stays last.
        if data in self._unsent:
            self._unsent.remove(data)
        self._unsent.append(data)
        if len(self._unsent) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._socket is not None and self._unsent:
            try:
                self._socket.sendto(
                    self._unsent[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._address
                )
            except (BlockingIOError, InterruptedError):
                # A manager that misses READY=1 waits for it, and then ends us.
                self._later(self._flush)
                return
            except OSError:
                pass  # it is gone, or takes nothing from us
            self._unsent.popleft()

    def reloading(self) -> None:
        """RELOADING=1 needs the time beside it, else `systemctl reload` waits for ever."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.send(RELOADING="1", MONOTONIC_USEC=str(usec), STATUS="reloading")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
