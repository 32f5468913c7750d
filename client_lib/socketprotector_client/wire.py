"""The wire format between the protector and its workers: the one definition.

Rule: constants and pure packing only; the daemon and the client library both
import this module, so nothing here may open, read or keep anything.

Source: docs/protocol.md, sections "Environment" and "Channel".
"""

from __future__ import annotations

import struct

VERSION = 1

#: One record on the channel begins with this, little-endian: version, kind,
#: listener index, length of the state that follows, CLOCK_MONOTONIC ns at accept.
HEADER = struct.Struct("<BBHIQ")

KIND_CONNECTION = 1
KIND_RETURNED = 2

#: State that may follow the header in the same record; more travels as a memfd.
STATE_MAX_BYTES = 4096

#: The kernel charges one record without state, with one descriptor, so much against SO_SNDBUF
#: (measured: 278 records in the default 212,992 bytes).
RECORD_CHARGE_BYTES = 768
#: The smallest buffer that the kernel grants holds so many (measured).
SMALLEST_QUEUE = 6

ENV_CHANNEL = "SOCKETPROTECTOR_CHANNEL"
ENV_RETURN = "SOCKETPROTECTOR_RETURN"
ENV_LISTENERS = "SOCKETPROTECTOR_LISTENERS"
ENV_GENERATION = "SOCKETPROTECTOR_GENERATION"
ENV_WORKER = "SOCKETPROTECTOR_WORKER"
ENV_WORKERS = "SOCKETPROTECTOR_WORKERS"
ENV_SCOREBOARD = "SOCKETPROTECTOR_SCOREBOARD"
ENV_NOTIFY = "NOTIFY_SOCKET"

#: A worker's record in the scoreboard: so many 8-byte words in the machine's own byte order.
BOARD_WORDS = 1024
BOARD_BYTES = 8 * BOARD_WORDS
#: What the first word says of the others.
BOARD_UNKNOWN = 0  # not written, or others take connections that cannot be counted
BOARD_COUNTED = 1
#: The words: connections taken; open now; handlers that raised.
BOARD_STATE, BOARD_ACCEPTED, BOARD_ACTIVE, BOARD_ERRORS = range(4)
#: How long each waited from accept to being taken: word n counts those below 2^n us.
BOARD_WAITS, BOARD_WAIT_WORDS = 16, 32
#: By descriptor number: CLOCK_MONOTONIC ns at accept of the connection that has it, or had it.
BOARD_ACCEPTED_AT, BOARD_DESCRIPTORS = 64, BOARD_WORDS - 64

#: Said together with READY=1 by a worker that leaves when its RETURN line ends.
#: A worker that never says so is asked to leave by SIGTERM instead.
RETIRES_ON_RETURN = "X_SOCKETPROTECTOR_RETIRE=1"
#: What the pool of --handoff stdio says of its first programs: `works`, or `failed PID STATUS`.
PROGRAM = "X_SOCKETPROTECTOR_PROGRAM"

#: A listener that was removed keeps its place in the list under this name.
REMOVED_LISTENER = "-"


def pack_listeners(addresses: list[str]) -> str:
    """Return the value of SOCKETPROTECTOR_LISTENERS for addresses in index order.

    Each is `tcp:HOST:PORT`, `tcp:[HOST6]:PORT`, `unix:/path` or `unix:@name`.
    """
    return " ".join(_quote(address) for address in addresses)


def unpack_listeners(value: str) -> list[str]:
    """Return the listen addresses held by a value of SOCKETPROTECTOR_LISTENERS."""
    from urllib.parse import unquote

    return [unquote(word, errors="surrogateescape") for word in value.split()]


def _quote(address: str) -> str:
    # urllib.parse.quote would do, for 0.7 MB in the protector's memory.
    return "".join(
        chr(byte) if byte in _PLAIN else f"%{byte:02X}"
        for byte in address.encode("utf-8", "surrogateescape")
    )


_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/:@[].-_~")
