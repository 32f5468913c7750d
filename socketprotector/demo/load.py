"""A load client that counts every failure by kind, for the demo and the tests.

It holds many line conversations in one thread of its own: connect, send `hello N`,
expect a reply that ends with the same line (`[pid] hello N`), close.  No failure is
retried or hidden: each keeps its kind and its time.  So a caller that kills a worker can
separate that worker's connections (`split_by_kills`) from connections that the protector lost.

    with Load("127.0.0.1:4321", concurrency=16) as load:
        ...
        load.wait_for(lambda now: new_pid in now.pids)
    assert not load.snapshot().failures

For measurements use bench/load.c, in the repository, which needs a third of the CPU time.
"""

from __future__ import annotations

import errno
import heapq
import os
import re
import select
import socket
import threading
import time
from array import array
from collections.abc import Callable
from typing import Any, Self

from .seen import BUCKETS, KINDS, Failure, Kind, Snapshot, bucket_of

__all__ = ["KINDS", "Failure", "Kind", "Load", "Snapshot", "parse_address"]

#: Other errors (no free port or descriptor) become "local": they are the client's own fault.
#: They are counted, too, because a run with such failures has measured nothing.
KIND_OF_ERRNO: dict[int, Kind] = {
    errno.ECONNREFUSED: "refused",
    errno.ENOENT: "refused",
    errno.ECONNRESET: "reset",
    errno.ECONNABORTED: "reset",
    errno.EPIPE: "reset",
    errno.ETIMEDOUT: "timed_out",
}

AFTER_FAILURE_S = 0.01  # a refusal comes at once: do not try again in a busy loop
BACKLOG_FULL_S = 0.001  # a full UNIX backlog says EAGAIN where a blocking client would wait
SWEEP_S = 0.05
CATCH_UP_S = 0.01
PID = re.compile(rb"\[(\d+)\] ")
AUTOMATIC = re.compile(rb"\0[0-9a-f]{5}")
HTTP = b"GET /hello-%d HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def parse_address(text: str) -> tuple[socket.AddressFamily, Any]:
    """Return the family and the address for connect().

    text: HOST:PORT or [HOST6]:PORT, also after `tcp:`; unix:/path, unix:@name or /path.
    """
    if text.startswith(("unix:", "/")):
        path = text.removeprefix("unix:")
        return socket.AF_UNIX, "\0" + path[1:] if path.startswith("@") else path
    host, _, port = text.removeprefix("tcp:").rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    return found[0][0], found[0][4]


def _port_of(sock: socket.socket) -> int:
    try:
        name = sock.getsockname()
    except OSError:
        return 0
    if isinstance(name, bytes):  # the automatic name of a UNIX client
        return client_number(name)
    return int(name[1]) if isinstance(name, tuple) else 0


def client_number(name: bytes) -> int:
    """Return the number in the automatic name of a UNIX socket (unix(7)); 0 for another name."""
    return int(name[1:], 16) if AUTOMATIC.fullmatch(name) else 0


class _Conversation:
    __slots__ = (
        "answered", "connecting", "due_s", "ending", "line", "lines_left",
        "pid", "reply", "sock", "started_s", "wanted",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, started_s: float, lines: int) -> None:
        self.sock = sock
        self.started_s = started_s
        self.due_s = 0.0  # when the line now sent, or the end, counts as timed out
        self.lines_left = lines
        self.line = b""
        self.wanted = b""  # the expected end of the reply
        self.reply = b""
        self.pid: int | None = None
        self.connecting = False
        self.answered = False
        self.ending = False


