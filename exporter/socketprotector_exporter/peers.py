"""Polls the exporters of other hosts for their metrics, while the page has a viewer.

A host that is stuck, or sends without end, delays no other host, because each poll is a task of its
own.  The cost is bounded: every TURN_S, at most AT_ONCE polls begin; a host is polled at most every
EVERY_S, and a poll takes at most ANSWER_S.  So at most AT_ONCE * ANSWER_S / TURN_S polls run at a
time.  This number must be small, because asyncio's TLS takes 256 KiB for each connection.

Source: RFC 9110, 9112; docs.openssl.org, X509_STORE_CTX_get_error.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from socketprotector import __version__
from socketprotector.ctl.api import UsageError, env_file, in_units

from .names import Names
from .peers_file import Peer, parse
from .peers_model import Host, NoMetrics, Scan
from .token_file import read_token

EVERY_S, ANSWER_S = 5.0, 4.0
AT_ONCE, TURN_S = 4, 0.1
#: Viewers get the results of this many turns together.
TURNS = 10
#: An exporter with 100 instances sends 600 KB.
MOST_BYTES = 2 << 20
_PIECE_BYTES = 65_536

_HEAD = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)
_ENCODED = re.compile(rb"\r\n(transfer|content)-encoding:", re.IGNORECASE)
#: X509_V_ERR_* -> the reason in words.
_CERTIFICATES = {
    **dict.fromkeys((2, 18, 19, 20, 21), "its certificate is not from our CA"),
    **dict.fromkeys((62, 64), "its certificate is for another name"),
    9: "its certificate is not valid yet",
    10: "its certificate has expired",
}
_NO_TLS = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")


@dataclass(frozen=True, slots=True)
class Files:
    """The files of `--peers`, `--peers-ca` and `--peers-token`."""

    peers: str
    ca: str | None = None
    token: str | None = None

    def stamp(self) -> tuple[object, ...]:
        """Return a value that changes when one of the files changes."""
        return tuple(map(_stamp, filter(None, (self.peers, self.ca, self.token))))

    def read(self) -> Plan:
        """Return the contents of the files.  Raises UsageError: one line that names the file."""
        try:
            peers = parse(env_file.contents(self.peers).decode("utf-8-sig"), self.peers)
        except UnicodeDecodeError as error:
            raise UsageError(f"--peers {self.peers}: no text in UTF-8") from error
        except OSError as error:
            raise UsageError(f"--peers {self.peers}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"--peers {error}") from error
        try:
            if self.ca is not None:  # checked, because OpenSSL would wait for the writer of a FIFO
                env_file.refuse_kind(os.stat(self.ca), self.ca)
            tls = ssl.create_default_context(cafile=self.ca)
        except ssl.SSLError as error:
            raise UsageError(f"--peers-ca {self.ca}: no PEM certificate of an authority") from error
        except OSError as error:
            raise UsageError(f"--peers-ca {self.ca}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"--peers-ca {error}") from error
        token = "" if self.token is None else read_token("--peers-token", self.token)
        return Plan(peers, tls, token)


def _stamp(file: str) -> tuple[int, ...]:
    try:
        found = os.stat(file)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode


@dataclass(frozen=True, slots=True)
class Plan:
    """The hosts to poll, the trusted certificates, and our token."""

    peers: tuple[Peer, ...]
    tls: ssl.SSLContext
    token: str


class Peers:
    """All hosts of the file, with the last answer of each."""

    def __init__(self, files: Files, say: Callable[[str], None]) -> None:
        """Read the files.  Raises UsageError.

        say: called with one line if a later change makes a file invalid; the old values stay.
        """
        self._files, self._say = files, say
        self._stamp = files.stamp()
        self._plan = files.read()
        self._hosts = {peer: Host(peer.name) for peer in self._plan.peers}
        self._names = Names()

    @property
    def hosts(self) -> list[Host]:
        """All hosts, in the order of the file."""
        return list(self._hosts.values())

    async def run(self, has_viewer: asyncio.Event, tell: Callable[[Iterable[Host]], None]) -> None:
        """Poll the hosts while there is a viewer, until cancelled.

        has_viewer: set while there is a viewer.
        tell: called with hosts that may have changed, and after a change of the file's hosts.
        """
        while True:
            await has_viewer.wait()
            async with asyncio.TaskGroup() as polls:
                await self._poll_all(polls, has_viewer, tell)
            self._names.forget()
            for host in self.hosts:
                host.forget()
            tell(self.hosts)

    async def _poll_all(
        self,
        polls: asyncio.TaskGroup,
        has_viewer: asyncio.Event,
        tell: Callable[[Iterable[Host]], None],
    ) -> None:
        waiting: deque[Peer] = deque()
        heard: list[Host] = []
        due = 0.0
        while has_viewer.is_set():
            waiting.extendleft(self._read_again())
            if not waiting and time.monotonic() >= due:
                waiting.extend(self._hosts)
                due = time.monotonic() + EVERY_S
            for _ in range(TURNS):
                for _ in range(min(AT_ONCE, len(waiting))):
                    peer = waiting.popleft()
                    if peer in self._hosts:  # otherwise it is no longer in the file
                        polls.create_task(self._poll(peer, self._hosts[peer], heard))
                await asyncio.sleep(TURN_S)
            tell(heard)
            heard.clear()

    def _read_again(self) -> list[Peer]:
        """Read changed files again, and return the new hosts; other hosts keep their answers."""
        stamp = self._files.stamp()
        if stamp == self._stamp:
            return []
        self._stamp = stamp
        try:
            self._plan = self._files.read()
        except UsageError as error:
            self._say(f"{error}; until this is fixed, the old values stay")
            return []
        known = self._hosts
        self._hosts = {peer: known.get(peer) or Host(peer.name) for peer in self._plan.peers}
        return [peer for peer in self._hosts if peer not in known]

    async def _poll(self, peer: Peer, host: Host, heard: list[Host]) -> None:
        scan = Scan()
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._get(peer, scan)
            host.saw(scan.end(), time.monotonic(), time.time())
        except Exception as error:  # any error is shown in the host's cell
            host.failed(why_not(error), time.time())
        heard.append(host)

    async def _get(self, peer: Peer, scan: Scan) -> None:
        """Feed a host's metrics to `scan`.  Raises NoMetrics, OSError and IncompleteReadError."""
        reader, writer = await self._connect(peer)
        try:
            # HTTP 1.0: the host sends no chunks, and closes the connection after its answer.
            # Without TLS, any local user may be the one who listens there.
            token = self._plan.token if peer.tls else ""
            bring = f"Authorization: Bearer {token}\r\n" if token else ""
            writer.write(
                f"GET {peer.path} HTTP/1.0\r\nHost: {peer.where}\r\nAccept: text/plain\r\n"
                f"User-Agent: socketprotector-exporter/{__version__}\r\n{bring}\r\n".encode()
            )
            try:
                length = _length(await reader.readuntil(b"\r\n\r\n"), bool(bring))
            except asyncio.LimitOverrunError as error:
                raise NoMetrics("speaks no HTTP") from error
            size = 0
            while piece := await reader.read(_PIECE_BYTES):
                size += len(piece)
                if size > MOST_BYTES:
                    raise NoMetrics(f"sends more than {MOST_BYTES >> 20} MiB")
                scan.feed(piece)
            if length is not None and size < length:
                raise ConnectionError
        finally:
            writer.transport.abort()

    async def _connect(self, peer: Peer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in peer.host else socket.AF_INET, peer.host)
            addresses = [peer.host]
        except OSError:
            addresses = await self._names.addresses(peer.host)
        failed: OSError = ConnectionError()
        for address in addresses:
            try:
                return await asyncio.open_connection(
                    address,
                    peer.port,
                    limit=_PIECE_BYTES,
                    ssl=self._plan.tls if peer.tls else None,
                    server_hostname=peer.host if peer.tls else None,
                )
            except OSError as error:
                failed = error
        raise failed


