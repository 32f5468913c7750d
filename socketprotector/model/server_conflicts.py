"""Settings with which a well-known server starts, but serves no client or cannot be reloaded.

Pure.  Unlike known_servers.lacks(), these warnings say what to leave out or to change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .text import in_units

#: gunicorn's long options, and how many letters are needed, because it takes abbreviations.
_PID, _REUSE_PORT = ("--pid", 4), ("--reuse-port", 5)


def of(
    name: str,
    words: Sequence[str],
    variables: Mapping[str, str],
    *,
    after_s: float | None,
    stop_first: bool,
    tcp6: bool,
    files: str,
) -> Iterator[str]:
    """Yield a warning about each such setting of a known server.

    words: the server's words, with those of the variable GUNICORN_CMD_ARGS.
    variables: the server's environment.
    after_s: the time after which a timer makes a worker ready; None without a timer.
    stop_first: whether a reload ends the old server first.
    tcp6: whether the server gets an IPv6 socket.
    files: the contents of the server's configuration files.
    """
    if name == "gunicorn":
        found = _assignments(files)
        if _has(words, _REUSE_PORT) or found.get("reuse_port") == "True":
            yield "gunicorn's reuse_port (--reuse-port) lets no client reach it; leave it out"
        has_pid = any(each.startswith("-p") for each in words) or _has(words, _PID)
        if not stop_first and (has_pid or _is_text(found.get("pidfile", ""))):
            yield "gunicorn's pidfile (--pid) lets each reload fail; leave it out"
    if name == "nginx" and after_s is not None:
        yield (
            f"nginx counts as ready after {in_units(after_s)}, but may take longer to refuse its "
            "configuration; leave out --ready"
        )
    if name == "plackup" and tcp6 and _server(words, variables) == "Starlet":
        yield "Starlet resets each client of an IPv6 socket; use 0.0.0.0:PORT"


def _has(words: Sequence[str], option: tuple[str, int]) -> bool:
    name, letters = option
    options = (each.partition("=")[0] for each in words)
    return any(len(each) >= letters and name.startswith(each) for each in options)


def _assignments(files: str) -> dict[str, str]:
    """Return the last value of each name that a line without indentation assigns."""
    pairs = (line.partition("=") for line in files.splitlines() if line[:1].isalpha())
    return {name.rstrip(): value.partition("#")[0].strip() for name, _, value in pairs}


def _is_text(value: str) -> bool:
    """Return whether a value in Python is a text that is not empty."""
    return value[:1] in ("'", '"') and value[1:2] not in ("", value[:1])


def _server(words: Sequence[str], variables: Mapping[str, str]) -> str:
    """Return plackup's server."""
    for word, after in zip(words, (*words[1:], ""), strict=True):
        if word in ("-s", "--server"):
            return after
        for option in ("-s", "--server="):
            if word.startswith(option):
                return word[len(option) :]
    return variables.get("PLACK_SERVER", "")
