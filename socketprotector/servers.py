"""Which options well-known servers want, told by the name of their command.

Pure.  Nothing is chosen by it: it is what --help and --check show, and what is said where a
program that binds its own port was started without.  The same as in docs/servers.md and
docs/coming-from.md, where the reasons stand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from .handoff import CONNECTION, LISTENER
from .records import Program

_PAGE = "docs/servers.md"
#: What follows `SocketProtector --handoff listener`, by the name of the command.
KNOWN: Mapping[str, str] = {
    "gunicorn": "--ready notify 127.0.0.1:8000 -- gunicorn --preload app:app",
    "uvicorn": "--settle 5s http=127.0.0.1:8000 -- uvicorn --fd {fd:http} app:app",
    "hypercorn": "--settle 5s http=127.0.0.1:8000 -- hypercorn --bind fd://{fd:http} --workers 0 "
    "app:app",
    "uwsgi": "--drain-signal HUP 127.0.0.1:8000 -- uwsgi --master --exit-on-reload --need-app "
    "--protocol http --module app",
    "nginx": "--ready after:1s --drain-signal QUIT --env 'NGINX={fd:http};' "
    "'http=0.0.0.0:8000?nonblock=1' -- nginx -g 'daemon off;'",
    "haproxy": "--drain-signal USR1 web=8000 -- haproxy -db -f haproxy.cfg",
    "node": "http=127.0.0.1:8000 -- node http.js {fd:http} {fd:ready}",
    "plackup": "--drain-signal QUIT 0.0.0.0:8000 -- plackup -s Starlet --max-workers=10 app.psgi",
    "starman": "--ready after:2s --drain-signal QUIT 0.0.0.0:8000 -- starman --workers 10 app.psgi",
    "chaussette": "web=127.0.0.1:8000 -- chaussette --fd {fd:web} app:application",
}
#: By what some of these are told of a socket, in the command or as NAME=VALUE in the environment.
_TOLD_BY: Mapping[str, re.Pattern[str]] = {
    "uvicorn": re.compile("--fd|UVICORN_FD="),
    "hypercorn": re.compile(".*fd://|-c|--config"),
    "nginx": re.compile("NGINX="),
    "chaussette": re.compile("--fd"),
}
#: By what gunicorn loads the application before it says READY=1, or may.
_PRELOADS = re.compile("--preload|-c|--config|GUNICORN_CMD_ARGS=")
#: A program that speaks with us says so in its command: these are ours.
_OURS = "socketprotector"
WANTS = f"a program that binds its own port wants --handoff {LISTENER} ({_PAGE})"
#: The same where it is to accept from the socket that it is handed.
TAKES = (
    f"a server has to take over the socket that it is handed, by number or variable ({_PAGE}); one "
    "that can only bind by itself wants a proxy in front (docs/when-not.md)"
)
STDIN = (
    "does it serve on stdin and stdout, as under inetd? that is --handoff stdio (docs/handoff.md)"
)
_PYTHON = re.compile(r"python[0-9.]*$")
_TAKEN = re.compile(r"address already in use|EADDRINUSE|errno 98\b|os error 98\b", re.IGNORECASE)


def known(command: Sequence[str]) -> str | None:
    """Return the name of the well-known server that a command starts, if it is one."""
    if any(_OURS in word for word in command[1:]):
        return None
    words = list(command)
    while words and (_base(words[0]) == "env" or "=" in words[0]):
        words.pop(0)
    if len(words) > 2 and _PYTHON.match(_base(words[0])) and words[1] == "-m":
        words = words[2:]
    name = _base(words[0]) if words else ""
    return name if name in KNOWN else None


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def line(name: str) -> str:
    """Return a command line for a known server, ready to be copied."""
    return f"SocketProtector --handoff {LISTENER} {KNOWN[name]}"


def wants(name: str) -> str:
    """Say what a known server wants that was started as if it were handed connections."""
    return f"{name} binds its own port; start it as in: {line(name)}"


def doubt(command: Sequence[str], variables: Iterable[str], *, settles: bool) -> str | None:
    """Say what a known server lacks that would only seem to serve under --handoff listener.

    variables: the environment, as NAME=VALUE.  settles: a generation that fails soon after it was
    thought ready is rolled back.
    """
    name = known(command)
    if name is None:
        return None
    words = (*command, *variables)
    told_by = _TOLD_BY.get(name)
    if told_by is not None and not any(map(told_by.match, words)):
        return f"nothing tells {name} of the socket that it is handed; start it as in: {line(name)}"
    if name == "gunicorn" and not settles and not any(map(_PRELOADS.match, words)):
        return (
            "gunicorn says that it is ready before it has loaded the application, so a reload "
            f"takes one that cannot be loaded, too; start it as in: {line(name)}"
        )
    return None


def table() -> str:
    r"""Return all that is known, as click's \b has it: a paragraph that is not wrapped."""
    return "\n".join(("\b", "Servers that bind their own port, as in:", *map(line, KNOWN)))


def advice(
    program: Program,
    *,
    said: str = "",
    unseen: bool = False,
    listens: Callable[[], str | None] = lambda: None,
    passes_over: bool = False,
) -> str:
    """Say what to do about a program that takes no connection; "" where nothing is known.

    said: its last words.  unseen: they are not ours to see.  listens: returns an address where it
    listens by itself, if it does.  passes_over: clients wait, and it is the one to accept them.
    """
    name = known(program.argv)
    if program.handoff == LISTENER and (passes_over or _TAKEN.search(said)):
        as_in = f"{name} takes it over, started as in: {line(name)} ({_PAGE})" if name else ""
        address = listens()
        where = f"it listens on {address} by itself" if address else ""
        return "; ".join(filter(None, (where, TAKES, as_in)))
    if program.handoff != CONNECTION:
        return ""
    if name is not None:
        return f"{wants(name)} ({_PAGE})"
    if _TAKEN.search(said):
        return f"it binds an address by itself, which is taken; {WANTS}"
    if unseen:
        return f"if it says that its address is in use: {WANTS}"
    address = listens()
    return f"it listens on {address} by itself; {WANTS}" if address else ""


def hint(program: Program, *, taken_from: bool, advice: Callable[[], str]) -> str | None:
    """Say what to do where workers take nobody who waits for them; None where nothing is known.

    taken_from: somebody was taken, as far as is known, so its port is not the program's own.
    """
    if taken_from:
        return "its workers are busy, or hang: see their counts, scale, or have a --watchdog"
    return advice() or (WANTS if program.handoff == CONNECTION else None)
