"""Reads the open connections of workers from /proc.

The protector does not see when a worker closes a connection, so it cannot list open connections.
This module lists only connections to an address of a listener with which the worker's generation
was opened.  So it leaves out connections that a worker opens itself, such as to a database.  It
also searches each worker's descendants, because a server may fork a child for each connection.

Source: proc(5).  The columns of `net/tcp` that are used: local and remote address, state,
tx_queue:rx_queue, inode.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from ..model.errors import what_failed
from ..system import procfs
from ..system.scoped import without_interface
from ..system.sock_diag import unread_unix
from ..system.socket_file import path_of
from .client import Message, process_exists
from .fields import listed, number_in, text_in

#: TCP_LISTEN in the state column of /proc/net/tcp (proc(5)).
_LISTENING = "0A"
#: SS_CONNECTED of linux/net.h, the state of both ends of a UNIX connection.
_CONNECTED = "03"
#: The values of Connection.bound.
EXACT, AT_LEAST, AT_MOST = "exact", "at least", "at most"
_HIDDEN = f"not in /proc (hidepid, or {procfs.MISSING}); run as root, with /proc mounted"
_ELSEWHERE = "in another PID namespace; run this command in the same container"
_NO_ADDRESS = "its listeners' addresses are unknown: an older SocketProtector started it"
_V4_MAPPED = b"\0" * 10 + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection of a worker.

    waiting_bytes: the received bytes that the worker has not read; None if unknown.
    """

    generation: int
    worker: int
    pid: int
    local: str
    peer: str
    age_s: float
    bound: str  # EXACT: the age is age_s; AT_LEAST: age_s or more; AT_MOST: age_s or less
    waiting_bytes: int | None


@dataclass(frozen=True, slots=True)
class HiddenWorker:
    """A worker whose list of connections may be incomplete, and the reason."""

    generation: int
    worker: int
    pid: int
    why: str


class _Socket(TypedDict):
    """A connection in a table of /proc/PID/net; its fields are fields of Connection."""

    local: str
    peer: str
    waiting_bytes: int | None


def find_connections(
    workers: Iterable[Message],
    listeners: Iterable[str],
    now: float,
    draining: Container[int] = (),
    *,
    known: Mapping[int, Sequence[str]] | None = None,
    shares_pids: bool = True,
) -> tuple[list[Connection], list[HiddenWorker]]:
    """Return the workers' connections, and the workers whose list may be incomplete.

    workers: the workers and their forked children, from the answer to the request `connections`.
    listeners: the canonical addresses of the listeners in force; a stop leaves none in force.
    now: seconds since the epoch.
    draining: the numbers of the draining generations.
    known: the result of known_addresses(); a generation that it lacks has those of `listeners`.
    shares_pids: whether the workers' pids are of our own PID namespace (Client.shares_pids).

    If the worker has recorded the time of the accept (docs/protocol.md), the bound is EXACT.
    Otherwise age_s is the time since the worker's `since_at`:

    * In a draining generation, the drain began at `since_at`.  The worker's connections began
      earlier, so the bound is AT_LEAST.  Exception: under --handoff listener, if two generations
      share one socket, some connections may begin a little later.
    * In any other generation, the worker started at `since_at`.  The worker's connections began
      later, so the bound is AT_MOST.
    """
    in_force = tuple(listeners)
    # Key: the worker's number, network namespace, inode.  A worker and its forked child have the
    # same number, so a connection that both have open is listed once.
    found: dict[tuple[int, str, int], Connection] = {}
    hidden_workers: list[HiddenWorker] = []
    tables: dict[tuple[str, tuple[str, ...]], dict[int, _Socket]] = {}
    why_all_hidden = _ELSEWHERE if not shares_pids else "" if procfs.is_ours() else _HIDDEN
    for worker in workers:
        generation, number = number_in(worker, "generation"), number_in(worker, "worker")
        pid = number_in(worker, "pid")
        if pid <= 0:
            continue  # the worker has not started yet
        addresses = tuple((known or {}).get(generation, in_force))
        if why_hidden := why_all_hidden or ("" if addresses else _NO_ADDRESS):
            hidden_workers.append(HiddenWorker(generation, number, pid, why_hidden))
            continue
        pids = _session_members(pid) if worker.get("orphaned") is True else [pid]
        if not pids:
            continue  # the orphaned worker's processes have ended meanwhile
        try:
            namespace = os.readlink(f"/proc/{pids[0]}/ns/net")
            if (namespace, addresses) not in tables:
                table = dict(_sockets(pids[0], addresses))
                # Check that the process still runs: if it has ended, the table may be incomplete.
                # Then this readlink() raises, and the table is not kept.
                os.readlink(f"/proc/{pids[0]}/ns/net")
                tables[namespace, addresses] = table
            inodes, why = _inodes(pids)
        except OSError as error:
            inodes, why = {}, _why_hidden(pids[0], error)
        if why:
            hidden_workers.append(HiddenWorker(generation, number, pid, why))
        times = worker.get("accepted_at_by_fd")
        for inode, fd in inodes.items():
            if (entry := tables[namespace, addresses].get(inode)) is None:
                continue
            begun_at = worker.get("since_at")
            bound = AT_LEAST if generation in draining else AT_MOST
            accepted_at = times.get(str(fd)) if isinstance(times, dict) and fd is not None else None
            if isinstance(accepted_at, int | float):
                begun_at, bound = accepted_at, EXACT
            age_s = max(0.0, now - begun_at) if isinstance(begun_at, int | float) else 0.0
            # If several processes share the socket, keep the connection with the exact age.
            if bound == EXACT or (number, namespace, inode) not in found:
                connection = Connection(generation, number, pid, **entry, age_s=age_s, bound=bound)
                found[number, namespace, inode] = connection
    return [*found.values()], hidden_workers


