"""The relay: carries what the workers (and the protector) print to syslog.

A process of its own, so that nobody's output depends on the protector; it lives as long
as its last writer.  It also keeps the last of it in a memfd, from which the protector
reads a failed worker's last words.  Run as a script, on the standard library alone:

    python relay.py NAME TAIL-DESCRIPTOR   (lines on stdin, may begin with <N>, sd-daemon(3))
"""

from __future__ import annotations

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


def read(tail: int) -> bytes:
    """Wait for data on stdin.  Idle is taken back while the data is still in the pipe:
    so whoever sees the pipe empty and us idle knows that everything is in the ring.
    """
    os.pwrite(tail, b"\1", _IDLE_AT)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.poll()
    os.pwrite(tail, b"\0", _IDLE_AT)
    return os.read(0, 65536)


def log(line: bytes) -> None:
    """Send one line to syslog, with the priority it begins with if it does."""
    priority = syslog.LOG_INFO
    if len(line) > 2 and line[:1] == b"<" and line[2:3] == b">" and line[1:2].isdigit():
        priority, line = int(line[1:2]) & 7, line[3:]
    text = line.decode("utf-8", "backslashreplace").replace("\0", "\\0")
    for at in range(0, len(text), LINE_BYTES):
        syslog.syslog(priority, text[at : at + LINE_BYTES])


def main() -> None:
    name, tail = sys.argv[1], int(sys.argv[2])
    # It ends at end of file only: a stop of the service must not cut off its last lines.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    syslog.openlog(name, 0, syslog.LOG_DAEMON)
    total, rest = written(tail), b""
    while data := read(tail):
        total = keep(tail, total, data)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            log(line)
        if len(rest) > LINE_BYTES:
            log(rest)
            rest = b""
    log(rest)


if __name__ == "__main__":
    main()
