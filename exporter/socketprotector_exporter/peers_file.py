"""Parses the file of `--peers`, which has the address of one host's exporter in each line.

    # NAME, if it differs from the host's name, and the address
    https://web-1.example.org:9517
    database https://10.0.0.12:9517

Pure.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from socketprotector.ctl.api import UsageError, escape

_REMARK = re.compile(r"(^|\s)#.*")
_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<host>[\w.-]+)):(?P<port>\d{1,5})"
    r"(?P<path>/[!-~]*)?",
    re.ASCII,
)
_METRICS = "/metrics"


@dataclass(frozen=True, slots=True)
class Peer:
    """A host, with the address of its exporter."""

    name: str
    host: str  # a name or an address, without brackets
    port: int
    path: str
    tls: bool

    @property
    def where(self) -> str:
        """Host and port, in the form of a Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str, file: str) -> tuple[Peer, ...]:
    """Return the peers in a file's text, in its order.

    Raises UsageError: one line with file and line number, and a valid form.
    """
    found: list[Peer] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = _REMARK.sub("", line).split()
        if not words:
            continue
        said = f"--peers {file}: line {number}"
        peer = _peer(words, said)
        if peer.name in lines:
            raise UsageError(
                f"{said}: {peer.name} is in line {lines[peer.name]}, too; write a different name "
                "before the address"
            )
        lines[peer.name] = number
        found.append(peer)
    if not found:
        raise UsageError(f"--peers {file}: no host; write a line for each: https://HOST:PORT")
    return tuple(found)


def _peer(words: list[str], said: str) -> Peer:
    address = _ADDRESS.fullmatch(words[-1])
    if len(words) > 2 or address is None or not 0 < int(address["port"]) < 65536:
        # The message does not repeat the line, which may contain a password.
        raise UsageError(
            f"{said}: write [NAME] https://HOST:PORT, as in web-1 https://10.0.0.11:9517"
        )
    host, tls = address["ipv6"] or address["host"], address["scheme"] == "https"
    if not tls and not _is_loopback(host):
        raise UsageError(
            f"{said}: http:// is for loopback addresses only, because others could read the token "
            "or answer instead; write https://, and start that exporter with --tls-cert"
        )
    path = address["path"] if address["path"] not in (None, "/") else _METRICS
    return Peer(
        escape(words[0]) if len(words) == 2 else host, host, int(address["port"]), path, tls
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
