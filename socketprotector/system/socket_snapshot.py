"""Takes and restores snapshots of a listening socket's options, which workers can change.

A worker shares its listening socket with SocketProtector, with other workers, and with the
generation that uses the socket next.  An option that a worker sets outlives the worker.  OPTIONS is
the only list of the options that matter: options that connections inherit, or that keep clients
out.

Not listed, because other modules own them: SO_REUSEPORT and its filters (reuseport.py), and the
options of accept tags (accept_tags.py).

Source: socket(7), tcp(7), ip(7), ipv6(7); sock_setsockopt() in net/core/sock.c and
do_tcp_setsockopt() in net/ipv4/tcp.c for what is settable on a socket that listens.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress

from ..model.lazy_dataclass import frozen
from . import reuseport, socket_copy

#: Option name -> content; for BACKLOG the limit as text.
Snapshot = Mapping[str, bytes]

BACKLOG = "backlog"
_BYTES = 4
_ORDER = sys.byteorder
_DEVICE = "SO_BINDTOIFINDEX"
#: If a socket has such keys, a client without a key gets no answer.  The keys cannot be read, but
#: their memory use can.
_KEYS = "TCP_MD5SIG"
#: Their memory use in SO_MEMINFO (SK_MEMINFO_OPTMEM of linux/sock_diag.h).
_KEYS_AT = slice(24, 28)
#: Options that keep clients out while they are set.
KEEPS_CLIENTS_OUT = frozenset({_DEVICE, _KEYS})
_CAN_CLOSE = KEEPS_CLIENTS_OUT | {"IP_MINTTL", "IPV6_MINHOPCOUNT"}
_SO = socket.SOL_SOCKET
_IP, _IPV6, _TCP = socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.IPPROTO_TCP


@frozen
class Option:
    """One option: how it is read, and whether it can be set again."""

    name: str
    level: int
    number: int
    size: int = _BYTES
    doubled: bool = False  # the kernel doubles the set value, and returns the doubled value
    cleared: bool = False  # 0 restores its initial value, which reads as another number
    #: Why it cannot be set again on a listening socket; "" if it can.
    stays: str = ""
    #: The privilege that setting it may need; "" for none.
    privilege: str = ""


OPTIONS = (
    Option("SO_REUSEADDR", _SO, socket.SO_REUSEADDR),
    Option("SO_KEEPALIVE", _SO, socket.SO_KEEPALIVE),
    Option("SO_LINGER", _SO, socket.SO_LINGER, 8),
    Option("SO_OOBINLINE", _SO, socket.SO_OOBINLINE),
    Option("SO_DONTROUTE", _SO, socket.SO_DONTROUTE),
    Option("SO_PASSCRED", _SO, socket.SO_PASSCRED),
    Option("SO_PASSSEC", _SO, 34),
    Option("SO_PASSPIDFD", _SO, 76),
    Option("SO_PASSRIGHTS", _SO, 83),
    Option("SO_PEEK_OFF", _SO, 42),
    Option("SO_RCVLOWAT", _SO, socket.SO_RCVLOWAT),
    Option("SO_RCVTIMEO", _SO, socket.SO_RCVTIMEO, 16),
    Option("SO_SNDTIMEO", _SO, socket.SO_SNDTIMEO, 16),
    Option("SO_RCVBUF", _SO, socket.SO_RCVBUF, doubled=True),
    Option("SO_SNDBUF", _SO, socket.SO_SNDBUF, doubled=True),
    Option("SO_BUF_LOCK", _SO, 72),  # since 5.14; set last, because a size locks
    Option("SO_PRIORITY", _SO, socket.SO_PRIORITY, privilege="CAP_NET_ADMIN above 6"),
    Option("SO_MARK", _SO, socket.SO_MARK, privilege="CAP_NET_ADMIN or CAP_NET_RAW"),
    Option("SO_BUSY_POLL", _SO, 46, privilege="CAP_NET_ADMIN to raise"),
    Option("SO_INCOMING_CPU", _SO, socket.SO_INCOMING_CPU),
    Option("SO_MAX_PACING_RATE", _SO, 47),
    # By number: the name of a device that is gone cannot be read.
    Option(_DEVICE, _SO, 62, privilege="CAP_NET_RAW to change"),
    Option("SO_LOCK_FILTER", _SO, 44, stays="locked for ever"),
    # Any process may set a key.  SO_MEMINFO counts its memory, and that of a locked filter.
    Option(_KEYS, _SO, 55, 36, stays="cannot be deleted without knowing them"),
    Option("IP_TOS", _IP, socket.IP_TOS),
    Option("IP_TTL", _IP, socket.IP_TTL),
    Option("IP_MINTTL", _IP, socket_copy.IP_MINTTL),
    Option("IP_MTU_DISCOVER", _IP, 10),
    Option("IP_TRANSPARENT", _IP, socket.IP_TRANSPARENT, privilege="CAP_NET_ADMIN to set"),
    Option("IP_RECVERR", _IP, 11),
    Option("IPV6_RECVERR", _IPV6, 25),
    Option("IPV6_TCLASS", _IPV6, socket.IPV6_TCLASS),
    Option("IPV6_UNICAST_HOPS", _IPV6, socket.IPV6_UNICAST_HOPS),
    Option("IPV6_MINHOPCOUNT", _IPV6, socket_copy.IPV6_MINHOPCOUNT),
    Option("IPV6_MTU_DISCOVER", _IPV6, 23),
    Option("TCP_NODELAY", _TCP, socket.TCP_NODELAY),
    Option("TCP_MAXSEG", _TCP, socket.TCP_MAXSEG, cleared=True),
    Option("TCP_CORK", _TCP, socket.TCP_CORK),
    Option("TCP_QUICKACK", _TCP, socket.TCP_QUICKACK),
    Option("TCP_THIN_LINEAR_TIMEOUTS", _TCP, 16),
    Option("TCP_TX_DELAY", _TCP, 37),
    Option("TCP_RTO_MAX_MS", _TCP, 44),
    Option("TCP_RTO_MIN_US", _TCP, 45),
    Option("TCP_DELACK_MAX_US", _TCP, 46),
    Option("TCP_KEEPIDLE", _TCP, socket.TCP_KEEPIDLE),
    Option("TCP_KEEPINTVL", _TCP, socket.TCP_KEEPINTVL),
    Option("TCP_KEEPCNT", _TCP, socket.TCP_KEEPCNT),
    Option("TCP_SYNCNT", _TCP, socket.TCP_SYNCNT),
    Option("TCP_LINGER2", _TCP, socket.TCP_LINGER2),
    Option("TCP_DEFER_ACCEPT", _TCP, socket.TCP_DEFER_ACCEPT),
    Option("TCP_WINDOW_CLAMP", _TCP, socket.TCP_WINDOW_CLAMP, stays="cannot be unset"),
    Option("TCP_CONGESTION", _TCP, socket.TCP_CONGESTION, 16, privilege="CAP_NET_ADMIN for some"),
    Option("TCP_USER_TIMEOUT", _TCP, socket.TCP_USER_TIMEOUT),
    Option("TCP_FASTOPEN", _TCP, socket.TCP_FASTOPEN),
    Option("TCP_NOTSENT_LOWAT", _TCP, socket.TCP_NOTSENT_LOWAT),
    Option("TCP_SAVE_SYN", _TCP, 27),
    Option("TCP_ULP", _TCP, 31, 16, stays="cannot be removed"),
)


def take(sock: socket.socket) -> Snapshot:
    """Return the options of a socket, as far as its kernel and family have them."""
    found = {each.name: content for each, content in _read(sock)}
    with suppress(OSError):
        found[BACKLOG] = str(reuseport.queue(sock)[1]).encode()
    return found


def closing(sock: socket.socket) -> Snapshot:
    """Return those options of a socket that can keep clients out."""
    return {name: content for name, content in take(sock).items() if name in _CAN_CLOSE}


def restore(sock: socket.socket, before: Snapshot) -> list[str]:
    """Restore a listening socket's options; return the names of options that stay changed."""
    changed = []
    for each, content in _read(sock):
        wanted = before.get(each.name, content)
        if wanted != content:
            changed.append(each.name)
            with suppress(OSError):
                _set(sock, each, wanted)
    with suppress(OSError):
        limit = before.get(BACKLOG)
        if limit and _listens(sock) and str(reuseport.queue(sock)[1]).encode() != limit:
            sock.listen(int(limit))
    if not changed:
        return []
    return [each.name for each, content in _read(sock) if content != before.get(each.name, content)]


