"""A connection to a control socket: sends requests, and receives answers and events.

An upgrade, or a crash under --guard or systemd, ends the connection.  The control socket keeps
listening, so query() and reconnect() try for up to RETURN_S to connect again.

Each call blocks for a limited time.  The module checks the form and length of each message, because
the peer may be another program.

Source: docs/control.md; unix(7) for SO_PEERCRED and SO_PASSCRED.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import stat
import struct
import time
from collections import deque
from typing import Any

from ..model.control_requests import COMMANDS
from ..model.text import escape, in_units
from ..system.cleanup import on_error
from ..system.foreign_descriptors import refuse_descriptors
from ..system.trusted_path import only_lead
from .errors import ConnectionLost, NoProtector, RequestRefused
from .fields import label, text_in
from .message import message_in

#: The version of the control protocol.
VERSION = 1
#: How long to wait for an answer.  A protector answers within milliseconds, unless the machine is
#: overloaded.
ANSWER_S = 10.0
#: How long to try to reconnect.  A guard restarts a killed protector within 0.3 s.  If the
#: protector dies again and again, the guard waits longer before each further start.
RETURN_S = 10.0
_TRY_EVERY_S = 0.05
#: The most bytes of a line; a longer line is an error.  The status of 1,900 workers takes 1.3 MB
#: during a reload.  A worker's STATUS= text adds up to 500 bytes, or 3,000 if it is not ASCII.
LONGEST_LINE = 4 * 1024 * 1024
#: answer() buffers at most this many events, and this many bytes of events.  A protector and the
#: kernel together buffer less for one client.  (Most events have 100 bytes or more.)
_MOST_EVENTS, _MOST_EVENT_BYTES = 20_000, 2 * 1024 * 1024
#: The format of SO_PEERCRED and SCM_CREDENTIALS: pid, uid and gid, in our own namespaces.
_CREDENTIALS = struct.Struct("3i")
#: Room for credentials only, so that the kernel drops descriptors that a peer sends.
_CREDENTIALS_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size)

Message = dict[str, Any]


class Client:
    """A connection to a control socket.  Close it, or use it in a `with` statement."""

    def __init__(
        self,
        path: str,
        answer_s: float = ANSWER_S,
        *,
        events: bool = False,
        until: float = math.inf,
    ) -> None:
        """Connect to the control socket at `path`.  Raises NoProtector, RequestRefused.

        answer_s: how long to wait for the connection, and for each answer.
        events: whether to request the events, which the protector then sends as they happen.
        until: the deadline, by time.monotonic(), of this call and of all later calls of
        reconnect(), request() and query().
        """
        self.path = path
        self._answer_s = answer_s
        self._until = until
        self._follows = events
        #: `started_at` of the protector that reconnect() must find again; None: any protector.
        self.started_at: object = None
        self._last_id = 0
        #: The commands of all requests so far; perhaps only a part of the last request was sent.
        self.requested: set[str] = set()
        self._connect(answer_s)
        if events:
            with on_error(self.close):
                self._request("events", {}, answer_s)

    def _connect(self, within_s: float) -> None:
        self._socket = connect(self.path, self._limited_s(within_s))
        # Set SO_PASSCRED only after connect(2), which would otherwise also bind the socket to an
        # abstract name.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._reset()

    def _limited_s(self, within_s: float) -> float:
        """Return a timeout, shortened so that the wait ends by the client's deadline.

        A timeout above 0 stays above 0 even after the deadline, because 0 would make the socket
        non-blocking.
        """
        left_s = self._until - time.monotonic()
        return min(within_s, max(0.001, left_s)) if within_s else within_s

    def _reset(self) -> None:
        """Forget everything that an earlier connection received."""
        self._buffer = bytearray()
        self._events: deque[Message] = deque()
        self._events_bytes = 0
        self._late_answers = 0
        #: The pid of the last message's sender; 0: unknown, or not in our PID namespace.
        self.protector_pid = 0

    def reconnect(self, within_s: float = math.inf, answer_s: float = 0.0) -> Message:
        """Connect again and return the status; request the events again, if they were requested.

        Sends both requests before it reads an answer, because a protector that is about to exit
        answers only the requests that have already arrived.
        Raises NoProtector if no protector answers, or a wrong one; RequestRefused after a refusal.

        within_s: how long to try, at most RETURN_S.
        answer_s: wait at least this long for the status, even if `within_s` ends earlier.
        """
        limit_s = self._limited_s(min(within_s, RETURN_S))
        until = time.monotonic() + limit_s
        while True:
            self.close()
            left_s = until - time.monotonic()
            try:
                connect_s = max(0.1, left_s)
                self._connect(connect_s)
                with on_error(self.close):
                    wait_s = max(connect_s, answer_s)
                    if self._follows:
                        self.send("events", {}, time.monotonic() + wait_s)
                    status = self._request("status", {}, wait_s)
                    break
            except NoProtector as error:
                if time.monotonic() >= until:
                    within = in_units(round(limit_s, 1))
                    raise NoProtector(
                        f"the protector did not come back within {within} ({error})",
                        "silent" if time.monotonic() >= self._until else "dead",
                    ) from error
            time.sleep(min(_TRY_EVERY_S, left_s))
        if self.started_at in (None, status.get("started_at")):  # kept by an upgrade, and the guard
            return status
        self.close()
        raise NoProtector("the protector has ended, and another one was started")

    def fileno(self) -> int:
        """Return the socket's descriptor, for select."""
        return self._socket.fileno()

    @property
    def peer(self) -> tuple[int, int]:
        """Pid and user of the process that last called listen().

        Normally this is the protector.  While a protector starts, this can still be the process
        that launches the protector, or the previous protector, which crashed.
        """
        credentials = self._socket.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        return pid, uid

    def shares_pids(self, status: Message) -> bool:
        """Return True if the protector of this connection is in our own PID namespace.

        If False, a pid in the status may be the pid of an unrelated process in our namespace.
        status: the protector's status, received over this connection.
        """
        return self.protector_pid == status.get("pid")

    # -- requests ----------------------------------------------------------------

    def request(self, command: str, **arguments: Any) -> Message:
        """Send a request once and return its result.

        Raises RequestRefused if the protector refuses.
        Raises ConnectionLost if the connection ends before the answer; the protector may still have
        carried out the request.
        Raises NoProtector if no answer comes in time.  After this error the caller must call
        close() or reconnect(), because perhaps only a part of the request was sent.
        """
        return self._request(command, arguments, self._answer_s)

    def query(self, command: str, **arguments: Any) -> Message:
        """Send a request that is safe to repeat, and return its result.

        If the connection ends before the answer, reconnect and send the request again, for up to
        RETURN_S.  The new connection may end, too: a protector may crash after an upgrade.
        Raises the errors of request().
        """
        until = time.monotonic() + self._limited_s(RETURN_S)
        while True:
            try:
                return self.request(command, **arguments)
            except ConnectionLost as error:
                left_s = until - time.monotonic()
                if left_s <= 0 and time.monotonic() >= self._until:
                    # The client's deadline, not RETURN_S, ended the tries.
                    raise NoProtector(str(error), "silent") from error
                if left_s <= 0:
                    raise
                self.reconnect(left_s)

    def _request(self, command: str, arguments: Message, within_s: float) -> Message:
        within_s = self._limited_s(within_s)
        until = time.monotonic() + within_s
        self.send(command, arguments, until)
        result = self.answer(until)
        if result is None:
            reads = COMMANDS[command].reads or arguments.get("check")  # `upgrade --check`
            later = "" if reads else " It may still carry out the request"
            raise NoProtector(
                f"{self.path}: no answer to {command!r} within {in_units(round(within_s, 1))}; "
                f"is the protector suspended (SIGSTOP) or starting? See its log.{later}",
                "silent",
            )
        return result

    def send(self, command: str, arguments: Message, until: float) -> None:
        """Send a request.  until: the deadline, by time.monotonic().

        Raises NoProtector.  If the connection has ended, send() raises nothing, and the next call
        of answer() raises the error.
        """
        self._last_id += 1
        self._follows |= command == "events"
        self.requested.add(command)
        request = {"v": VERSION, "id": self._last_id, "command": command, **arguments}
        try:
            self._socket.settimeout(max(0.001, until - time.monotonic()))
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError:
            raise NoProtector(
                f"{self.path}: the protector does not read the request; is it suspended (SIGSTOP)?",
                "silent",
            ) from None
        except OSError as error:
            # EPIPE, ECONNRESET: the protector has closed the connection, perhaps after a refusal.
            # EBADF: we closed the connection ourselves.
            # In these cases answer() reads the refusal, or raises ConnectionLost.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF):
                raise NoProtector(f"{self.path}: {error.strerror}") from error

    def answer(self, until: float) -> Message | None:
        """Return the result of the last request; None if no result has arrived by `until`.

        Raises RequestRefused if the protector refuses, ConnectionLost if the connection ends.
        Raises NoProtector if the peer sends an invalid message, more events than a protector would
        send, or more answers than there were requests.
        """
        while (found := self._message(until)) is not None:
            message, size = found
            if "event" in message:
                self._events.append(message)
                self._events_bytes += size
                if not self._follows:
                    raise self.foreign_peer_error()
                if len(self._events) > _MOST_EVENTS or self._events_bytes > _MOST_EVENT_BYTES:
                    raise NoProtector(
                        f"{self.path}: {len(self._events)} events came before the answer; if the "
                        "process there is SocketProtector, see `events` for their cause",
                        "no protector",
                    )
            # Without id: a refusal of the connection (denied, busy), or of an invalid line.
            elif message.get("id") in (self._last_id, None):
                return _result(message)
            else:
                # The answer to an earlier request, such as the first of reconnect()'s two requests.
                _result(message)  # raises RequestRefused after a refusal
                self._late_answers += 1
                if self._late_answers > self._last_id:
                    raise self.foreign_peer_error()
            if self._has_run_out(until):
                break
        return None

    def event(self, timeout_s: float) -> Message | None:
        """Return the next event; None if no event arrives in time.

        Raises NoProtector if the peer sends an invalid message.
        Raises ConnectionLost if the connection ends; then call close() or reconnect().
        """
        until = time.monotonic() + timeout_s
        while not self._events:
            found = self._message(until)
            if found is None:
                return None
            if "event" in found[0]:
                return found[0]
            if self._has_run_out(until):
                return None
        # Count from 0 again, because the caller is reading the buffered events now.  The limit
        # _MOST_EVENT_BYTES only stops a peer that sends events endlessly while answer() waits.
        self._events_bytes = 0
        return self._events.popleft()

    # -- lines -------------------------------------------------------------------

    def _has_run_out(self, until: float) -> bool:
        """Return True if the time `until` has passed and no complete line is buffered."""
        return time.monotonic() >= until and b"\n" not in self._buffer

    def _message(self, until: float) -> tuple[Message, int] | None:
        """Return the next message and its length; None if no message arrives in time."""
        line = self._line(until)
        if line is None:
            return None
        message = message_in(line)
        if message is None:
            raise self.foreign_peer_error()
        return message, len(line)

    def _line(self, until: float) -> bytes | None:
        """Return the next line; None if no complete line arrives in time."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            # Read at least once, so that a timeout of 0 s returns a line that has already arrived.
            left_s = max(0.0, until - time.monotonic())
            if searched and not left_s:
                return None
            searched = len(self._buffer)
            if searched > LONGEST_LINE:
                raise self.foreign_peer_error()
            try:
                self._socket.settimeout(left_s)
                data, ancillary, _, _ = self._socket.recvmsg(65536, _CREDENTIALS_BYTES)
            except (TimeoutError, BlockingIOError):
                return None
            except OSError as error:
                raise ConnectionLost(
                    f"{self.path}: the connection was cut ({error.strerror})"
                ) from error
            if not data:
                raise ConnectionLost(f"{self.path}: the connection was cut")
            self._buffer += data
            for _, kind, content in ancillary:
                if kind == socket.SCM_CREDENTIALS:
                    self.protector_pid = _CREDENTIALS.unpack(content)[0]
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    @property
    def unread_bytes(self) -> int:
        """The number of bytes in the buffers.

        Can be too low after event(), which resets _events_bytes even if more events are buffered.
        """
        return len(self._buffer) + self._events_bytes

    def foreign_peer_error(self) -> NoProtector:
        """Return the error for a peer that is not SocketProtector."""
        return NoProtector(
            f"{self.path}: the process there is not SocketProtector; check the path", "no protector"
        )

    def close(self) -> None:
        """Close the connection and discard the buffers.  A second call changes nothing."""
        self._socket.close()
        self._reset()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(path: str, timeout_s: float) -> socket.socket:
    """Return a socket that is connected to a control socket; the caller closes it.

    timeout_s: how long to wait if the backlog is full; 0: not at all, and the returned socket is
    non-blocking.
    Raises NoProtector; RequestRefused (denied) if this user may not connect.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with on_error(sock.close):
            sock.settimeout(timeout_s)
            refuse_descriptors(sock)
            _connect_to_path(sock, path)
    except OSError as error:
        raise _connect_error(path, error) from error
    return sock


