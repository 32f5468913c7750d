"""The relay: carries the output of the workers and the protector to the log.

The relay is a separate process, so that no output depends on the protector.  It exits when its
last writer has exited.  It also remembers the last output of each worker: the protector requests
these last words when a worker fails.  It runs as a script, on the standard library alone:

    python log_relay.py NAME KIND PREFIXED LINE

If stdin is a pipe, lines for syslog come from it; they may begin with <N>, sd-daemon(3).  LINE is
the descriptor of a SEQPACKET socket, for the protector's messages:

    +NUMBER GENERATION PID   (with a pipe) carry a worker's output; if PREFIXED is 1, each line gets
                             the worker's generation and pid
    -NUMBER                  read the rest of a worker's pipe and close it, even if a process could
                             still write to it
    =                        (with a descriptor) write lines there from now on, after a rotation
    !                        exit: another relay follows, and reads the rest of all pipes
    ?NUMBER                  send a worker's last words: pass on the rest of its pipe, then answer
                             with NUMBER, a newline and the last bytes

If the relay has no free descriptor for a message, it returns the + or = with the number, and the
protector repeats the message later.

KIND is the log: `syslog`, `journal` (lines that begin with <N>) or `lines`.  The last two go to
stdout until the first `=`.
"""

from __future__ import annotations

import _socket as socket
import os
import select
import signal
import sys
import syslog
import time

#: How much output of a worker is remembered, and of how many exited workers.
TAIL_BYTES = 4096
ENDED = 1024
#: A longer line goes out in pieces: syslog daemons cut at 8 KiB.
LINE_BYTES = 8000
#: In a file a line stays whole, unless it is longer than this.
HELD_BYTES = 256 * 1024
_READ_BYTES = 65536
#: How long to gather lines after passing some on.  Otherwise each line would wake us, and on a busy
#: machine the worker would have to wait for us.
_GATHER_MS = 5
#: A worker that writes this much in one go would fill its pipe and wait.  Then lines are not
#: gathered for _HURRY_S.
_MANY_BYTES = 16384
_HURRY_S = 0.1
#: A full pipe takes at most this many reads (fs.pipe-max-size).
_READS = 16
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def log(line: bytes) -> None:
    """Send one line to syslog; a priority at its beginning is used and removed."""
    priority = syslog.LOG_INFO
    if len(line) > 2 and line[:1] == b"<" and line[2:3] == b">" and line[1:2].isdigit():
        priority, line = int(line[1:2]) & 7, line[3:]
    text = line.decode("utf-8", "backslashreplace").replace("\0", "\\0")
    for at in range(0, len(text), LINE_BYTES):
        syslog.syslog(priority, text[at : at + LINE_BYTES])


class Stream:
    """The lines of one writer."""

    def __init__(self, fd: int, number: int, prefix: bytes, pid: int = 0) -> None:
        """number, pid: of the worker; number -1: the shared stream.

        prefix: for each line; may be empty.
        """
        self.fd = fd
        self.number = number
        self.pid = pid
        self.prefix = prefix
        self.rest = b""  # an incomplete line
        self.tail = b""  # the last bytes of the output