class Load:
    """Keeps `concurrency` conversations open, in a thread, from start() until stop().

    Each conversation sends `lines` lines, `pause_s` apart, then closes.  The same worker must
    answer all lines.
    until_eof: shut our side down first and wait for end of file, which shows that no other process
    keeps a copy of the connection.
    rate_per_s: the most conversations begun per second.
    count: end the load after so many conversations.
    timeout_s: the limit for each line and for the end.
    http: request a line by `GET /hello-N`, one request for each connection.
    """

    def __init__(
        self,
        address: str,
        *,
        concurrency: int = 8,
        rate_per_s: float | None = None,
        timeout_s: float = 10.0,
        lines: int = 1,
        pause_s: float = 0.0,
        until_eof: bool = False,
        count: int | None = None,
        http: bool = False,
    ) -> None:
        self._family, self._address = parse_address(address)
        self._concurrency = concurrency
        self._gap_s = 1 / rate_per_s if rate_per_s else 0.0
        self._timeout_s = timeout_s
        self._lines = lines
        self._pause_s = pause_s
        self._until_eof = until_eof
        self._http = http
        self._left = count
        self._changed = threading.Condition()  # guards all below
        self._open: dict[int, _Conversation] = {}
        self._pauses: list[tuple[float, int, _Conversation]] = []
        self._next_begin_s = 0.0
        self._full_since_s = 0.0  # 0 while the backlog has room
        self._begun = self._finished = self._said = self._backlog_full = 0
        self._failures: list[Failure] = []
        self._pids: dict[int, int] = {}
        self._buckets = array("Q", bytes(8 * BUCKETS))
        self._stopping = self._ended = False
        self._broken: BaseException | None = None
        self._poll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def start(self) -> Self:
        """Begin the load, and return at once."""
        self._thread.start()
        return self

    def snapshot(self) -> Snapshot:
        """Return the counts so far."""
        with self._changed:
            return self._snapshot()

    def wait_for(self, fact: Callable[[Snapshot], bool], timeout_s: float = 30.0) -> Snapshot:
        """Return the first snapshot for which `fact` is true.

        Raises TimeoutError, with the last snapshot in words, after `timeout_s` or at the load's
        end.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while not fact(now := self._snapshot()):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or self._ended:
                    raise TimeoutError(f"not within {timeout_s} s: {now}") from self._broken
                self._changed.wait(left_s)
            return now

    def stop(self) -> Snapshot:
        """End the load after the open conversations, or their timeouts; return all counts."""
        with self._changed:
            self._stopping = True
            if not self._ended:
                os.eventfd_write(self._wake, 1)
        return self.join()

    def hurry(self) -> None:
        """Begin no more conversations; make each open one send its last line at once and end."""
        with self._changed:
            self._stopping = True
            if self._ended:
                return
            pausing = {id(entry[2]) for entry in self._pauses}
            self._pauses = [(0.0, number, each) for _, number, each in self._pauses]
            heapq.heapify(self._pauses)
            for conversation in self._open.values():
                conversation.lines_left = 1 if id(conversation) in pausing else 0
            os.eventfd_write(self._wake, 1)

    def join(self) -> Snapshot:
        """Wait until a load with `count` has ended, and return all counts."""
        self._thread.join()
        if self._broken is not None:
            raise RuntimeError("the load client itself failed") from self._broken
        return self.snapshot()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            time.monotonic(), self._begun, len(self._open), self._finished, tuple(self._failures),
            dict(self._pids), self._backlog_full, self._buckets[:],
        )  # fmt: skip

    # What follows runs in the load's own thread.

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            self._broken = error
        finally:
            with self._changed:
                for conversation in self._open.values():
                    conversation.sock.close()
                self._poll.close()
                os.close(self._wake)
                self._ended = True
                self._changed.notify_all()

    def _loop(self) -> None:
        sweep_s = 0.0
        while True:
            with self._changed:
                now_s = time.monotonic()
                while self._pauses and self._pauses[0][0] <= now_s:
                    self._say(heapq.heappop(self._pauses)[2])
                while self._may_begin() and now_s >= self._next_begin_s:
                    self._begin()
                if not self._open and (self._stopping or self._left == 0):
                    return
                wake_s = sweep_s
                if self._may_begin():
                    wake_s = min(wake_s, self._next_begin_s)
                if self._pauses:
                    wake_s = min(wake_s, self._pauses[0][0])
            polled_s = time.monotonic()
            ready = self._poll.poll(max(0.0, wake_s - polled_s))
            with self._changed:
                for fd, events in ready:
                    if fd == self._wake:
                        os.eventfd_read(fd)
                    elif fd in self._open:
                        self._go_on(self._open[fd], events)
                # After the reads: if this process was suspended, an answer may have come in time.
                if polled_s >= sweep_s:
                    sweep_s = polled_s + SWEEP_S
                    self._fail_late(polled_s)
                self._changed.notify_all()

    def _fail_late(self, now_s: float) -> None:
        for late in [each for each in self._open.values() if 0 < each.due_s < now_s]:
            self._fail(late, "timed_out", "the end" if late.ending else repr(late.line))

    def _may_begin(self) -> bool:
        return not self._stopping and self._left != 0 and len(self._open) < self._concurrency

    def _begin(self) -> None:
        now_s = time.monotonic()
        # epoll sleeps for whole milliseconds: make up for that excess, but not for longer delays.
        self._next_begin_s = max(self._next_begin_s + self._gap_s, now_s - CATCH_UP_S)
        try:
            sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._count_failure("local", now_s, None, str(error))
            return
        if self._family == socket.AF_UNIX:
            sock.bind("")  # an automatic name, so that a server can distinguish its clients
        code = sock.connect_ex(self._address)
        if code == errno.EAGAIN and self._family == socket.AF_UNIX:
            self._backlog_full += 1
            self._next_begin_s = now_s + BACKLOG_FULL_S
            sock.close()
            self._full_since_s = self._full_since_s or now_s
            if now_s - self._full_since_s > self._timeout_s:
                self._count_failure("timed_out", self._full_since_s, None, "a full backlog")
                self._full_since_s = 0.0
            return
        self._full_since_s = 0.0
        self._begun += 1
        if self._left is not None:
            self._left -= 1
        conversation = _Conversation(sock, now_s, self._lines)
        self._open[sock.fileno()] = conversation
        self._poll.register(sock.fileno(), select.EPOLLIN)
        if code not in (0, errno.EINPROGRESS):
            self._fail_errno(conversation, OSError(code, os.strerror(code)))
        else:
            self._say(conversation)

    def _say(self, conversation: _Conversation) -> None:
        if conversation.sock.fileno() < 0:
            return  # it failed during its pause
        self._said += 1
        conversation.lines_left -= 1
        conversation.reply = b""
        conversation.line = conversation.wanted = b"hello %d\n" % self._said
        if self._http:
            conversation.line, conversation.wanted = HTTP % self._said, b"hello-%d\n" % self._said
        conversation.due_s = time.monotonic() + self._timeout_s
        self._send(conversation)

    def _send(self, conversation: _Conversation) -> None:
        try:
            conversation.sock.send(conversation.line)
        except BlockingIOError:  # still connecting: the backlog is full
            conversation.connecting = True
            self._poll.modify(conversation.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        except OSError as error:
            self._fail_errno(conversation, error)
        else:
            if conversation.connecting:
                conversation.connecting = False
                self._poll.modify(conversation.sock.fileno(), select.EPOLLIN)

    def _go_on(self, conversation: _Conversation, events: int) -> None:
        if conversation.connecting:
            if events & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
                self._send(conversation)
            return
        try:
            received = conversation.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail_errno(conversation, error)
            return
        conversation.reply += received
        awaited = conversation.due_s != 0 and not conversation.ending
        if not received and conversation.ending:
            self._finish(conversation)
        elif not received:
            # HTTP servers send head and body separately, and can be killed in between.
            begun = conversation.reply and awaited and not self._http
            kind: Kind = "wrong" if begun else "empty"
            self._fail(conversation, kind, f"end of file after {conversation.reply!r}")
        elif not awaited:
            self._fail(conversation, "wrong", f"not asked for: {conversation.reply!r}")
        elif conversation.reply.endswith(conversation.wanted if self._http else b"\n"):
            self._answered(conversation)

    def _answered(self, conversation: _Conversation) -> None:
        found = PID.search(conversation.reply)
        pid = int(found[1]) if found else None
        if not conversation.reply.endswith(conversation.wanted):
            self._fail(conversation, "wrong", repr(conversation.reply))
            return
        if conversation.answered and pid != conversation.pid:
            self._fail(conversation, "wrong", f"begun by {conversation.pid}, now by {pid}")
            return
        now_s = time.monotonic()
        if not conversation.answered:
            conversation.answered = True
            conversation.pid = pid
            self._buckets[bucket_of(now_s - conversation.started_s)] += 1
        if pid is not None:
            self._pids[pid] = self._pids.get(pid, 0) + 1
        if conversation.lines_left > 0:
            conversation.due_s = 0.0
            heapq.heappush(self._pauses, (now_s + self._pause_s, id(conversation), conversation))
        elif self._until_eof:
            conversation.ending = True
            conversation.reply = b""
            conversation.due_s = now_s + self._timeout_s
            try:
                conversation.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._fail_errno(conversation, error)
        else:
            self._finish(conversation)

    def _finish(self, conversation: _Conversation) -> None:
        self._finished += 1
        self._close(conversation)

    def _close(self, conversation: _Conversation) -> None:
        # A plain close, so that the server reads an ordinary end of file.  The TIME_WAIT that this
        # leaves with us does no harm: over loopback the kernel reuses such a port after 1 s
        # (tcp_tw_reuse = 2).  That allows 28,000 connections/s, more than this client makes.
        del self._open[conversation.sock.fileno()]
        conversation.sock.close()

    def _fail_errno(self, conversation: _Conversation, error: OSError) -> None:
        self._fail(conversation, KIND_OF_ERRNO.get(error.errno or 0, "local"), str(error))

    def _fail(self, conversation: _Conversation, kind: Kind, detail: str) -> None:
        port = _port_of(conversation.sock)
        self._count_failure(kind, conversation.started_s, conversation.pid, detail, port)
        self._close(conversation)

    def _count_failure(
        self, kind: Kind, started_s: float, pid: int | None, detail: str, port: int = 0
    ) -> None:
        now_s = time.monotonic()
        self._failures.append(Failure(kind, now_s, started_s, pid, detail, port))
        self._next_begin_s = max(self._next_begin_s, now_s + AFTER_FAILURE_S)
