"""The relay: carries what the workers (and the protector) print to where the log goes.

A process of its own, so that no output depends on the protector; it lives as long
as its last writer.  It also remembers the last of what each worker has written: a failed
worker's last words, for which the protector asks.  Run as a script, on the standard library
alone:

    python log_relay.py NAME KIND PREFIXED LINE-DESCRIPTOR

On stdin are lines for syslog, if it is a pipe; they may begin with <N>, sd-daemon(3).  LINE is a
SEQPACKET socket on which the protector says:

    +NUMBER GENERATION PID   with a pipe: a worker's output.  PREFIXED 1: each line says whose it is
    -NUMBER                  reads what a pipe has and closes it, although a process may still write
    =                        with a descriptor: where lines go from now on (after a rotation)
    !                        ends: another relay follows, and reads what is in the pipes
    ?NUMBER                  asks for the worker's last words.  Answered with NUMBER, a newline and
                             the last bytes of all that was in its pipe by then, which have been
                             passed on before

A descriptor that it has no room for it never gets: it says the + or = again, with the number, and
is to be told once more.

KIND says where lines go: `syslog`, `journal` (a stream that wants <N> first), or `lines`: the
latter two are stdout at first.
"""

from __future__ import annotations

import _socket as socket
import os
import select
import signal
import sys
import syslog
import time

#: What is remembered of a worker, and of how many that have ended.
TAIL_BYTES = 4096
ENDED = 1024
#: A longer line goes out in pieces: syslog daemons cut at 8 KiB.
LINE_BYTES = 8000
#: Into a file it goes whole, unless it is longer than this.
HELD_BYTES = 256 * 1024
_READ_BYTES = 65536
#: For how long lines are gathered once some were passed on.  Else each line of a worker that writes
#: one after the other would wake us, and on a busy machine that worker would have to wait for us.
_GATHER_MS = 5
#: A writer of so much meanwhile will fill its pipe, and would have to wait: no gathering then.
_MANY_BYTES = 16384
_HURRY_S = 0.1
#: A pipe holds as many reads at most (fs.pipe-max-size).
_READS = 16
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def log(line: bytes) -> None:
    """Send one line to syslog, with the priority it begins with if it does."""
    priority = syslog.LOG_INFO
    if len(line) > 2 and line[:1] == b"<" and line[2:3] == b">" and line[1:2].isdigit():
        priority, line = int(line[1:2]) & 7, line[3:]
    text = line.decode("utf-8", "backslashreplace").replace("\0", "\\0")
    for at in range(0, len(text), LINE_BYTES):
        syslog.syslog(priority, text[at : at + LINE_BYTES])


class Stream:
    """The lines of one writer."""

    def __init__(self, fd: int, number: int, prefix: bytes) -> None:
        """number: the worker's, -1 for the shared one.  prefix: of each line; it may be empty."""
        self.fd = fd
        self.number = number
        self.prefix = prefix
        self.rest = b""  # a line whose end has not come yet
        self.tail = b""  # the last of it


