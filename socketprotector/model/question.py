"""What a generation is asked before it gets its first client: --ready accept, http: and https:.

Pure.  How it is asked: daemon/asking.py.
"""

from __future__ import annotations

import re

from .frozen import frozen

#: Kinds of --ready that only an answer meets.
KINDS = ("accept", "http", "https")
#: The kinds under which a generation is asked.  Of `any` the question is one of several ways.
ASKED = ("any", *KINDS)
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
    listener: str = ""  # by its name; "": the first one that can be asked
    host: str = ""  # the Host header; "": the address
    path: str = ""
    status: int = 0  # 0: any of 200 to 399

    @property
    def good(self) -> tuple[int, ...]:
        """The statuses of good answers."""
        return (self.status,) if self.status else tuple(_GOOD)


def refusal(text: str, where: str) -> str:
    """Say why a question cannot be asked.  where: the listeners that it is about."""
    return (
        f"--ready {text}: old and new generation accept from the same socket of {where} (UNIX, "
        "?defer_accept, or passed in without ReusePort=yes), so the question would reach either; "
        "leave --ready out, or take another listener"
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
