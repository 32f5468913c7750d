"""A shared queue for forked children: a small protector for programs that run without one.

The parent binds.  A separate process accepts, and puts each connection into a queue that all
children share, in the format of docs/protocol.md.  accepting.py explains why a thread cannot do it.

Under a protector the children use the protector's queue, and nothing is bound or started.

Source: unix(7); docs/protocol.md, section "Channel".
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys

from . import accepting, fork_hook, wire
from .address import close_all, listen, name_of
from .channel import Channel, has_ended, has_waiting
from .children import Children
from .intake import Intake
from .serving import serve_from
from .system import Socket
from .worker import DEFAULT_BACKLOG, current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional

    from .address import ListenAddress
    from .serving import Handler

#: The protector's default of --queue.
DEFAULT_QUEUE = 256


class SocketServer:
    """A listening socket whose connections wait in one queue for the next free child.

    Make it before forking; it leaves no thread in the parent.  Each SocketServer has its own
    queue, so one program may have several.
    """

    _closed = _stopping = False
    # In the parent only: the accepting process, and its line; closing the line stops the process.
    _process: Optional[subprocess.Popen[bytes]] = None
    _line: Optional[socket.socket] = None
    # In a child, while it takes connections.
    _intake: Optional[Intake] = None

    #: The queue; None: the children accept from listening sockets (`--handoff listener`).
    _channel: Optional[Channel] = None

    def __init__(
        self,
        address: Optional[ListenAddress] = None,
        *,
        queue: int = DEFAULT_QUEUE,
        backlog: int = DEFAULT_BACKLOG,
    ) -> None:
        """Bind and begin to accept.  Clients may connect and send before there is a child.

        address: where to listen; ignored under a protector.
        queue: about how many connections may wait; further connections stay in the backlog.

        Raises ValueError for a queue below 6, or if there is neither a protector nor an address.
        Raises OSError if the address cannot be bound, or the accepting process not started.
        Raises RuntimeError for a second SocketServer under a protector, which has only one queue.
        """
        if queue < wire.SMALLEST_QUEUE:
            raise ValueError(
                f"cannot work with queue={queue}: at least {wire.SMALLEST_QUEUE} is needed"
            )
        self._children = Children()
        worker = current()
        if not worker.is_served:
            self._start(address, queue, backlog)
            return
        if worker.is_lent:
            raise RuntimeError(
                "cannot make a second SocketServer under a protector: its workers share one "
                "queue; close the first, or give it both ports and read client.listener"
            )
        worker.is_lent = True
        self._channel = worker.channel

    @property
    def listeners(self) -> tuple[str, ...]:
        """The listen addresses, such as `tcp:0.0.0.0:4321`; port 0 shows as the chosen port."""
        if self._channel is not None:
            return self._channel.listeners
        return current().passed_names

    def client(self, handler: Handler, *, threads: int = 1, limit: Optional[int] = None) -> None:
        """Call handler(socket, client's address) for each connection.  For a child.

        The socket is closed after the handler; only then a thread takes the next connection.  An
        exception in a handler is logged.  Returns at the end of the queue: the server was closed,
        or the parent has ended.  Also returns after a SIGTERM, when the current connections are
        served; the queue stays for the other children.
        """
        worker = current()
        limit = threads if limit is None else limit
        if self._channel is None:
            self._intake = worker.open_intake(None, limit)
        else:
            self._intake = worker.open_queue(self._channel, limit)
        try:
            serve_from(worker, self._intake, handler, threads)
        finally:
            self._intake = None

    def run(
        self,
        handler: Handler,
        children: int = 1,
        *,
        threads: int = 1,
        limit: Optional[int] = None,
        allow_threads: bool = False,
    ) -> None:
        """Fork children that call `client(handler)`; return when all have ended.  For the parent.

        The other arguments and the errors are those of `client` and `fork`.
        """

        def work() -> None:
            self.client(handler, threads=threads, limit=limit)

        self.fork(work, children, allow_threads=allow_threads)

    def fork(
        self, work: Callable[[], object], children: int = 1, *, allow_threads: bool = False
    ) -> None:
        """Fork children that call work(); return when all have ended.  For the parent.

        work takes connections by any way of this library; all take from this server's queue.  A
        child that ends is replaced at once.  USR1 forks one more, also if it came while the program
        blocked USR1.  If the program does not handle SIGTERM, that signal closes the server: the
        children serve the connected clients, then end.  Call it in the main thread.

        Raises ValueError for fewer than 1 or more than 1,024 children.  Raises RuntimeError if
        other threads run, unless allow_threads.  Raises ChildProcessError if a child ends before
        all have served, or if the accepting process was killed.
        """

        def begin() -> None:
            if self._channel is not current().channel:
                current().shared = self._channel
            work()

        try:
            self._children.run(
                begin,
                children,
                self._stop,
                self._is_over,
                self._is_left,
                allow_threads=allow_threads,
            )
        finally:
            self.close()
        if self._process is not None and self._process.returncode:
            raise ChildProcessError(
                f"cannot continue: the accepting process ended with {self._process.returncode}"
            )

    def close(self, timeout_s: Optional[float] = None) -> None:
        """Refuse new clients; the children serve the connected ones, then the queue ends.

        In the parent: returns once all connected clients are in the queue and the address is free.
        While the queue is full, this waits; clients that are not in the queue after timeout_s are
        disconnected.  In a child: only that child's `client` returns, after its current
        connection.  Under a protector the queue stays: it belongs to the protector.
        """
        if self._closed:
            return
        self._closed = True
        if self._intake is not None:  # called in a signal handler: make `client` return
            self._intake.drained()
            self._intake.interrupt()
            if self._process is None:
                return
        if self._process is None and self._channel is current().channel:
            current().is_lent = False
            self._stop()
            return
        self._stop()
        # Otherwise the accepting process would wait for ever, for room in a queue without readers.
        if self._channel is not None:
            self._channel.close()
        if self._line is not None and self._process is not None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._line.close()

    def __enter__(self) -> SocketServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def after_fork_in_child(self) -> None:
        # The accepting process is the parent's, and must end with it.
        self._children = Children()
        if self._line is not None and self._process is not None:
            self._line.close()
            # poll() notices that this is no child of ours, so that no later wait() waits for it.
            self._process.poll()
            self._line = self._process = None

    def __getstate__(self) -> Mapping[str, Any]:
        """Return the state for multiprocessing, which passes a server to a spawned process.

        Raises RuntimeError outside such a spawn.
        """
        from multiprocessing import context, reduction

        context.assert_spawning(self)
        if self._channel is None:
            raise RuntimeError("cannot pass listening sockets to a spawned process: fork it")
        return {
            "channel": reduction.DupFd(self._channel.fileno()),
            "listeners": self.listeners,
            "under_protector": self._channel is current().channel,
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        fd = state["channel"].detach()
        os.set_inheritable(fd, False)
        self._children = Children()
        if state["under_protector"]:
            # These inherited variables hold for the parent only.
            for name in (wire.ENV_RETURN, wire.ENV_SCOREBOARD, "WATCHDOG_USEC"):
                os.environ.pop(name, None)
            os.environ[wire.ENV_CHANNEL] = str(fd)
            channel = current().channel
            assert channel is not None
            self._channel = channel
        else:
            self._channel = Channel(fd, state["listeners"])

    # The accepting process

    def _start(self, address: Optional[ListenAddress], queue: int, backlog: int) -> None:
        sockets = listen(address, backlog)
        try:
            sockets[:] = map(_above_standard_streams, sockets)
            named = {one.fileno(): name_of(one.family, one.getsockname()) for one in sockets}
            read, write = _pair(socket.SOCK_SEQPACKET)
            with read, write:
                # The write end is never read.  If a child sent something, the next child would
                # get ECONNRESET when this end is closed (unix_release_sock).
                write.shutdown(socket.SHUT_RD)
                # The kernel clamps this value to net.core.wmem_max, and then doubles it.
                room = queue * wire.RECORD_CHARGE_BYTES // 2
                write.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
                self._spawn(write.fileno(), named)
                self._channel = Channel(read.detach(), tuple(named.values()))
        except BaseException:
            close_all(sockets)
            raise
        for one in sockets:
            one.close()  # the accepting process has copies, and removes the paths of UNIX sockets
        fork_hook.register(self)

    def _spawn(self, queue_fd: int, named: Mapping[int, str]) -> None:
        if not sys.executable:
            raise OSError("cannot start the accepting process: sys.executable names no interpreter")
        words = accepting.arguments(queue_fd, named)
        self._line, theirs = _pair(socket.SOCK_STREAM)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    # -I -S: without the program's environment, and with this package only.
                    [sys.executable, "-I", "-S", "-c", accepting.PROGRAM, *words],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    pass_fds=(queue_fd, *named),
                    start_new_session=True,  # Ctrl-C is for the program
                )
            if not self._line.recv(1):
                status = self._process.wait()
                raise OSError(f"cannot start the accepting process: it ended with {status}")
        except BaseException:
            self._line.close()
            raise

    def _stop(self) -> None:
        """Begin to close the server, without waiting."""
        self._stopping = True
        if self._line is not None:
            try:
                self._line.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the accepting process was killed
        elif self._channel is current().channel:
            self._children.terminate()

    def _is_over(self) -> bool:
        """Return whether no more connections will come, so that no child is replaced."""
        if self._stopping:
            return True
        if self._process is not None:
            return self._process.poll() is not None
        return current().drain.begun()

    def _is_left(self) -> bool:
        """Return whether clients of a queue that ends would be lost without a child."""
        if self._channel is None or self._channel.fileno() < 0:
            return False
        ended = has_ended(self._channel)
        if self._process is None and (self._stopping or not ended or current().has_retired):
            return False  # under a protector, other workers take from the queue
        return not ended or has_waiting(self._channel)


def _pair(kind: int) -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    return _above_standard_streams(one), _above_standard_streams(other)


def _above_standard_streams(one: socket.socket) -> socket.socket:
    """Return the socket with a descriptor from 3 on; takes ownership.  Raises OSError.

    A program whose stdin is closed gets descriptor 0 for its next socket.  In the accepting
    process, the line to the parent has this number.
    """
    if one.fileno() > 2:
        return one
    copy = Socket(fileno=fcntl.fcntl(one.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))
    one.close()
    return copy