def addresses_of(status: Message) -> list[str]:
    """Return the addresses of the listeners in a status."""
    return [text_in(each, "address") for each in listed(status, "listeners")]


def known_addresses(answer: Message) -> dict[int, list[str]]:
    """Return the addresses of the listeners with which each generation was opened.

    answer: the answer to the request `connections`.  An older protector's answer has no addresses.
    """
    found = answer.get("addresses_by_generation")
    return {
        int(number): [each for each in addresses if isinstance(each, str)]
        for number, addresses in (found.items() if isinstance(found, dict) else ())
        if number.isdecimal() and isinstance(addresses, list)
    }


def _session_members(leader: int) -> list[int]:
    """Return the living processes in the session of a worker in state `orphaned`.

    leader: the worker's pid, which is also the number of its session.
    """
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, _, _, session = file.read().rpartition(b")")[2].split()[:4]
        except OSError:
            continue  # the process has ended, or is hidden from us
        if int(session) == leader and state not in (b"Z", b"X"):
            found.append(int(name))
    return found


def _why_hidden(pid: int, error: OSError) -> str:
    """Return why a process's sockets cannot be read; "" if the process has ended."""
    # Only root can read a zombie's descriptors, but a zombie has no sockets: nothing is hidden.
    if procfs.is_alive(pid) is False or not process_exists(pid):
        return ""
    if isinstance(error, PermissionError):
        return "permission denied; run as root or as the worker's user"
    missing = isinstance(error, FileNotFoundError | ProcessLookupError)
    return _HIDDEN if missing else what_failed(error)


def _inodes(pids: Sequence[int]) -> tuple[dict[int, int | None], str]:
    """Return the sockets of these processes and of their descendants, and why some are hidden.

    pids: the worker's pid; if the worker is orphaned, the pids of the processes in its session.
    The sockets are a map: inode -> descriptor in the process pids[0].  The descriptor is None if
    only another process has the socket.  The reason is "" if no socket is hidden.
    """
    found: dict[int, int | None] = {}
    why = ""
    first, todo = pids[0], list(reversed(pids))
    while todo:
        each = todo.pop()
        try:
            for fd, inode in procfs.sockets(each):
                # The caller looks for fd in `accepted_at_by_fd`, which has only descriptors of the
                # process pids[0].  In another process the same number may mean another socket.
                found.setdefault(inode, fd if each == first else None)
            todo += procfs.children_of(each)
        except OSError as error:
            hidden = _why_hidden(each, error)
            why = why or (hidden if each == first else hidden and f"process {each}: {hidden}")
    return found, why


def _sockets(pid: int, addresses: tuple[str, ...]) -> Iterator[tuple[int, _Socket]]:
    """Yield (inode, socket) for each connection to these addresses.

    pid: a process in the network namespace to search.
    """
    tcp = {without_interface(each[4:]) for each in addresses if each.startswith("tcp:")}
    unix = {each[5:] for each in addresses if each.startswith("unix:")}
    if tcp:
        yield from _tcp(f"/proc/{pid}/net/tcp", tcp)
        yield from _tcp(f"/proc/{pid}/net/tcp6", tcp)
    if unix:
        yield from _unix(f"/proc/{pid}/net/unix", unix)


def _tcp(path: str, addresses: set[str]) -> Iterator[tuple[int, _Socket]]:
    """Yield (inode, socket) for each connection in a table of TCP sockets."""
    ports = {each.rpartition(":")[2] for each in addresses}
    for words in _lines(path):
        local, remote, state, queues, inode = words[1], words[2], words[3], words[4], words[9]
        port = str(int(local.rpartition(":")[2], 16))
        if state == _LISTENING or port not in ports:
            continue
        address = _readable(local)
        if addresses & {address, f"0.0.0.0:{port}", f"[::]:{port}"}:
            waiting = int(queues.partition(":")[2], 16)
            yield int(inode), _Socket(local=address, peer=_readable(remote), waiting_bytes=waiting)


def _unix(path: str, addresses: set[str]) -> Iterator[tuple[int, _Socket]]:
    """Yield (inode, socket) for each connection in a table of UNIX sockets."""
    waiting = unread_unix()
    for words in _lines(path, 7):  # after seven words comes a path, which may contain blanks
        if len(words) < 7 or not words[6].isdecimal():
            continue  # this line is the rest of a socket's name that contains a line break
        state, inode = words[5], words[6]
        name = path_of(words[7].rstrip("\n") if len(words) > 7 else "")
        if state == _CONNECTED and name in addresses:
            unread = waiting.get(int(inode))
            yield int(inode), _Socket(local=f"unix:{name}", peer="unix", waiting_bytes=unread)


def _lines(path: str, most: int = -1) -> Iterator[list[str]]:
    """Yield the words of each line in a table, without the line of headings.

    most: split off at most this many words, and leave the rest of the line as it is; -1: split all.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as table:
            next(table, None)
            for line in table:
                yield line.split(None, most)
    except FileNotFoundError:  # the kernel has no IPv6, or the process has ended
        return


def _readable(hex_address: str) -> str:
    """Return an address such as `0100007F:10E1` in readable form: `127.0.0.1:4321`.

    Each group of four bytes is in the host's byte order.
    """
    host, _, port = hex_address.partition(":")
    groups = (int(host[at : at + 8], 16) for at in range(0, len(host), 8))
    raw = b"".join(struct.pack("=I", group) for group in groups).removeprefix(_V4_MAPPED)
    if len(raw) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, raw)}:{int(port, 16)}"
    return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]:{int(port, 16)}"
