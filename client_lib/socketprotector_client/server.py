"""A parent accepts, the children it forks take turns: a small protector, where there is none.

The parent binds; a process beside it accepts (accepting.py says why no thread) and puts each
connection into a queue that all children share, in the format of docs/protocol.md.

Under a protector the queue is the protector's, and nothing is bound or started.

Source: unix(7); docs/protocol.md, section "Channel".
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from . import accepting, forking, wire
from .address import close_all, listen, name_of
from .channel import Channel
from .children import Children
from .intake import Intake
from .log import Logger
from .serving import serve_from
from .worker import DEFAULT_BACKLOG, current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    from .address import ListenAddress
    from .serving import Handler

_log = Logger(__name__)

#: As the protector's --queue.
DEFAULT_QUEUE = 256


class SocketServer:
    """A listening socket whose connections wait in one queue for whichever child is free.

    Make it before forking; it leaves no thread in the parent.  Each has a queue of its own, so
    one program may have several.
    """

    _closed = _stopping = False
    # The accepting process, and the line to it, whose end ends it; both in the parent only.
    _process: Optional[subprocess.Popen[bytes]] = None
    _line: Optional[socket.socket] = None
    # In a child, while it takes connections.
    _intake: Optional[Intake] = None

    def __init__(
        self,
        address: Optional[ListenAddress] = None,
        *,
        queue: int = DEFAULT_QUEUE,
        backlog: int = DEFAULT_BACKLOG,
    ) -> None:
        """Bind and begin to accept.  Clients may connect, and send, before there is a child.

        address: where to listen; ignored under a protector.
        queue: about how many connections wait untaken; further ones stay in the backlog.

        Raises ValueError without protector and address and for a queue below 6, OSError if the
        address cannot be bound or the accepting process not started, and under a protector
        RuntimeError for a second one: there is only one queue.
        """
        if queue < wire.SMALLEST_QUEUE:
            raise ValueError(
                f"cannot work with queue={queue}: at least {wire.SMALLEST_QUEUE} is needed"
            )
        self._children = Children()
        worker = current()
        if worker.channel is None:
            self._start(address, queue, backlog)
            return
        if worker.is_lent:
            raise RuntimeError(
                "cannot make a second SocketServer under a protector: its workers share one "
                "queue; close the first one, or give both ports to one and ask client.listener"
            )
        worker.is_lent = True
        self._channel = worker.channel

    @property
    def listeners(self) -> tuple[str, ...]:
        """The listen addresses, such as `tcp:0.0.0.0:4321`, with the port that was chosen for 0."""
        return self._channel.listeners

    def client(self, handler: Handler) -> None:
        """In a child: call handler(socket, client's address), one connection after the other.

        The socket is closed after the handler, and the next one is taken only when the last
        is closed.  Returns at the end of the queue (the server was closed, or its parent is
        gone), and at SIGTERM after the connection it has; the queue is then left to other children.
        An exception in a handler is logged.
        """
        worker = current()
        self._intake = worker.open_queue(self._channel, limit=1)
        try:
            serve_from(worker, self._intake, handler, threads=1)
        finally:
            self._intake = None

    def run(self, handler: Handler, children: int = 1) -> None:
        """In the parent: fork children that call `client(handler)`; return when all have ended.

        USR1 forks one more.  SIGTERM, where the program does not handle it, closes the server: the
        children serve clients that have connected, then end.  A child that dies is not replaced.
        Call it in the main thread.

        Raises ChildProcessError if the accepting process was killed, or under a protector
        if no child is left (the protector then starts this program again).
        """
        try:
            self._children.run(lambda: self.client(handler), children, self._stop, self._is_over)
        finally:
            self.close()
        if self._process is not None and self._process.returncode:
            raise ChildProcessError(
                f"cannot go on: the accepting process ended with {self._process.returncode}"
            )

    def close(self, timeout_s: Optional[float] = None) -> None:
        """Let no new client in; the children serve those that have connected, then the queue ends.

        In the parent: returns once all that had connected are in the queue and the address
        is free.  That takes as long as the queue is full; after timeout_s those that are not in it
        are cut off.  In a child only that child's `client` returns, after the connection it
        has.  Under a protector, whose queue it is, nothing else ends.
        """
        if self._closed:
            return
        self._closed = True
        if self._intake is not None:  # this is a handler of a signal: let `client` return
            self._intake.drained()
            self._intake.interrupt()
            if self._process is None:
                return
        if self._process is None and self._channel is current().channel:
            current().is_lent = False
            return
        self._stop()
        # Else the accepting process would wait for ever for room in a queue that no child reads.
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
            self._process.poll()  # no child of ours: so it is not missed at the end
            self._line = self._process = None

    def __getstate__(self) -> Mapping[str, Any]:
        """For multiprocessing, which passes it to a process that it spawns; nothing else may."""
        from multiprocessing import context, reduction

        context.assert_spawning(self)
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
            # What this process inherited of the environment is true of its parent only.
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
            named = {one.fileno(): name_of(one.family, one.getsockname()) for one in sockets}
            read, write = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with read, write:
                # Nothing is read there, and what a child had sent would be an ECONNRESET for the
                # child that takes next once this end is closed (unix_release_sock).
                write.shutdown(socket.SHUT_RD)
                # The kernel doubles what is asked, and clamps it to net.core.wmem_max before.
                room = queue * wire.RECORD_CHARGE_BYTES // 2
                write.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
                self._spawn(write.fileno(), named)
                self._channel = Channel(read.detach(), tuple(named.values()))
        except BaseException:
            close_all(sockets)
            raise
        for one in sockets:
            one.close()  # the accepting process has them, and removes the paths of UNIX ones
        forking.register(self)

    def _spawn(self, queue_fd: int, named: Mapping[int, str]) -> None:
        if not sys.executable:
            raise OSError("cannot start the accepting process: sys.executable names no interpreter")
        words = accepting.arguments(queue_fd, named)
        self._line, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    # -I -S: nothing of the program's environment, nothing but this package.
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
        """Begin to close, without waiting."""
        self._stopping = True
        if self._line is not None:
            try:
                self._line.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it was killed
        elif self._channel is current().channel:
            self._children.terminate()

    def _is_over(self) -> bool:
        """Whether no more will be asked of children, now that none is left."""
        if self._stopping:
            return True
        if self._process is not None:
            return self._process.poll() is not None
        if not current().drain.begun():
            _log.error("no child is left; this program ends, and the protector starts it again")
            raise ChildProcessError("cannot serve: no child is left")
        return True