def _connect_to_path(sock: socket.socket, path: str) -> None:
    """Connect a socket to the socket file at a path, and to no other file that comes there later.

    Refuses a path that another user may lead to a socket of yet another.
    Raises OSError, RequestRefused.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        found = os.fstat(place)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.ENOTSOCK, "the file there is no socket")
        if why := why_misled(path, found.st_uid):
            raise RequestRefused("denied", f"{escape(path)}: {why}")
        by_place = f"/proc/self/fd/{place}"
        sock.connect(by_place if os.path.exists(by_place) else path)
    finally:
        os.close(place)


def why_misled(path: str, owner: int) -> str:
    """Return why we must not use what a path leads to; "" if we may.

    owner: the user that owns what the path leads to; any other user could have put a link there.
    """
    # In a user namespace, the owner of / can be a user that the namespace does not know.
    trusted = {0, os.stat("/").st_uid, os.geteuid(), owner}
    if only_lead(path, trusted, in_shared=True):
        return ""
    return (
        f"it leads to user {owner}, but another user can make this path lead elsewhere; name a "
        f"path that only root and user {owner} can change"
    )


def _connect_error(path: str, error: OSError) -> NoProtector | RequestRefused:
    """Return the error for a failed connect(2) to this path."""
    match error:
        case PermissionError():
            why = (
                "permission denied; run as root or as the protector's user, or join its "
                "--control-group"
            )
            return RequestRefused("denied", f"{escape(path)}: {why}")
        case FileNotFoundError():
            why = (
                "no such socket; the protector is not running, or has --no-control; "
                "`socketprotectorctl list` shows running protectors"
            )
        case ConnectionRefusedError():
            why = "no process listens there any more; the protector has ended"
        case TimeoutError() | BlockingIOError():
            why = "no process accepts there; is the protector suspended (SIGSTOP)?"
            return NoProtector(f"{path}: {why}", "silent")
        case _:
            why = error.strerror or str(error)
    return NoProtector(f"{path}: {why}")


def process_exists(pid: int) -> bool:
    """Return True if the process exists, even as a zombie.

    Uses kill(2), because /proc may be missing or hide other users' processes.
    """
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass  # the process exists, and belongs to another user
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _result(message: Message) -> Message:
    """Return the field `result` of an answer.  Raises RequestRefused if the answer is a refusal."""
    if message.get("ok") is True:
        result = message.get("result")
        return result if isinstance(result, dict) else {}
    raise RequestRefused(label(message, "code") or "refused", text_in(message, "error"))
