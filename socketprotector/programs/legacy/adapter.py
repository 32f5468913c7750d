"""`--handoff legacy`: passes connections to a daemon that was built for the C++ SocketProtector.

Such a daemon connects to the abstract stream socket `sock_srv_PORT` (stream.py) and reads
connections from it; end of file means drain.  For the protector the adapter is a worker
(docs/protocol.md).  For the daemon it is the writer of the stream.  The adapter has a worker's
environment, and COMMAND becomes its child:

    python -m socketprotector.programs.legacy.adapter -- COMMAND [ARG...]

Rule: connections wait in the channel.  A stream has two unread connections at most, because a crash
of the child loses them.  The adapter itself holds one at most.

The adapter exits like its child: with the same status, or by the same signal.
Source: docs/stdio.md, unix(7).
"""

from __future__ import annotations

import _signal as signal
import _socket as socket
import errno
import os
import select
import sys
import time

from socketprotector_client import wire

from ...system import signals
from ...system.polling import events_of
from ..worker_protocol import FAILED, Notifier, Refusal, inherited, receive, write_line
from .stream import Stream, described, is_unread, peer_of

PROGRAM = "socketprotector.legacy"
#: The pauses between tries to bind a name that is in use.  The second pause is for a name that
#: another worker has, or is next in line for: that worker's hang-up can end the pause.
_RETRY_S = 0.1
_LOOK_S = 1.0
#: If a name is in use for longer, the log says so.
_LOG_S = 5.0
#: How long a child that reads no more connections may take to exit, before it is replaced.
LEAVE_S = 5.0
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_PASSED_ON = (*_STOPS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
_SO_PEERPIDFD = 77  # Linux 6.5
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
#: ETOOMANYREFS: too many descriptors of this user wait in sockets.
_SCARCE = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)
_CLOSED = select.POLLHUP | select.POLLERR | select.POLLNVAL
_NO_SIGNALS: tuple[int, ...] = ()
#: Variables of the worker that the child does not get.
_OURS = (b"SOCKETPROTECTOR_", b"NOTIFY_SOCKET=", b"WATCHDOG_")


