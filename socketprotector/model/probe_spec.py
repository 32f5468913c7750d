"""The specifications of probes and checks: accept, http:, https: and check:COMMAND.

Pure.  They come from --ready, --health and --settle-check; daemon/probe.py sends the probes.
"""

from __future__ import annotations

import re

from .lazy_dataclass import frozen
from .ready_kinds import ANY, KINDS, LEGACY

#: A check by a command.
CHECK = "check"
#: `http:`, `[LISTENER]`, `//HOST`, the path, `=STATUS`.
_URL = re.compile(
    r"(?P<kind>https?):(?:\[(?P<name>[^][]+)\])?(?://(?P<host>[^/\s]+))?"
    r"(?P<path>/(?!/)\S*?)(?:=(?P<status>[1-5][0-9][0-9]))?"
)
#: The end of a path that may have been meant as a status.
_NO_STATUS = re.compile(r"=(?P<text>[0-9][0-9xX]{2})")
#: The good statuses if none is given, as in load balancers.
_GOOD = range(200, 400)


@frozen
class ProbeSpec:
    """One probe or check, with its good answers."""

    kind: str
    listener: str = ""  # by its name; "": the first listener that can be probed
    host: str = ""  # the Host header; "": the address
    path: str = ""
    status: int = 0  # 0: any of 200 to 399

    @property
    def by_http(self) -> bool:
        """Whether the probe is an HTTP request."""
        return self.kind in ("http", "https")

    @property
    def good(self) -> tuple[int, ...]:
        """The statuses of good answers."""
        return (self.status,) if self.status else tuple(_GOOD)


def refusal(text: str, where: str) -> str:
    """Return why a probe is impossible.  text: the option as written; where: its listeners."""
    return (
        f"{text}: the probe could reach either generation, because both share the socket of "
        f"{where} (?defer_accept, an abstract name, passed without ReusePort=yes, or no room for a "
        "second socket); leave the probe out, or choose another listener"
    )


def read(text: str) -> ProbeSpec:
    """Return the probe in a text.  Raises ValueError for any other text.

    text: `accept`, `http:/p`, `http:/p=204`, `http://name/p`, `http:[LISTENER]/p`, `https:...`.
    """
    if text == "accept":
        return ProbeSpec(text)
    found = _URL.fullmatch(text)
    if found is None or not (text.isascii() and text.isprintable()):
        raise ValueError(f"{text!r}: write http:/path, http://name/path or http:[LISTENER]/path")
    status = int(found["status"] or 0)
    return ProbeSpec(found["kind"], found["name"] or "", found["host"] or "", found["path"], status)


def refuse_unclear(text: str) -> None:
    """Raise ValueError for an HTTP probe whose end may be a status, or part of the path.

    Call this only for options, because a state from an earlier version may contain such a probe.
    """
    found = _URL.fullmatch(text)
    path, status = (found["path"], found["status"]) if found else ("", None)
    _, has_query, query = path.partition("?")
    if has_query:
        name = query.rpartition("&")[2]
        if status and "=" not in name:
            raise ValueError(
                f"{text!r}: is {status} a status or part of the query? "
                f"write {text}=200 (query, then status), or ?{query}=={status}"
            )
    elif not status and (end := _NO_STATUS.fullmatch(path[-4:])):
        raise ValueError(f"{text!r}: {end['text']} is no status; write 100 to 599")


def read_health(text: str) -> ProbeSpec:
    """Return the check in a value of --health: a probe, or `check:COMMAND` (path: the command).

    Raises ValueError for any other text.
    """
    kind, _, command = text.partition(":")
    if kind == CHECK and command.strip():
        return ProbeSpec(CHECK, path=command)
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{error}, accept or check:COMMAND") from None


def read_settle_check(text: str) -> ProbeSpec:
    """Return the check in a value of --settle-check: http:, https:, `check:COMMAND` or a command.

    A command becomes the path.  Raises ValueError for any other text.
    """
    kind, _, rest = text.partition(":")
    if kind in ("http", "https"):
        return read(text)
    if kind in {*KINDS} - {CHECK, ANY, LEGACY}:  # do not run this text as a command
        raise ValueError(f"{text!r} is for --ready: write http:/path, https:/path or check:COMMAND")
    command = rest if kind == CHECK else text
    if not command.strip():
        raise ValueError(f"{text!r}: there is no command")
    return ProbeSpec(CHECK, path=command)