class Relay:
    """Carries all streams, until no writer is left and the protector has closed its line."""

    def __init__(self, line: int, kind: str, *, prefixed: bool) -> None:
        self.kind = kind
        self.prefixed = prefixed
        self.line: socket.socket | None = socket.socket(fileno=line)
        self.streams: dict[int, Stream] = {}  # by descriptor
        self.known: dict[int, Stream] = {}  # by the worker's number
        self.ended: dict[int, Stream] = {}  # of exited workers, by number
        self.cut = False  # the last line was written in part
        # Not poll(), which would examine hundreds of pipes at each write.
        self.epoll = select.epoll()
        self.epoll.register(line, select.EPOLLIN)
        self.gathering = select.poll()  # a message of the protector ends the wait
        self.gathering.register(line, select.POLLIN)
        self.hurry_s = 0.0  # until when lines are not gathered

    def add(self, stream: Stream) -> None:
        """Begin to carry a stream.  Raises PermissionError if it is /dev/null, not a pipe."""
        self.epoll.register(stream.fd, select.EPOLLIN)
        self.streams[stream.fd] = stream
        if stream.number >= 0:
            self.known[stream.number] = stream

    def run(self) -> None:
        """Carry lines until the last stream has ended, and the protector's line, too."""
        while self.streams or self.line is not None:
            ready = [fd for fd, _ in self.epoll.poll()]
            if self.line is not None and self.line.fileno() in ready:
                # First: lines that were written after a rotation belong in the new file.
                self.hear(self.line)
                continue
            self.gather(max(self.carry(self.streams[fd]) for fd in ready))

    def gather(self, most: int) -> None:
        """Wait for more lines before the next read.  most: the most bytes read from one stream."""
        if most >= _MANY_BYTES:
            self.hurry_s = time.monotonic() + _HURRY_S
        elif time.monotonic() >= self.hurry_s:
            self.gathering.poll(_GATHER_MS)

    def carry(self, stream: Stream) -> int:
        """Read once from a stream, pass the bytes on, and return their number."""
        try:
            data = os.read(stream.fd, _READ_BYTES)
        except BlockingIOError:
            return 0
        self.take(stream, data)
        return len(data)

    def take(self, stream: Stream, data: bytes) -> None:
        """Pass on the output of a stream; b"": end of file."""
        stream.tail = (stream.tail + data)[-TAIL_BYTES:]
        if self.kind == "lines" and not stream.prefix:
            self.carry_whole(stream, data)
        else:
            self.carry_lines(stream, data)
        if not data:
            self.end(stream)

    def carry_all(self, number: int) -> Stream | None:
        """Pass on the rest of a worker's pipe; return the worker's stream unless it has ended."""
        for _ in range(_READS):
            if number not in self.known or not self.carry(self.known[number]):
                break
        return self.known.get(number)

    def carry_whole(self, stream: Stream, data: bytes) -> None:
        """Write output unchanged, but only in whole lines: lines of two workers must not mix."""
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
        shown = [self.shown(stream.prefix, line) for line in lines]
        if self.kind != "syslog":
            self.write(b"".join(line + b"\n" for line in shown))
            return
        for line in shown:
            log(line)

    def shown(self, prefix: bytes, line: bytes) -> bytes:
        if self.kind != "lines" and line[:1] == b"<" and line[2:3] == b">":
            return line[:3] + prefix + line[3:]
        return prefix + line

    def end(self, stream: Stream) -> None:
        """Close a stream, because its last writer has exited or the protector ordered it."""
        # Before closing: the protector has the pipe open, too, so after close() the pipe would
        # stay in the epoll set (epoll(7)).
        self.epoll.unregister(stream.fd)
        os.close(stream.fd)
        del self.streams[stream.fd]
        if stream.number >= 0:
            del self.known[stream.number]
            self.ended[stream.number] = stream
            if len(self.ended) > ENDED:
                del self.ended[next(iter(self.ended))]

    def hear(self, line: socket.socket) -> None:
        """Handle one message of the protector."""
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
            if number in self.known:  # a new protector repeats the message
                os.close(fds[0])
                return
            prefix = b"[%d %d] " % (generation, pid) if self.prefixed else b""
            stream, before = Stream(fds[0], number, prefix, pid), self.ended.get(number)
            # A new protector still has the pipe of a worker that exited before the protector began.
            if before is not None and before.pid == pid:
                stream.tail = before.tail
            self.add(stream)

    def answer(self, line: socket.socket, number: int) -> None:
        """Send a worker's last words, after passing on all that it has written."""
        stream = self.carry_all(number) or self.ended.get(number)
        tail = stream.tail if stream is not None else b""
        self.say(line, b"%d\n" % number + tail)

    def say(self, line: socket.socket, what: bytes) -> None:
        try:
            line.send(what, _FLAGS)
        except OSError:
            pass  # the protector has exited, or does not read; no one waits for this message

    def write(self, data: bytes) -> None:
        """Write to the log; if the write fails (a full disk, say), the bytes are lost."""
        if self.cut and data:
            data = b"\n" + data
        try:
            while data:
                try:
                    data = data[os.write(1, data) :]
                except BlockingIOError:  # our parent has set O_NONBLOCK on the pipe that we share
                    select.select([], [1], [])
                    continue
                self.cut = bool(data)
        except OSError:
            pass


def main() -> None:
    name, kind, prefixed, line = sys.argv[1:]
    # Only end of file ends the relay: a stop of the service must not cut off its last lines.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A name that is not UTF-8 has surrogates, which openlog() refuses.
    syslog.openlog(name.encode("utf-8", "replace").decode(), 0, syslog.LOG_DAEMON)
    relay = Relay(int(line), kind, prefixed=prefixed == "1")
    try:
        relay.add(Stream(0, -1, b""))
    except PermissionError:
        pass  # stdin is /dev/null: there are no lines for syslog
    relay.run()


if __name__ == "__main__":
    main()
