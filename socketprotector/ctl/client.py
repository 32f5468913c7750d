"""One connection to a control socket: a request, its answer, and the events in between.

Standard library only; no output, errors are raised.  It blocks, each time at most for a given time.
The peer's data is checked for its shape and limited in length.

Source: docs/control.md; unix(7) for SO_PEERCRED.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import time
from collections import deque
from types import TracebackType
from typing import Any

from .errors import ConnectionLost, NoProtector, PermissionDenied, RequestRefused

VERSION = 1
#: A protector answers within milliseconds; one that starts after a crash takes some hundred, and
#: a machine that is short of everything longer.
ANSWER_S = 10.0
#: The status of a protector with 1,000 workers has 300 KB; without an end it is no protector.
LONGEST_LINE = 16 * 1024 * 1024
#: sun_path's room, less the zero at its end (unix(7)).
_LONGEST_PATH = 107

Message = dict[str, Any]


class Client:
    """A connected client.  Close it, or use it in a `with`."""

    def __init__(self, path: str, answer_s: float = ANSWER_S) -> None:
        """Connect.  Raises NoProtector, or PermissionDenied where the socket's mode forbids it."""
        self.path = path
        self._answer_s = answer_s
        self._buffer = bytearray()
        self._events: deque[Message] = deque()
        self._last_id = 0
        self._socket = connect(path, answer_s)

    @property
    def peer_pid(self) -> int:
        """The process that made the socket listen: the protector, or one that it came from."""
        return peer_pid(self._socket)

    def request(self, command: str, **arguments: Any) -> Message:
        """Ask, and return the result.

        Raises RequestRefused (PermissionDenied) for a no, ConnectionLost when the connection
        ended before the answer came, NoProtector when none came in time.  After the latter the
        connection is of no use any more.
        """
        self._last_id += 1
        asked = {"v": VERSION, "id": self._last_id, "command": command, **arguments}
        until = time.monotonic() + self._answer_s
        self._send(json.dumps(asked).encode() + b"\n", until)
        while True:
            message = self._message(until)
            if message is None:
                raise NoProtector(
                    f"{self.path}: no answer to {command!r} within {self._answer_s:g} s; "
                    "is the protector stopped or starting?"
                )
            if "event" in message:
                self._events.append(message)
            elif message.get("id") in (self._last_id, None):
                return _result(message)

    def event(self, timeout_s: float) -> Message | None:
        """Return the next event, or None when none came in time.  Raises ConnectionLost."""
        until = time.monotonic() + timeout_s
        while not self._events:
            message = self._message(until)
            if message is None:
                return None
            if "event" in message:
                return message
        return self._events.popleft()

    def _send(self, line: bytes, until: float) -> None:
        try:
            self._socket.settimeout(max(0.001, until - time.monotonic()))
            self._socket.sendall(line)
        except TimeoutError:
            raise NoProtector(f"{self.path}: the protector does not read the request") from None
        except OSError as error:
            # A client that is refused is told why before the end: that line may be there to read.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise NoProtector(f"{self.path}: {error.strerror}") from error

    def _message(self, until: float) -> Message | None:
        line = self._line(until)
        if line is None:
            return None
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise NoProtector(f"{self.path}: what answers there is not SocketProtector")
        return message

    def _line(self, until: float) -> bytes | None:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > LONGEST_LINE:
                raise NoProtector(f"{self.path}: what answers there is not SocketProtector")
            # Once is looked in any case: an event that is there is taken with 0 s to wait.
            self._socket.settimeout(max(0.0, until - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except (TimeoutError, BlockingIOError):
                return None
            except OSError as error:
                raise ConnectionLost(
                    f"{self.path}: the connection was cut ({error.strerror})"
                ) from error
            if not data:
                raise ConnectionLost(f"{self.path}: the connection was cut")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def close(self) -> None:
        """Close the connection; again: nothing."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.close()


def connect(path: str, timeout_s: float) -> socket.socket:
    """Return a connected socket, which the caller closes.  Raises NoProtector, PermissionDenied.

    timeout_s: how long a full backlog is waited for; 0 is not at all (then the socket does
    not block).
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        _connect(sock, path)
    except OSError as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise PermissionDenied(
                f"{path}: not for this user; ask as root or as the protector's"
            ) from None
        raise NoProtector(_unreachable(path, error)) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _connect(sock: socket.socket, path: str) -> None:
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        sock.connect(path)
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        there = f"/proc/self/fd/{folder}"
        if not os.path.exists(there):
            why = f"longer than {_LONGEST_PATH} bytes, and there is no /proc to shorten it by"
            raise OSError(errno.ENAMETOOLONG, why)
        sock.connect(f"{there}/{os.path.basename(path)}")
    finally:
        os.close(folder)


def _unreachable(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: there is no control socket; does the protector run?"
    if isinstance(error, ConnectionRefusedError):
        return f"{path}: no process listens there any more; the protector has ended"
    if isinstance(error, TimeoutError | BlockingIOError):
        return f"{path}: no process accepts there; is the protector stopped?"
    return f"{path}: {error.strerror or error}"


def peer_pid(sock: socket.socket) -> int:
    """Return SO_PEERCRED's pid of a connected socket."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def lives(pid: int) -> bool:
    """Whether there is such a process, or a zombie: not asked of /proc, which may hide it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _result(message: Message) -> Message:
    if message.get("ok") is True:
        result = message.get("result")
        return result if isinstance(result, dict) else {}
    code, error = str(message.get("code")), str(message.get("error"))
    raise PermissionDenied(error) if code == "denied" else RequestRefused(code, error)
