"""What a generation is asked, as a client would: accept, http: and https: of --ready and --health.

Pure.  How it is asked: daemon/probe.py.
"""

from __future__ import annotations

import re

from .lazy_dataclass import frozen

#: A command, which --health runs again and again.
CHECK = "check"
#: Kinds of --ready that only an answer meets.
KINDS = ("accept", "http", "https")
#: The kinds under which a generation is asked.  Of `any` the question is one of several ways.
ASKED = ("any", *KINDS)
#: What --ready takes besides, and is hardly the name of a command.
_READY_ALONE = ("accept", "notify", "ack", "fd", "after")
#: `http:`, `[LISTENER]`, `//HOST`, the path, `=STATUS`.
_URL = re.compile(
    r"(?P<kind>https?):(?:\[(?P<name>[^][]+)\])?(?://(?P<host>[^/\s]+))?"
    r"(?P<path>/(?!/)\S*?)(?:=(?P<status>[1-5][0-9][0-9]))?"
)
#: Answers that are good where no other is asked for: what load balancers take, too.
_GOOD = range(200, 400)


@frozen
class Question:
    """What is asked, and which answer is good."""

    kind: str
    listener: str = ""  # by its name; "": the first listener that can be probed
    host: str = ""  # the Host header; "": the address
    path: str = ""
    status: int = 0  # 0: any of 200 to 399

    @property
    def by_http(self) -> bool:
        """Whether it is asked by HTTP."""
        return self.kind in ("http", "https")

    @property
    def good(self) -> tuple[int, ...]:
        """The statuses of good answers."""
        return (self.status,) if self.status else tuple(_GOOD)


def refusal(text: str, where: str) -> str:
    """Say why a question cannot be asked: an option, as it was written.  where: its listeners."""
    return (
        f"{text}: old and new generation accept from the same socket of {where} (?defer_accept, "
        "an abstract name, passed in without ReusePort=yes, or a folder where none can be made), "
        "so the probe would reach either; leave it out, or take another listener"
    )


def read(text: str) -> Question:
    """Read `accept`, `http:/p`, `http:/p=204`, `http://name/p`, `http:[LISTENER]/p`, `https:...`.

    Raises ValueError for anything else.
    """
    if text == "accept":
        return Question(text)
    found = _URL.fullmatch(text)
    if found is None or not (text.isascii() and text.isprintable()):
        raise ValueError(f"{text!r}: write http:/path, http://name/path or http:[LISTENER]/path")
    status = int(found["status"] or 0)
    return Question(found["kind"], found["name"] or "", found["host"] or "", found["path"], status)


def read_health(text: str) -> Question:
    """Read what --health takes: the same, and `check:COMMAND`, of which the path is the command.

    Raises ValueError for anything else.
    """
    kind, _, command = text.partition(":")
    if kind == CHECK and command.strip():
        return Question(CHECK, path=command)
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{error}, accept or check:COMMAND") from None


def read_settle_check(text: str) -> Question:
    """Read what --settle-check takes: http: and https: as above, `check:COMMAND`, or a command.

    Of a command that is the path.  Raises ValueError for anything else.
    """
    kind, _, rest = text.partition(":")
    if kind in ("http", "https"):
        return read(text)
    if kind in _READY_ALONE:
        raise ValueError(f"{text!r} is for --ready: write http:/path, https:/path or check:COMMAND")
    command = rest if kind == CHECK else text
    if not command.strip():
        raise ValueError(f"{text!r}: there is no command")
    return Question(CHECK, path=command)
