"""A FastCGI connection on stdin and stdout for a CGI program: fastcgi.py PROGRAM [ARG...]

One request a connection, as nginx sends them without fastcgi_keep_conn.
"""

import os
import struct
import subprocess
import sys
from typing import BinaryIO

HEADER = struct.Struct("!BBHHBx")  # version, type, request, bytes of content, of padding
BEGIN, END, PARAMS, STDIN, STDOUT = 1, 3, 4, 5, 6


def exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        sys.exit("half a FastCGI request")
    return data


def size(data: bytes, at: int) -> tuple[int, int]:
    """Return a length and where it ends."""
    if data[at] < 128:
        return data[at], at + 1
    return int.from_bytes(data[at : at + 4], "big") & 0x7FFFFFFF, at + 4


def pairs(data: bytes) -> dict[bytes, bytes]:
    found, at = {}, 0
    while at < len(data):
        name, at = size(data, at)
        value, at = size(data, at)
        found[data[at : at + name]] = data[at + name : at + name + value]
        at += name + value
    return found


request, streams = 0, {PARAMS: b"", STDIN: b""}
while True:
    _, kind, request, count, padding = HEADER.unpack(exactly(sys.stdin.buffer, HEADER.size))
    content = exactly(sys.stdin.buffer, count)
    exactly(sys.stdin.buffer, padding)
    if kind in streams:
        streams[kind] += content
    if kind == STDIN and not content:
        break
done = subprocess.run(
    sys.argv[1:],
    input=streams[STDIN],
    stdout=subprocess.PIPE,
    env={**os.environb, **pairs(streams[PARAMS])},
)
answer = [done.stdout[at : at + 60000] for at in range(0, len(done.stdout), 60000)]
for part in (*answer, b""):
    sys.stdout.buffer.write(HEADER.pack(1, STDOUT, request, len(part), 0) + part)
sys.stdout.buffer.write(HEADER.pack(1, END, request, 8, 0) + struct.pack("!IB3x", 0, 0))