class Relay:
    """Reads from all there are, until no process is left that could write or bring another."""

    def __init__(self, line: int, kind: str, *, prefixed: bool) -> None:
        self.kind = kind
        self.prefixed = prefixed
        self.line: socket.socket | None = socket.socket(fileno=line)
        self.streams: dict[int, Stream] = {}  # by descriptor
        self.known: dict[int, Stream] = {}  # by the worker's number
        self.ended: dict[int, bytes] = {}  # the last words of those that have ended
        self.cut = False  # the last line could not be written to its end
        # Not poll: that would ask for all of hundreds of pipes each time one is written to.
        self.epoll = select.epoll()
        self.epoll.register(line, select.EPOLLIN)
        self.gathering = select.poll()  # ends when the protector says something
        self.gathering.register(line, select.POLLIN)
        self.hurry_s = 0.0  # the time until which nothing is gathered

    def add(self, stream: Stream) -> None:
        """Carry it from here on.  Raises PermissionError for what is no pipe (/dev/null)."""
        self.epoll.register(stream.fd, select.EPOLLIN)
        self.streams[stream.fd] = stream
        if stream.number >= 0:
            self.known[stream.number] = stream

    def run(self) -> None:
        """Carry lines until the last one has gone."""
        while self.streams or self.line is not None:
            ready = [fd for fd, _ in self.epoll.poll()]
            if self.line is not None and self.line.fileno() in ready:
                # First: what is written after a rotation belongs into the new file.
                self.hear(self.line)
                continue
            self.gather(max(self.carry(self.streams[fd]) for fd in ready))

    def gather(self, most: int) -> None:
        """Let more lines come before we look again.  most: bytes that one had written this time."""
        if most >= _MANY_BYTES:
            self.hurry_s = time.monotonic() + _HURRY_S
        elif time.monotonic() >= self.hurry_s:
            self.gathering.poll(_GATHER_MS)

    def carry(self, stream: Stream) -> int:
        """Pass on what is there of one; return how many bytes that was."""
        try:
            data = os.read(stream.fd, _READ_BYTES)
        except BlockingIOError:
            return 0
        self.take(stream, data)
        return len(data)

    def take(self, stream: Stream, data: bytes) -> None:
        """Pass on what one has written; b"" is its end."""
        stream.tail = (stream.tail + data)[-TAIL_BYTES:]
        if self.kind == "lines" and not stream.prefix:
            self.carry_whole(stream, data)
        else:
            self.carry_lines(stream, data)
        if not data:
            self.end(stream)

    def carry_all(self, number: int) -> Stream | None:
        """Pass on all that a worker's pipe has; return its stream unless that has ended."""
        for _ in range(_READS):
            if number not in self.known or not self.carry(self.known[number]):
                break
        return self.known.get(number)

    def carry_whole(self, stream: Stream, data: bytes) -> None:
        """Write what is there as it is, up to the end of a line: so no line is torn apart."""
        whole, found, rest = (stream.rest + data).rpartition(b"\n")
        if len(rest) > HELD_BYTES:
            whole, found, rest = whole + found + rest, b"", b""
        elif not data and rest:
            whole, found, rest = whole + found + rest, b"\n", b""
        stream.rest = rest
        self.write(whole + found)

    def carry_lines(self, stream: Stream, data: bytes) -> None:
        *lines, stream.rest = (stream.rest + data).split(b"\n")
        if not data or len(stream.rest) > LINE_BYTES:
            lines, stream.rest = [*lines, *filter(None, [stream.rest])], b""
        said = [self.shown(stream.prefix, line) for line in lines]
        if self.kind != "syslog":
            self.write(b"".join(line + b"\n" for line in said))
            return
        for line in said:
            log(line)

    def shown(self, prefix: bytes, line: bytes) -> bytes:
        if self.kind != "lines" and line[:1] == b"<" and line[2:3] == b">":
            return line[:3] + prefix + line[3:]
        return prefix + line

    def end(self, stream: Stream) -> None:
        """Its last writer has gone, or is not read any more."""
        # Before closing: the protector has the pipe open, too, so it would stay in the set
        # (epoll(7)).
        self.epoll.unregister(stream.fd)
        os.close(stream.fd)
        del self.streams[stream.fd]
        if stream.number >= 0:
            del self.known[stream.number]
            self.ended[stream.number] = stream.tail
            if len(self.ended) > ENDED:
                del self.ended[next(iter(self.ended))]

    def hear(self, line: socket.socket) -> None:
        """Take in what to read from, where to write to, or a question."""
        try:
            # CMSG_SPACE of one int has room for two.
            data, control, flags, _ = line.recvmsg(256, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
        except OSError:  # it was reset
            data, control, flags = b"", [], 0
        fds = [int.from_bytes(content[:4], sys.byteorder) for _, _, content in control]
        if not data:
            self.epoll.unregister(line.fileno())
            self.gathering.unregister(line.fileno())
            line.close()
            self.line = None
        elif flags & socket.MSG_CTRUNC:
            self.say(line, data.partition(b" ")[0])
        elif data[:1] == b"?":
            self.answer(line, int(data[1:]))
        elif data[:1] == b"!":
            for each in list(self.streams.values()):
                self.take(each, b"")
            self.line = None
        elif data[:1] == b"-":
            stream = self.carry_all(int(data[1:]))
            if stream is not None:
                self.take(stream, b"")
        elif fds and data[:1] == b"=":
            os.dup2(fds[0], 1)
            os.close(fds[0])
            self.cut = False
        elif fds:
            number, generation, pid = (int(word) for word in data[1:].split())
            if number in self.known:  # told again, by a protector that did not know
                os.close(fds[0])
                return
            prefix = b"[%d %d] " % (generation, pid) if self.prefixed else b""
            self.add(Stream(fds[0], number, prefix))

    def answer(self, line: socket.socket, number: int) -> None:
        """Tell a worker's last words, once all that it has written is passed on."""
        stream = self.carry_all(number)
        tail = stream.tail if stream is not None else self.ended.get(number, b"")
        self.say(line, b"%d\n" % number + tail)

    def say(self, line: socket.socket, what: bytes) -> None:
        try:
            line.send(what, _FLAGS)
        except OSError:
            pass  # it is gone, or has stopped reading and will not wait for this

    def write(self, data: bytes) -> None:
        """Write to where lines go; what cannot be written (a full disk) is lost, and we go on."""
        if self.cut and data:
            data = b"\n" + data
        try:
            while data:
                data = data[os.write(1, data) :]
                self.cut = bool(data)
        except OSError:
            pass


def main() -> None:
    name, kind, prefixed, line = sys.argv[1:]
    # It ends at end of file only: a stop of the service must not cut off its last lines.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    syslog.openlog(name, 0, syslog.LOG_DAEMON)
    relay = Relay(int(line), kind, prefixed=prefixed == "1")
    try:
        relay.add(Stream(0, -1, b""))
    except PermissionError:
        pass  # /dev/null: nothing writes there
    relay.run()


if __name__ == "__main__":
    main()
