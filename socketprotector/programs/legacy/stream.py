"""The abstract stream socket of one port, over which the daemon gets its connections.

Each message is one byte with a descriptor.  The socket's name passes from worker to worker: a
worker frees it when its child has connected.  Source: docs/stdio.md, unix(7).
"""

from __future__ import annotations

import _socket as socket
import errno
import fcntl
import sys
import termios

#: The C++ SocketProtector and its daemons use addresses of full length: names end in NULs.
SUN_PATH_BYTES = 108
#: Workers that wait for a name connect here, and get a hang-up when the name is free.  No worker
#: accepts these connections.
_QUEUE_NAME = "\0socketprotector.legacy.%d"
#: The smallest send buffer: writable while at most one message is unread.
_SNDBUF_BYTES = 1
_WAITING = 128
_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK


class Stream:
    """The stream of one port to the child: a listener with the port's name, then a connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.name = f"\0sock_srv_{port}".encode().ljust(SUN_PATH_BYTES, b"\0")
        self.queue: socket.socket | None = None
        self.listener: socket.socket | None = None
        self.connection: socket.socket | None = None
        self.room = False  # for one more message

    def claim(self) -> bool:
        """Become the next in line for the name (queue), then take it; return whether we have it."""
        if self.queue is None:
            self.queue = listen((_QUEUE_NAME % self.port).encode())
        if self.queue is not None:
            self.listener = listen(self.name)
        return self.listener is not None

    def knock(self) -> socket.socket | None:
        """Return a connection that ends when no worker is next in line for the name any more.

        None: we are the next in line, or the connection fails.
        """
        return None if self.queue is not None else connect((_QUEUE_NAME % self.port).encode())

    def holder(self) -> str:
        """Return which process has the name that we want, in words."""
        # If we are the next in line, no other worker has the name.  Otherwise do not connect to the
        # name itself, because its worker would log that connection.
        line = self.knock() if self.queue is None else connect(self.name)
        if line is None:
            return "another process"
        pid = peer_of(line)
        line.close()
        return described(pid)

    def take(self, connection: socket.socket) -> None:
        """Take ownership of the child's connection, and free the name for the next worker."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SNDBUF_BYTES)
        self.connection = connection
        # In this order: the next worker then finds the name free.
        for each in (self.listener, self.queue):
            if each is not None:
                each.close()
        self.listener = self.queue = None

    def send(self, fd: int) -> bool:
        """Send a descriptor, which stays ours; return whether there was room for it.

        Raises OSError if the child has closed its end.
        """
        assert self.connection is not None
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))
        self.room = False  # unknown until poll() reports it
        try:
            self.connection.sendmsg([b"x"], [rights], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        return True


def listen(name: bytes) -> socket.socket | None:
    """Return a listener with an abstract name; None: the name is in use."""
    listener = socket.socket(socket.AF_UNIX, _STREAM)
    try:
        listener.bind(name)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    listener.listen(_WAITING)
    return listener


def connect(name: bytes) -> socket.socket | None:
    """Return a connection to an abstract name; None: no process listens, or its backlog is full."""
    line = socket.socket(socket.AF_UNIX, _STREAM)
    try:
        line.connect(name)
    except OSError:
        line.close()
        return None
    return line


def is_unread(connection: socket.socket) -> bool:
    """Return whether the other side has not read all that was sent."""
    return fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)) != bytes(4)


def peer_of(connection: socket.socket) -> int:
    """Return the pid of the process that called connect() or, on the other side, listen()."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(found[:4], sys.byteorder)


def described(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return f"process {pid} ({file.read().decode('utf-8', 'backslashreplace').strip()})"
    except OSError:
        return f"process {pid}"
