"""How many bytes wait in each UNIX socket: asked of the kernel, since /proc does not say.

Only for this process's network namespace.

Source: sock_diag(7), netlink(7); linux/unix_diag.h.
"""

from __future__ import annotations

import socket
import struct

_SOCK_DIAG = 4  # the netlink family
_BY_FAMILY = 20
_DONE, _ERROR = 3, 2
_REQUEST_AND_DUMP = 0x301
_CONNECTED = 1 << 1  # of the states, as a mask
_SHOW_RQLEN, _RQLEN = 0x10, 4
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ASKED = struct.Struct("=BBHIIIII")
_TOLD = struct.Struct("=BBBBIII")  # family, type, state, padding, inode, cookie
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ANSWER_BYTES = 65_536
_ANSWER_S = 2.0


def waiting() -> dict[int, int]:
    """Return inode -> bytes to be read, of all connected ones; empty where it may not be asked."""
    asked = _ASKED.pack(socket.AF_UNIX, 0, 0, _CONNECTED, 0, _SHOW_RQLEN, 0, 0)
    header = _HEADER.pack(_HEADER.size + len(asked), _BY_FAMILY, _REQUEST_AND_DUMP, 1, 0)
    found: dict[int, int] = {}
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
            kernel.settimeout(_ANSWER_S)
            kernel.sendall(header + asked)
            while _take(kernel.recv(_ANSWER_BYTES), found):
                pass
    except OSError:
        return {}
    return found


def _take(data: bytes, found: dict[int, int]) -> bool:
    """Read one answer; False after the last."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if kind in (_DONE, _ERROR) or length < _HEADER.size:
            return False
        _read(data[at + _HEADER.size : at + length], found)
        at += (length + 3) & ~3
    return bool(data)


def _read(message: bytes, found: dict[int, int]) -> None:
    inode = _TOLD.unpack_from(message)[4]
    at = _TOLD.size
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if kind == _RQLEN:
            found[inode] = struct.unpack_from("=I", message, at + _ATTRIBUTE.size)[0]
        at += max(_ATTRIBUTE.size, (length + 3) & ~3)
