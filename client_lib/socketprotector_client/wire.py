"""The only definition of the wire format between the protector and its workers.

Rule: constants and pure packing only.  Both the daemon and the client library
import this module, so nothing here may open, read or keep anything.

Source: docs/protocol.md, sections "Environment" and "Channel".
"""

from __future__ import annotations

import struct

VERSION = 1

#: The header of each record on the channel, little-endian: version, kind,
#: listener index, length of the state behind it, time of accept in CLOCK_MONOTONIC ns.
HEADER = struct.Struct("<BBHIQ")

KIND_CONNECTION = 1
KIND_RETURNED = 2

#: The most bytes of state behind the header in a record; longer state travels as a memfd.
STATE_MAX_BYTES = 4096

#: The bytes of SO_SNDBUF that a record without state, with one descriptor, uses up
#: (measured: 278 records in the default 212,992 bytes).
RECORD_CHARGE_BYTES = 768
#: The number of records in the smallest buffer that the kernel grants (measured).
SMALLEST_QUEUE = 6

ENV_CHANNEL = "SOCKETPROTECTOR_CHANNEL"
ENV_RETURN = "SOCKETPROTECTOR_RETURN"
ENV_LISTENERS = "SOCKETPROTECTOR_LISTENERS"
ENV_GENERATION = "SOCKETPROTECTOR_GENERATION"
ENV_WORKER = "SOCKETPROTECTOR_WORKER"
ENV_WORKERS = "SOCKETPROTECTOR_WORKERS"
ENV_SCOREBOARD = "SOCKETPROTECTOR_SCOREBOARD"
#: Seconds over which a worker that drains, for a reload or a stop, ends its connections.
ENV_DRAIN_SPREAD = "SOCKETPROTECTOR_DRAIN_SPREAD"
ENV_STOP_SPREAD = "SOCKETPROTECTOR_STOP_SPREAD"
#: In a child that a worker has forked to share its memory: its number, from 0.
ENV_CHILD = "SOCKETPROTECTOR_CHILD"
#: 1 if each line of output must name the process that wrote it.
ENV_LOG_PREFIX = "SOCKETPROTECTOR_LOG_PREFIX"
ENV_NOTIFY = "NOTIFY_SOCKET"

#: The size of a worker's record in the scoreboard, in 8-byte words of the machine's byte order.
BOARD_WORDS = 1024
BOARD_BYTES = 8 * BOARD_WORDS
#: The values of the first word.
BOARD_UNKNOWN = 0  # not written, or uncounted processes take connections, too
BOARD_COUNTED = 1
#: The words: state; connections taken; connections open now; handlers that raised.
BOARD_STATE, BOARD_ACCEPTED, BOARD_ACTIVE, BOARD_ERRORS = range(4)
#: Written by the worker: 1 if it ends its connections evenly when it drains.
BOARD_SPREADS = 4
#: Written by the protector when the worker must drain: the time by which its connections should
#: have ended, in CLOCK_MONOTONIC ns.  0: as its environment says.
BOARD_SPREAD_UNTIL = 5
#: The value of BOARD_SPREAD_UNTIL if the worker should end no connection.
SPREAD_NEVER = 2**64 - 1
#: The words of a worker that forks children which take connections: the slot of the first child's
#: record, and how many such records there are.  These slots follow those of the workers.
BOARD_CHILDREN_FROM, BOARD_CHILDREN = 6, 7
#: In a child's record: its pid; 0: the record has no child.
BOARD_PID = 8
BOARD_WORKER_SLOTS, BOARD_CHILD_SLOTS = 1024, 1024
#: The times from accept to taking: word n counts the waits below 2^n us.
BOARD_WAITS, BOARD_WAIT_WORDS = 16, 32
#: By descriptor: the time of accept, in CLOCK_MONOTONIC ns, of its current or last connection.
BOARD_ACCEPTED_AT, BOARD_DESCRIPTORS = 64, BOARD_WORDS - 64

#: Sent together with READY=1 by a worker that finishes when its RETURN line ends.
#: Any other worker gets SIGTERM instead.
RETIRES_ON_RETURN = "X_SOCKETPROTECTOR_RETIRE=1"
#: A report on the first programs of --handoff stdio: `works`, or `failed PID STATUS`.
PROGRAM = "X_SOCKETPROTECTOR_PROGRAM"
#: A report on a forked child that has failed: `NUMBER PID STATUS LOST`.  STATUS is wait(2)'s, LOST
#: the number of its open connections, `-` if they were not counted.
CHILD = "X_SOCKETPROTECTOR_CHILD"

#: The name of a removed listener, which keeps its place in the list.
REMOVED_LISTENER = "-"


def pack_listeners(addresses: list[str]) -> str:
    """Return the value of SOCKETPROTECTOR_LISTENERS for addresses in index order.

    Each is `tcp:HOST:PORT`, `tcp:[HOST6]:PORT`, `unix:/path` or `unix:@name`.
    """
    return " ".join(_quote(address) for address in addresses)


def unpack_listeners(value: str) -> list[str]:
    """Return the listen addresses in a value of SOCKETPROTECTOR_LISTENERS, in index order."""
    return [_unquote(word) for word in value.split()]


def _unquote(word: str) -> str:
    # Not urllib.parse.unquote, which loads `re` and `ipaddress`: 3 ms of each worker's start.
    found, *quoted = word.encode("utf-8", "surrogateescape").split(b"%")
    for each in quoted:
        try:
            found += (bytes.fromhex(each[:2].decode()) or b"%") + each[2:]
        except ValueError:  # not quoted by pack_listeners()
            found += b"%" + each
    return found.decode("utf-8", "surrogateescape")


def _quote(address: str) -> str:
    # Not urllib.parse.quote, which would cost 0.7 MB of the protector's memory.
    return "".join(
        chr(byte) if byte in _PLAIN else f"%{byte:02X}"
        for byte in address.encode("utf-8", "surrogateescape")
    )


_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/:@[].-_~")