class Adapter:
    """A worker whose child speaks the protocol of the C++ SocketProtector."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        """Take the descriptors that the environment names.  Raises Refusal."""
        if wire.ENV_CHANNEL not in environment:
            raise Refusal("must be started by SocketProtector (--handoff legacy): no channel")
        self.command = command
        self.channel = given(environment, wire.ENV_CHANNEL)
        self.line: socket.socket | None = None  # RETURN
        if wire.ENV_RETURN in environment:
            self.line = given(environment, wire.ENV_RETURN)
        if wire.ENV_SCOREBOARD in environment:  # we cannot count the child's connections
            os.close(int(environment[wire.ENV_SCOREBOARD].partition(":")[0]))
        ports = ports_of(environment.get(wire.ENV_LISTENERS, ""))
        self.by_port = {port: Stream(port) for port in sorted({*ports} - {0})}
        self.by_index = [self.by_port.get(port) for port in ports]
        self.streams = list(self.by_port.values())
        self.notifier = Notifier(environment)
        self.due: float | None = None  # of the next WATCHDOG=1
        self.pending: tuple[Stream, int] | None = None  # taken from the channel, not yet sent
        self.leaving = False  # take no more from the channel
        self.pid = self.pidfd = 0  # of the child
        self.strangers = 0
        self.wake = signals.catch(_PASSED_ON)

    def run(self) -> int:
        """Serve until the child has exited; return its os.waitstatus_to_exitcode()."""
        try:
            for stream in self.streams:  # sorted, so that no two workers wait for each other
                if not self.claim(stream):
                    return 0
            self.spawn()
            if self.connected():
                self.notifier.ready()
                self.due = time.monotonic() if self.notifier.watchdog_s else None
                self.serve()
            return self.status()
        except Exception:
            if self.pid:
                os.kill(self.pid, signal.SIGTERM)  # without us the child gets no connections
            raise

    # -- the start -------------------------------------------------------------

    def claim(self, stream: Stream) -> bool:
        """Bind the name of a stream once it is free; return False if this worker must leave."""
        log_at = time.monotonic() + _LOG_S
        while not stream.claim():
            line = stream.knock()
            if line is None:
                self.look({}, _RETRY_S)
            else:
                if line.fileno() in self.look({line.fileno(): 0}, _LOOK_S):
                    self.look({}, _RETRY_S / 10)  # its owner may close all accepted connections
                line.close()
            if self.leaving:
                return False
            if time.monotonic() > log_at:
                log_at = float("inf")
                say(f"waiting for the name sock_srv_{stream.port}, held by {stream.holder()}")
        return True

    def spawn(self) -> None:
        """Start the child, with this worker's environment except the worker's own variables."""
        try:
            self.pid = os.posix_spawnp(
                self.command[0],
                self.command,
                environment_of_child(),
                setsigmask=(),
                setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
            )
        except OSError as error:
            text = f"cannot start {self.command[0]}: {error.strerror}"
            raise Refusal(text, FAILED) from error
        self.pidfd = os.pidfd_open(self.pid)

    def connected(self) -> bool:
        """Wait until the child has connected to each name; return whether it has."""
        while waiting := [(each, each.listener) for each in self.streams if each.listener]:
            found = self.look({listener.fileno(): select.POLLIN for _, listener in waiting})
            for stream, listener in waiting:
                if listener.fileno() in found:
                    self.admit(stream, listener)
            missing = [f"sock_srv_{each.port}" for each in self.streams if each.listener]
            if missing and self.pidfd in found:
                if not self.leaving:
                    say(f"{self.command[0]} ended before it connected to {', '.join(missing)}")
                return False
            if missing and self.leaving:
                for _, listener in waiting:
                    listener.close()
                os.kill(self.pid, signal.SIGTERM)  # it has no stream on which to see end of file
                return False
        return True

    def admit(self, stream: Stream, listener: socket.socket) -> None:
        """Accept the child, or close the connection of another process."""
        try:
            fd, _ = listener._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionError):
            return
        connection = socket.socket(fileno=fd)
        if self.is_ours(connection):
            stream.take(connection)
            return
        if self.strangers == 0:
            who = described(peer_of(connection))
            say(f"sock_srv_{stream.port}: refused {who}: no child of this worker")
        self.strangers += 1
        connection.close()

    def is_ours(self, connection: socket.socket) -> bool:
        """Return whether the peer is the child, or a process that the child has started.

        While the peer's pidfd is open, the kernel does not reuse its pid.
        """
        pid = peer_of(connection)
        if pid == self.pid:  # the child is not reaped, so its pid cannot be reused
            return True
        try:
            option = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
            pidfd = int.from_bytes(option, sys.byteorder)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                return False  # the peer has exited
            pidfd = -1
        try:
            # A process cannot join a session, so this process started all processes in ours.
            ours = os.getsid(pid) == os.getpid()
            while not ours and pid > 1:
                pid = parent_of(pid)
                ours = pid == self.pid
            return ours and not (pidfd >= 0 and events_of(pidfd, select.POLLIN))
        except (OSError, ValueError):
            return False
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    # -- serving ---------------------------------------------------------------

    def serve(self) -> None:
        """Send connections to the child until there are no more, or the child reads no more."""
        connections = [(each, each.connection) for each in self.streams if each.connection]
        detached = False  # the child has gone to the background, where its children serve
        while self.pending is not None or not self.leaving:
            wanted = {
                connection.fileno(): 0 if stream.room else select.POLLOUT
                for stream, connection in connections
            }
            if self.pending is None and all(each.room for each in self.streams):
                wanted[self.channel.fileno()] = select.POLLIN
            found = self.look(wanted, child=not detached)
            if self.pidfd in found and self.has_failed():
                return self.closed()  # a process that it has started may still hold the stream
            detached = detached or self.pidfd in found
            for stream, connection in connections:
                events = found.get(connection.fileno(), 0)
                if events & _CLOSED:
                    return self.closed()
                stream.room = stream.room or bool(events)
            try:
                self.move()
            except OSError as error:
                if error.errno in _GONE:
                    return self.closed()
                if error.errno not in _SCARCE:
                    raise
                self.look({}, _RETRY_S, child=not detached)  # poll() would report room at once
        self.end_streams([connection for _, connection in connections], child=not detached)

    def end_streams(self, connections: list[socket.socket], *, child: bool) -> None:
        """Send end of file on all streams, once the child has read their connections.

        A child of several streams may exit at its first end of file.
        child: whether the child's exit ends the wait; not if its children serve.
        """
        fds = {connection.fileno(): 0 for connection in connections}
        while len(fds) > 1 and any(map(is_unread, connections)):
            found = self.look(fds, _RETRY_S, child=child)
            if self.pidfd in found or not fds.keys().isdisjoint(found):
                break  # the child has exited, or reads no more
        for connection in connections:
            connection.shutdown(socket.SHUT_WR)

    def move(self) -> None:
        """Send the pending connection.  If none is pending, take one first.

        A connection is taken only if all streams have room, because it may belong to any stream.
        """
        if self.pending is None and not self.leaving and all(each.room for each in self.streams):
            self.take()
        if self.pending is not None:
            stream, fd = self.pending
            if stream.room and stream.send(fd):
                os.close(fd)
                self.pending = None

    def take(self) -> None:
        """Take a connection from the channel, if there is one."""
        try:
            taken = receive(self.channel, say)
        except BlockingIOError:
            return  # another worker has taken it
        if taken is None:
            self.leaving = True
            return
        fd, index, _ = taken
        stream = self.by_index[index] if index < len(self.by_index) else None
        if fd >= 0 and stream is not None:
            self.pending = stream, fd
        elif fd >= 0:
            os.close(fd)

    def closed(self) -> None:
        """Wait for the exit of a child that reads no more; after LEAVE_S, exit without it."""
        for stream in self.streams:
            if stream.connection is not None:
                stream.connection.close()
        self.leaving = True
        until = time.monotonic() + LEAVE_S
        while (left_s := until - time.monotonic()) > 0:
            if self.pidfd in self.look({}, left_s):
                return
        say(f"{self.command[0]} reads no more connections but has not exited; leaving it running")
        sys.exit(1)

    def has_failed(self) -> bool:
        """Return whether the exited child has failed; status() still has to reap it."""
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        return end is not None and end.si_status != 0

    def status(self) -> int:
        """Wait for the child's exit; return its os.waitstatus_to_exitcode()."""
        while self.pidfd not in self.look({}):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    # -- waiting ---------------------------------------------------------------

    def look(
        self, wanted: dict[int, int], timeout_s: float | None = None, *, child: bool = True
    ) -> dict[int, int]:
        """Wait for events of these descriptors, a signal, the child's exit or the RETURN line.

        Returns the events by descriptor, and has handled signals and the line.
        child: whether to wait for the child's exit, too.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        if self.due is not None:
            if time.monotonic() >= self.due:
                self.notifier.send("WATCHDOG=1")
                self.due = time.monotonic() + self.notifier.watchdog_s
            until = self.due if until is None else min(until, self.due)
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        poll.register(self.wake, select.POLLIN)
        if self.line is not None:
            poll.register(self.line.fileno(), select.POLLIN)
        if self.pid and child:
            poll.register(self.pidfd, select.POLLIN)
        wait_ms = None if until is None else max(0.0, until - time.monotonic()) * 1000
        found = dict(poll.poll(wait_ms))
        if self.wake in found:
            for number in dict.fromkeys(os.read(self.wake, 512)):
                self.signalled(number)
        if self.line is not None and self.line.fileno() in found:
            self.hear(self.line)
        return found

    def signalled(self, number: int) -> None:
        """Pass a signal on to the child, because the signal is meant for the daemon."""
        if number in _STOPS:
            self.leaving = True
        if self.pid:
            os.kill(self.pid, number)  # the child is not reaped, so its pid cannot be reused

    def hear(self, line: socket.socket) -> None:
        try:
            if line.recv(64, socket.MSG_DONTWAIT):
                return  # the protector sends no data there yet
        except BlockingIOError:
            return
        except OSError:
            pass
        line.close()
        self.line = None
        self.leaving = True


def ports_of(listeners: str) -> list[int]:
    """Return the port of each listener; 0: the listener was removed.  Raises Refusal."""
    ports = []
    for each in listeners.split():
        kind, _, rest = each.partition(":")
        port = rest.rpartition(":")[2]
        if each == wire.REMOVED_LISTENER:
            ports.append(0)
        elif kind == "tcp" and port.isdigit():
            ports.append(int(port))
        else:
            raise Refusal(
                f"{each} has no port, and --handoff legacy identifies listeners by port: leave it "
                "out, or use --handoff connection"
            )
    if not any(ports):
        raise Refusal("no listener with a port is left")
    return ports


def given(environment: dict[str, str], name: str) -> socket.socket:
    """Return the socket that a variable names; no child inherits it.  Raises Refusal."""
    try:
        return socket.socket(fileno=inherited(environment, name))
    except (OSError, ValueError) as error:
        raise Refusal(f"{name}={environment[name]} is no socket of ours") from error


def environment_of_child() -> dict[bytes, bytes]:
    """Return the environment of this worker without the worker's own variables.

    The source is /proc, because Python may have added LC_CTYPE to os.environ.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            pairs = file.read().split(b"\0")
    except OSError:  # no /proc: LC_CTYPE does no harm
        pairs = [name + b"=" + value for name, value in os.environb.items()]
    pairs = [each for each in pairs if not each.startswith(_OURS)]
    return {name: value for name, found, value in (each.partition(b"=") for each in pairs) if found}


def parent_of(pid: int) -> int:
    """Return the parent of a process.  Raises OSError if there is none, or no /proc."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def say(text: str) -> None:
    write_line(PROGRAM, text)


def end_like(code: int) -> None:
    """Exit as the child did: by its signal, or with its status."""
    if code < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # only the child's core file is of use
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, _NO_SIGNALS)
        os.kill(os.getpid(), -code)
    signals.block()  # a later signal could still change the exit status
    sys.exit(code)


def main() -> None:
    if sys.argv[1:2] != ["--"] or len(sys.argv) < 3:
        say("usage: python -m socketprotector.programs.legacy.adapter -- COMMAND [ARG...]")
        sys.exit(2)
    try:
        code = Adapter(sys.argv[2:], dict(os.environ)).run()
    except Refusal as error:
        say(str(error))
        sys.exit(error.status)
    except OSError as error:
        say(f"a system call failed: {error.strerror}")
        sys.exit(FAILED)
    end_like(code)


if __name__ == "__main__":
    main()
