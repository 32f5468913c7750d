"""The relay: carries what the workers (and the protector) print to where the log goes.

A process of its own, so that nobody's output depends on the protector; it lives as long
as its last writer.  It also keeps the last of it in a memfd, from which the protector
reads a failed worker's last words.  Run as a script, on the standard library alone:

    python relay.py NAME TAIL-DESCRIPTOR [LINE-DESCRIPTOR KIND]

On stdin are lines for syslog; they may begin with <N>, sd-daemon(3).  LINE is a SEQPACKET
socket on which more comes to read (--log-prefix), each with its descriptor:

    +NUMBER GENERATION PID   a pipe with a worker's lines, which get that prefix
    =                        where lines go from now on (the log file after a rotation)

KIND says where that is: `syslog`, `journal` (a stream that wants <N> first), or `lines`: the
latter two are stdout at first.
"""

from __future__ import annotations

import _socket as socket
import os
import select
import signal
import sys
import syslog

#: The memfd: 8 bytes that count all bytes ever written, then a ring of this size.
TAIL_BYTES = 65536
COUNT_BYTES = 8
#: After the ring: one byte that is 1 while all that was read is in the ring.
_IDLE_AT = COUNT_BYTES + TAIL_BYTES
#: A longer line goes out in pieces: syslog daemons cut at 8 KiB.
LINE_BYTES = 8000


def keep(tail: int, total: int, data: bytes) -> int:
    """Add data to the ring after `total` bytes so far; return the new total."""
    for at in range(0, len(data), TAIL_BYTES):
        piece = data[at : at + TAIL_BYTES]
        place = total % TAIL_BYTES
        first = piece[: TAIL_BYTES - place]
        os.pwrite(tail, first, COUNT_BYTES + place)
        os.pwrite(tail, piece[len(first) :], COUNT_BYTES)
        total += len(piece)
    os.pwrite(tail, total.to_bytes(COUNT_BYTES, "little"), 0)
    return total


def kept(tail: int, since: int) -> bytes:
    """Return what the ring still holds of the bytes after the first `since`."""
    total = written(tail)
    start = max(since, total - TAIL_BYTES)
    ring = os.pread(tail, TAIL_BYTES, COUNT_BYTES).ljust(TAIL_BYTES, b"\0")
    first, last = start % TAIL_BYTES, total % TAIL_BYTES
    if start >= total:
        return b""
    return ring[first:last] if first < last else ring[first:] + ring[:last]


def written(tail: int) -> int:
    """Return how many bytes have gone through the ring."""
    return int.from_bytes(os.pread(tail, COUNT_BYTES, 0), "little")


def is_idle(tail: int) -> bool:
    """Whether a relay runs that has put all it has read into the ring."""
    return os.pread(tail, 1, _IDLE_AT) == b"\1"


def log(line: bytes) -> None:
    """Send one line to syslog, with the priority it begins with if it does."""
    priority = syslog.LOG_INFO
    if len(line) > 2 and line[:1] == b"<" and line[2:3] == b">" and line[1:2].isdigit():
        priority, line = int(line[1:2]) & 7, line[3:]
    text = line.decode("utf-8", "backslashreplace").replace("\0", "\\0")
    for at in range(0, len(text), LINE_BYTES):
        syslog.syslog(priority, text[at : at + LINE_BYTES])


class Stream:
    """Somebody's lines."""

    def __init__(self, fd: int, prefix: bytes) -> None:
        """prefix: of each line; without one lines stay what they are."""
        self.fd = fd
        self.prefix = prefix
        self.rest = b""  # a line whose end has not come yet


class Relay:
    """Reads from all there are, until nobody is left who could write or bring another."""

    def __init__(self, tail: int, line: int, kind: str) -> None:
        """line: -1 if nobody brings another."""
        self.tail = tail
        self.total = written(tail)
        self.kind = kind
        self.line = socket.socket(fileno=line) if line >= 0 else None
        self.streams: dict[int, Stream] = {}
        self.known: dict[int, int] = {}  # a worker's number -> its stream's descriptor
        self.poll = select.poll()

    def add(self, stream: Stream) -> None:
        self.streams[stream.fd] = stream
        self.poll.register(stream.fd, select.POLLIN)

    def run(self) -> None:
        """Carry lines until the last one has gone."""
        if self.line is not None:
            self.poll.register(self.line.fileno(), select.POLLIN)
        while self.streams or self.line is not None:
            for fd in self.ready():
                if self.line is not None and fd == self.line.fileno():
                    self.hear(self.line)
                else:
                    self.carry(self.streams[fd])

    def ready(self) -> list[int]:
        """Wait for data.  Idle is taken back while the data is still in its pipe: so whoever
        sees the pipe empty and us idle knows that everything is in the ring.
        """
        os.pwrite(self.tail, b"\1", _IDLE_AT)
        found = [fd for fd, _ in self.poll.poll()]
        os.pwrite(self.tail, b"\0", _IDLE_AT)
        return found

    def carry(self, stream: Stream) -> None:
        """Pass on what is there of one."""
        data = os.read(stream.fd, 65536)
        if not stream.prefix:
            self.total = keep(self.tail, self.total, data)
        *lines, stream.rest = (stream.rest + data).split(b"\n")
        if not data or len(stream.rest) > LINE_BYTES:
            lines, stream.rest = [*lines, *filter(None, [stream.rest])], b""
        for line in lines:
            self.say(stream.prefix, line)
        if not data:
            self.poll.unregister(stream.fd)
            os.close(stream.fd)
            del self.streams[stream.fd]
            self.known = {number: fd for number, fd in self.known.items() if fd != stream.fd}

    def say(self, prefix: bytes, line: bytes) -> None:
        if prefix:
            self.total = keep(self.tail, self.total, prefix + line + b"\n")
        if self.kind != "lines" and line[:1] == b"<" and line[2:3] == b">":
            line = line[:3] + prefix + line[3:]
        else:
            line = prefix + line
        if self.kind == "syslog":
            log(line)
        else:
            write(line + b"\n")

    def hear(self, line: socket.socket) -> None:
        """Take in what to read from, or where to write to."""
        try:
            data, control, _, _ = line.recvmsg(256, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
        except OSError:  # it was reset; or there is no descriptor left, and then no way to go on
            data, control = b"", []
        fds = [int.from_bytes(content[:4], sys.byteorder) for _, _, content in control]
        if not data:
            self.poll.unregister(line.fileno())
            line.close()
            self.line = None
        elif fds and data[:1] == b"=":
            os.dup2(fds[0], 1)
            os.close(fds[0])
        elif fds:
            number, generation, pid = (int(word) for word in data[1:].split())
            if number in self.known:  # told again, by who did not know
                os.close(fds[0])
                return
            self.known[number] = fds[0]
            self.add(Stream(fds[0], b"[%d %d] " % (generation, pid)))


def write(data: bytes) -> None:
    """Write to where lines go; what cannot be written (a full disk) is lost, and we go on."""
    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError:
        pass


def main() -> None:
    name, tail = sys.argv[1], int(sys.argv[2])
    line, kind = (int(sys.argv[3]), sys.argv[4]) if len(sys.argv) > 3 else (-1, "syslog")
    # It ends at end of file only: a stop of the service must not cut off its last lines.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    syslog.openlog(name, 0, syslog.LOG_DAEMON)
    relay = Relay(tail, line, kind)
    relay.add(Stream(0, b""))
    relay.run()


if __name__ == "__main__":
    main()