def raise_backlog(sock: socket.socket, made: Snapshot) -> None:
    """Raise a socket's backlog to the value it was made with, if it is lower now."""
    with suppress(OSError):
        if BACKLOG in made and _listens(sock) and reuseport.queue(sock)[1] < int(made[BACKLOG]):
            sock.listen(int(made[BACKLOG]))


def _listens(sock: socket.socket) -> bool:
    """Return whether the socket listens: after shutdown(), listen() would reorder the group."""
    return bool(sock.getsockopt(_SO, socket.SO_ACCEPTCONN))


def as_text(snapshot: Snapshot) -> str:
    """Return a snapshot as text that from_text() reads."""
    return " ".join(f"{name}={content.hex()}" for name, content in snapshot.items())


def from_text(text: str) -> Snapshot:
    """Return the snapshot in a text from as_text()."""
    pairs = (each.partition("=") for each in text.split())
    return {name: bytes.fromhex(content) for name, _, content in pairs}


def _set(sock: socket.socket, option: Option, wanted: bytes) -> None:
    """Set an option to a value that was read earlier.  Raises OSError."""
    if option.doubled:
        wanted = (int.from_bytes(wanted, _ORDER) // 2).to_bytes(_BYTES, _ORDER)
    if option.cleared:
        sock.setsockopt(option.level, option.number, 0)
        if sock.getsockopt(option.level, option.number, option.size) == wanted:
            return
    sock.setsockopt(option.level, option.number, wanted)


def _read(sock: socket.socket) -> Iterator[tuple[Option, bytes]]:
    families = {_IPV6: (socket.AF_INET6,), _SO: None}
    for each in OPTIONS:
        of = families.get(each.level, (socket.AF_INET, socket.AF_INET6))
        if of is not None and sock.family not in of:
            continue
        with suppress(OSError):  # an older kernel
            content = sock.getsockopt(each.level, each.number, each.size)
            if each.number == socket.SO_LINGER and each.level == _SO and not any(content[:4]):
                content = bytes(each.size)  # linger is off, so its seconds do not matter
            if each.name == _KEYS:
                if sock.family == socket.AF_UNIX:
                    continue
                content = content[_KEYS_AT]
            yield each, content
