"""Accepts clients at the control socket, and answers their requests within limits.

A client of the control socket must not delay the clients of the workers.  So each turn of the loop
answers at most one request of each client, and no call blocks.  We disconnect a client that sends
too long a line, leaves too many answers unread, or stays idle.  A client that leaves too many log
events unread stays connected, but gets no further events until it has read enough.

Source: docs/control.md; model/einhorn.py; unix(7) for SO_PEERCRED and SO_PEERGROUPS.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from ...model import control_requests, einhorn
from ...model.lazy_dataclass import KW_ONLY, field, mutable
from ...system import peer_credentials
from ...system.foreign_descriptors import dropping, refuse_descriptors
from ...system.listener import TRANSIENT_ERRNOS, Listener
from ...system.loop import READ, WRITE, Loop
from ...system.polling import read_now
from ...system.unix_listener import close_control

#: The most clients at a time.
CLIENTS = 256
#: We disconnect a client that sends no request for this long, unless it follows events.
IDLE_S = 30.0
#: If a client has more unread bytes than this, we disconnect the client instead of sending its next
#: answer.
UNREAD_BYTES = 1024 * 1024
#: The pause between two requests of a client.  The pause keeps a client that sends requests
#: without end at a few percent of a core.
PAUSE_S = 0.001
_READ_BYTES = 65_536
_SO_PEERGROUPS = 59
_CREDENTIALS = struct.Struct("i2I")  # pid, uid, gid
_GROUPS_BYTES = 1024  # room for 256 groups; Python's getsockopt() accepts no larger buffer
#: How soon to accept again after the system ran out of descriptors or memory.
_AGAIN_S = 0.5
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


@mutable
class Client:
    """One client of the control socket."""

    sock: socket.socket
    server: ControlServer
    loop: Loop
    allowed: Collection[str]  # the commands that the client may send
    follows: bool = False  # the client has sent `events`, so it gets our log events
    _watched: int = 0  # the epoll events for which we watch the client's descriptor; 0: none
    _received: bytearray = field(default_factory=bytearray)
    _unsent: bytearray = field(default_factory=bytearray)
    _ending: bool = False  # close once everything is sent
    _dropped: int = 0  # how many events were dropped since the last sent event

    @property
    def gone(self) -> bool:
        return self.sock.fileno() < 0

    def begin(self) -> None:
        """Read requests from now on; disconnect if the first does not come within IDLE_S."""
        self._restart_idle_timer()
        self._resume()

    def send_line(self, line: bytes) -> None:
        """Send a line; if more than UNREAD_BYTES of earlier lines are unsent, disconnect instead.

        The line itself may be longer than UNREAD_BYTES, as the `status` of thousands of workers is.
        """
        if self.gone or self._ending:
            return
        if len(self._unsent) > UNREAD_BYTES:
            self.close()
            return
        with self.within_memory():
            self._unsent += line
        if not self.gone:
            self._send()

    def send_event(self, line: Callable[[Mapping[str, object]], bytes]) -> None:
        """Send an event, or drop it if the client has too much unread data.

        line(fields): returns the event's line, with `fields` added.  If events were dropped, the
        field `dropped` of the next sent event says how many.
        """
        data = b""
        with self.within_memory():
            data = line({"dropped": self._dropped} if self._dropped else {})
        if len(self._unsent) + len(data) > UNREAD_BYTES:
            self._dropped += 1
            return
        self._dropped = 0
        self.send_line(data)

    def send_last(self, line: bytes) -> None:
        """Send a last line, and close the connection once all lines are sent."""
        self.send_line(line)
        self._ending = True
        if not self._unsent:
            self.close()

    def finish(self) -> None:
        """Answer the requests that the client has sent so far (reads at most _READ_BYTES)."""
        data = self._receive()
        with self.within_memory():
            self._received += data or b""
        while self._has_request:
            self._answer_one()

    @contextmanager
    def within_memory(self) -> Iterator[None]:
        """Disconnect this client, and no other, if memory runs out (`ulimit -v`)."""
        try:
            yield
        except MemoryError:
            self._received.clear()
            self._unsent.clear()
            self.close()

    def close(self) -> None:
        if not self.gone:
            fd = self.sock.fileno()
            self._watch(0)
            self.loop.cancel(("control-pause", fd))
            self.loop.cancel(("control-idle", fd))
            self.server.forget(fd)
            with dropping():
                self.sock.close()

    def _receive(self) -> bytes | None:
        """Return the received bytes.

        b"": the connection has ended or failed.  None: nothing has come yet, or memory ran out.
        """
        with dropping(), self.within_memory():
            return read_now(self.sock.recv, _READ_BYTES, socket.MSG_DONTWAIT)
        return None

    def _read(self) -> None:
        data = self._receive()
        if data is None:
            return
        if not data:
            self.close()
            return
        with self.within_memory():
            self._received += data
        self._answer_one()

    def _answer_one(self) -> None:
        """Answer the first received request, if it is complete, and begin the client's pause."""
        line, remaining = b"", None
        with self.within_memory():
            found, end, after = self._received.partition(b"\n")
            line, remaining = bytes(found), after if end else None
        if len(line) > control_requests.LINE_BYTES:
            most = f"a line may have at most {control_requests.LINE_BYTES} bytes"
            self.send_last(control_requests.refusal(control_requests.RequestError("invalid", most)))
        elif remaining is not None:
            self._received = remaining
            self._restart_idle_timer()
            self._pause()
            self.server.answer(self, line)

    def _send(self) -> None:
        try:
            sent = self.sock.send(self._unsent, _FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        del self._unsent[:sent]
        if self._ending and not self._unsent:
            self.close()
        else:
            self._resume()

    def _resume(self) -> None:
        """Wait for room to send, or for the end of the pause, or for the next request."""
        if self._unsent:
            self._watch(WRITE)
        elif self.loop.due(("control-pause", self.sock.fileno())) is not None:
            self._watch(0)
        elif self._has_request:
            self._pause()
        else:
            self._watch(READ)

    def _pause(self) -> None:
        """Pause this client, so that other clients come first."""
        self._watch(0)
        self.loop.call_after(("control-pause", self.sock.fileno()), PAUSE_S, self._end_pause)

    def _end_pause(self) -> None:
        if self._has_request and not self._unsent:
            self._answer_one()
        else:
            self._resume()

    @property
    def _has_request(self) -> bool:
        return b"\n" in self._received and not self._ending and not self.gone

    def _watch(self, events: int) -> None:
        """Watch the client's descriptor for only these epoll events; 0: stop watching."""
        fd = self.sock.fileno()
        if self._watched == events:
            return
        if self._watched:
            self.loop.unwatch(fd)
        self._watched = 0
        if events:
            try:
                self.loop.watch(fd, self._send if events == WRITE else self._read, events)
            except OSError:
                self.close()
            else:
                self._watched = events

    def _restart_idle_timer(self) -> None:
        """Disconnect the client if it sends no request within IDLE_S, unless it follows events."""

        def on_idle() -> None:
            if not self.follows:
                self.close()

        self.loop.call_after(("control-idle", self.sock.fileno()), IDLE_S, on_idle)


@mutable
class ControlServer:
    """The owner of the control socket and its clients."""

    listener: Listener
    loop: Loop
    #: Answers a request, by client.send_line() now or later.  Raises RequestError.
    handle: Callable[[Client, control_requests.Request], None]
    #: Called with the pid in an einhorn ACK: a worker's report that it is ready (model/einhorn.py).
    acked: Callable[[int], None]
    _: KW_ONLY
    #: The users that may send all commands.
    uids: frozenset[int]
    #: A group whose members may send all commands.
    group: int | None
    #: A group whose members may send only STATUS_COMMANDS (control_requests.py).
    status_group: int | None = None
    _clients: dict[int, Client] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_descriptors(self.listener.socket)
        self._watch_listener()

    def send_event(self, level: str, name: str, fields: Mapping[str, object]) -> None:
        at = time.time()
        for client in [each for each in self._clients.values() if each.follows]:
            client.send_event(
                lambda more: control_requests.event(name, at, level, {**fields, **more})
            )

    def finish(self) -> None:
        """Accept the waiting clients, and answer the requests sent so far.  Call before close()."""
        for _ in range(CLIENTS):
            self._accept()
        for client in list(self._clients.values()):
            client.finish()

    def close(self) -> None:
        for client in list(self._clients.values()):
            client.close()
        self.loop.cancel(("control", "again"))
        self.loop.unwatch(self.listener.fileno())
        with dropping():
            close_control(self.listener)

    def answer(self, client: Client, line: bytes) -> None:
        """Answer one line of a client; after einhorn's ACK, close the client without an answer."""
        pid = einhorn.ack(line) if client.allowed is control_requests.COMMANDS else None
        if pid is not None:
            client.close()
            self.acked(pid)
            return
        try:
            with client.within_memory():
                request = control_requests.parse(line)
            if client.gone:
                return
            if request.command not in client.allowed:
                allowed = ", ".join(client.allowed)
                why = f"{request.command}: members of --status-group may use only {allowed}"
                raise control_requests.RequestError("denied", why, request.id)
            self.handle(client, request)
        except control_requests.RequestError as wrong:
            client.send_line(control_requests.refusal(wrong))

    def forget(self, fd: int) -> None:
        self._clients.pop(fd, None)

    def _watch_listener(self) -> None:
        try:
            self.loop.watch(self.listener.fileno(), self._accept)
        except OSError:
            self._accept_later()

    def _accept_later(self) -> None:
        self.loop.call_after(("control", "again"), _AGAIN_S, self._watch_listener)

    def _accept(self) -> None:
        """Accept one client; if others wait, the next turn of the loop accepts another."""
        try:
            sock, _ = self.listener.socket.accept()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRNOS:
                # Descriptors or memory ran out.  The socket stays readable, so the loop would call
                # this method again at once.  So stop watching for a while.
                self.loop.unwatch(self.listener.fileno())
                self._accept_later()
            return
        client = Client(sock, self, self.loop, self._commands_for(sock))
        if not client.allowed:
            wrong = control_requests.RequestError("denied", "permission denied")
        elif len(self._clients) >= CLIENTS:
            wrong = control_requests.RequestError(
                "busy", f"{CLIENTS} clients are connected already; try again after a client leaves"
            )
        else:
            self._clients[sock.fileno()] = client
            client.begin()
            return
        client.send_last(control_requests.refusal(wrong))
        client.close()  # even if the client has not read the refusal

    def _commands_for(self, sock: socket.socket) -> Collection[str]:
        """Return the commands that a new client may send; empty: permission denied."""
        try:
            found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return ()
        _, uid, gid = _CREDENTIALS.unpack(found)
        # In a user namespace, one uid may stand for several users.  Trust a client with such a
        # uid only if we may signal its process (peer_credentials.py).
        if uid in peer_credentials.unmistakable_users(self.uids):
            return control_requests.COMMANDS
        if uid in self.uids and peer_credentials.may_be_signalled(sock):
            return control_requests.COMMANDS
        groups = {gid}
        try:
            more = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
            groups.update(each for (each,) in struct.iter_unpack("I", more))
        except OSError:
            pass  # the user has too many groups for _GROUPS_BYTES: only the primary group counts
        for group, commands in (
            (self.group, control_requests.COMMANDS),
            (self.status_group, control_requests.STATUS_COMMANDS),
        ):
            if group is None:
                continue
            if group in peer_credentials.unmistakable_groups({group}) & groups:
                return commands
        return ()