def _length(head: bytes, brought: bool) -> int | None:
    """Return the content length in an answer's head, None without one.  Raises NoMetrics.

    brought: whether the request had a token.
    """
    status = _HEAD.match(head)
    if status is None:
        raise NoMetrics("speaks no HTTP")
    if status[1] in (b"401", b"403"):
        raise NoMetrics("refuses our token" if brought else "wants a token: https, --peers-token")
    if status[1] != b"200":
        raise NoMetrics(f"answers {status[1].decode()}")
    if _ENCODED.search(head):
        raise NoMetrics("sends its answer encoded")
    length = _LENGTH.search(head)
    return None if length is None else int(length[1])


def why_not(error: Exception) -> str:
    """Return in a few words why a host gave no answer."""
    match error:
        case NoMetrics():
            return str(error)
        case ssl.SSLCertVerificationError():
            said = f"its certificate: {error.verify_message}"
            return _CERTIFICATES.get(error.verify_code, said)
        case ssl.SSLError():
            reason = getattr(error, "reason", None) or "failed"
            return "speaks no TLS" if reason in _NO_TLS else f"TLS: {reason}"
        case TimeoutError():
            return f"no answer in {in_units(ANSWER_S)}"
        case socket.gaierror():
            return "its name is not known"
        case ConnectionRefusedError():
            return "connection refused"
        case ConnectionError() | asyncio.IncompleteReadError():
            return "connection ended"
        case OSError(errno=int(number)):
            return os.strerror(number).lower()
        case _:
            return f"cannot be polled: {type(error).__name__}"
