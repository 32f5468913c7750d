"""The options that well-known servers need, by the name of their command.

Pure.  This table changes no setting.  It is for --help, for --check, and for messages about a
server that was started without these options and binds its own port.  docs/servers.md explains
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from .handoff_modes import LISTENER, HandoffMode
from .lazy_dataclass import frozen
from .records import Program
from .text import in_units

_PAGE = "docs/servers.md"


@frozen
class Server:
    """The command line of a well-known server under --handoff listener."""

    listen: str
    options: str = ""  # options of SocketProtector
    adds: str = ""  # the server's options, to be written after its name
    rest: str = ""  # an example of the user's own words
    #: The server's options to remove, because they bind an address or contradict `adds`: options
    #: with a value (drops) and without (flags).  If drops is None, commands of this server are not
    #: rewritten.
    drops: tuple[str, ...] | None = None
    flags: tuple[str, ...] = ()
    #: How long the server keeps connections open after the drain signal; None: no limit by default.
    limit_s: float | None = None
    #: The server's option for this limit.
    limit_option: str = ""
    #: The server's option that ends connections evenly or at a limit, if it is not `limit_option`.
    ends_by: str = ""

    @property
    def drain_signal(self) -> str:
        """The signal to use if TERM would close open connections; "" if TERM does not."""
        _, named, after = self.options.partition("--drain-signal ")
        return after.partition(" ")[0] if named else ""


KNOWN: Mapping[str, Server] = {
    "gunicorn": Server(
        options="--ready notify",
        listen="127.0.0.1:8000",
        adds="--preload",
        rest="app:app",
        drops=("-b", "--bind"),
        flags=("--preload", "--reuse-port", "-D", "--daemon"),
        limit_s=30.0,
        limit_option="--graceful-timeout",
    ),
    "uvicorn": Server(
        options="--settle 5s",
        listen="http=127.0.0.1:8000",
        adds="--fd {fd:http}",
        rest="app:app",
        drops=("--fd", "--host", "--port", "--uds"),
        limit_option="--timeout-graceful-shutdown",
    ),
    "hypercorn": Server(
        options="--settle 5s",
        listen="http=127.0.0.1:8000",
        adds="--bind fd://{fd:http} --workers 0",
        rest="app:app",
        drops=("-b", "--bind", "--insecure-bind", "--quic-bind", "-w", "--workers"),
        limit_s=3.0,
        limit_option="--graceful-timeout",
    ),
    "uwsgi": Server(
        options="--drain-signal HUP",
        listen="127.0.0.1:8000",
        adds="--master --exit-on-reload --need-app --protocol http",
        rest="--module app",
        limit_s=60.0,
        limit_option="--worker-reload-mercy",
    ),
    "nginx": Server(
        options="--drain-signal QUIT --env 'NGINX={fd:http};'",
        listen="'http=0.0.0.0:8000?nonblock=1'",
        adds="-g 'daemon off;'",
        ends_by="worker_shutdown_timeout",
    ),
    "haproxy": Server(
        options="--drain-signal USR1",
        listen="web=8000",
        adds="-db",
        rest="-f haproxy.cfg",
        ends_by="close-spread-time",
    ),
    "node": Server(listen="http=127.0.0.1:8000", rest="http.js {fd:http} {fd:ready}"),
    "plackup": Server(
        listen="0.0.0.0:8000",
        adds="-s Starlet",
        rest="--max-workers=10 app.psgi",
    ),
    "starman": Server(
        options="--drain-signal QUIT",
        listen="0.0.0.0:8000",
        rest="--preload-app --workers 10 app.psgi",
    ),
    "chaussette": Server(
        listen="web=127.0.0.1:8000",
        adds="--fd {fd:web}",
        rest="app:application",
        drops=("--fd", "--host", "--port"),
        limit_s=0.0,
    ),
    "puma": Server(
        listen="127.0.0.1:9292",
        adds="--bind-to-activated-sockets only",
        rest="config.ru",
        ends_by="worker_shutdown_timeout",
    ),
}
#: Words in a server's command or environment (NAME=VALUE) that give the socket to the server.
_SOCKET_OPTIONS: Mapping[str, re.Pattern[str]] = {
    "uvicorn": re.compile("--fd|UVICORN_FD="),
    "hypercorn": re.compile(".*fd://|-c|--config"),
    "nginx": re.compile("NGINX="),
    "chaussette": re.compile("--fd"),
}
#: The option of puma, in its command or configuration, with which it needs no address.
_TAKES_ALL = re.compile(r"bind[-_]to[-_]activated[-_]sockets")
#: Servers whose module for inherited sockets, Net::Server::SS::PreFork, supports only TCP.
_TCP_ALONE = re.compile("starman$|(?:-s|--server)[= ]?Starman")
#: An empty variable of Server::Starter: with it, Net::Server does not load that module.
_WITHOUT_STARTER = "SERVER_STARTER_PORT="
#: Words with which gunicorn may load the application before it sends READY=1.
_PRELOADS = re.compile("--preload|-c|--config|GUNICORN_CMD_ARGS=")
#: A command that contains this word uses the client library or an adapter.
OURS = "socketprotector"
#: Servers that load an application; loading it may fail.
_LOADS = ("gunicorn", "uvicorn", "hypercorn")
WANTS = (
    "a program that binds its own port, or accepts on descriptor 3, needs "
    f"--handoff {LISTENER.name} ({_PAGE})"
)
#: The advice for a server that should accept from the passed socket.
TAKES = (
    f"the server must accept on the inherited socket, by number or variable ({_PAGE}); a wrapper "
    "must exec the server, which compares LISTEN_PID; a server that can only bind its own port "
    "needs a proxy in front (docs/comparison.md)"
)
STDIN = "does it serve on stdin and stdout, as under inetd? use --handoff stdio (docs/modes.md)"
_PYTHON = re.compile(r"python[0-9.]*$")
#: Several workers of hypercorn: the first idle worker ends the others, with requests in progress.
_SEVERAL = re.compile(r"(?:--workers[= ]|-w ?)0*(?:[2-9]|1\d)")
#: puma in cluster mode, which has a limit; as a single process puma has no limit.
_CLUSTERED = re.compile(r"(?:--workers[= ]|-w ?|WEB_CONCURRENCY=)0*[1-9]")
_CLUSTER_LIMIT_S = 30.0
#: A configuration file in the command, which may set more options.
_CONFIGURED = re.compile(r"-c$|--config|--ini|.*\.(?:ini|toml|ya?ml|xml)$")
#: What a server says if descriptor 3 or LISTEN_FDS is not the listening socket that it expects.
_NO_LISTENER = re.compile(
    r"invalid argument|EINVAL\b|not a socket|ENOTSOCK\b|bad file descriptor|EBADF\b"
    r"|not supported|EOPNOTSUPP\b|LISTEN_FDS|\(os error (?:9|22|88|95)\)",
    re.IGNORECASE,
)
#: What a daemon says that found no socket of the C++ SocketProtector: perror()'s words, without the
#: address or number of an error about a database.
_REFUSED = re.compile(r"^(?!.*Exception)[^\d\n]*Connection refused[^\d\n]*$", re.MULTILINE)
_ORIGINAL = "if it was built for the C++ SocketProtector, it needs --handoff legacy (docs/stdio.md)"
_TAKEN = re.compile(r"address already in use|EADDRINUSE|errno 98\b|os error 98\b", re.IGNORECASE)


def known(command: Sequence[str]) -> str | None:
    """Return the name of the well-known server that a command starts, or None."""
    if any(OURS in word for word in command[1:]):
        return None
    at = program_index(command)
    name = _base(command[at]) if at < len(command) else ""
    return name if name in KNOWN else None


def program_index(command: Sequence[str]) -> int:
    """Return the index of the program's name in a command, after any env(1) and `python -m`."""
    at = 0
    while at < len(command) and (_base(command[at]) == "env" or "=" in command[at]):
        at += 1
    if at + 2 < len(command) and _PYTHON.match(_base(command[at])) and command[at + 1] == "-m":
        at += 2
    return at


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def line(name: str) -> str:
    """Return an example command line for a known server."""
    server = KNOWN[name]
    words = (server.options, server.listen, "--", name, server.adds, server.rest)
    return " ".join(filter(None, (f"SocketProtector --handoff {LISTENER.name}", *words)))


def to_add(name: str) -> str:
    """Return advice on what to add to a command that starts a known server."""
    server = KNOWN[name]
    listen = server.listen.strip("'")
    called = f", call its address {listen.partition('=')[0]}=..." if "=" in listen else ""
    queried = f", with ?{listen.partition('?')[2]} behind it" if "?" in listen else ""
    ours = f"--handoff {LISTENER.name} {server.options}".rstrip()
    behind = f", and {server.adds} behind {name}" if server.adds else ""
    return f"add {ours}{called}{queried}{behind} ({_PAGE})"


def lacks(
    command: Sequence[str],
    variables: Iterable[str],
    *,
    mode: HandoffMode,
    settles: bool,
    after_s: float | None,
    drain_signal: str,
    unix: bool = False,
    passed: bool = False,
    files: str = "",
) -> str | None:
    """Return what would go wrong with a known server started by this command; None if nothing.

    variables: the environment, as NAME=VALUE.
    settles: whether a generation that fails soon after it was ready is rolled back.
    after_s: the time after which a timer makes a worker ready; None without a timer.
    drain_signal: the signal's name without SIG.
    unix: whether the server gets a UNIX socket.
    passed: whether a service manager passed in each of them, so that they keep their names.
    files: the contents of the server's configuration files.
    """
    name = known(command)
    if name is None:
        return None
    if mode.needs_library:
        return (
            f"{name} binds its own port; it takes connections from SocketProtector only with the "
            "client library (docs/frameworks.md)"
        )
    if not mode.workers_accept:
        return None
    words = (*command, *variables)
    if unix and not passed and name == "nginx":
        return (
            "nginx finds a UNIX socket only by its path, but each generation's socket has another "
            "name; use 127.0.0.1:PORT instead"
        )
    socket_option = _SOCKET_OPTIONS.get(name)
    is_named = socket_option is None or any(map(socket_option.match, words))
    if unix and not passed and name == "puma":
        # It compares its -b with the name of a generation's socket.
        is_named = _TAKES_ALL.search(" ".join((*words, files))) is not None
    if not is_named:
        return f"{name} was not given the socket"
    at = program_index(command)
    starter = _WITHOUT_STARTER not in words
    if unix and starter and any(map(_TCP_ALONE.match, (name, *_pairs(command[at:])))):
        return (
            "Starman takes a UNIX socket for a TCP one and dies of its first client "
            f"({_PAGE} has the options for a path)"
        )
    graceful = KNOWN[name].drain_signal
    if graceful and drain_signal != graceful:
        return f"at a reload {drain_signal} closes open connections of {name}; {graceful} does not"
    if name == "hypercorn" and any(map(_SEVERAL.match, _pairs(command))):
        return "at a reload several hypercorn workers cut off each other's requests"
    if settles or name not in _LOADS:
        return None
    if name == "gunicorn" and "preload_app" in files:
        return None  # a file of the operator mentions it: the operator has decided
    if name == "gunicorn" and not any(map(_PRELOADS.match, words)):
        return (
            "gunicorn reports READY before it has loaded the application, so a reload also accepts "
            "a broken application"
        )
    if after_s is not None:
        return (
            f"{name} counts as ready after {in_units(after_s)}, so a reload also accepts a broken "
            "application if it fails later than that"
        )
    return None


def ends_connections_by(name: str) -> str:
    """Return advice to use a server's own option instead of a spread; "" if it has no option."""
    option = KNOWN[name].ends_by or KNOWN[name].limit_option
    return f"use its own {option} instead" if option else ""


def drain_limit(
    command: Sequence[str],
    variables: Mapping[str, str],
    *,
    drain_limit_s: float,
    files: str = "",
) -> str | None:
    """Return a warning if a server's own limit closes connections before --drain-timeout does.

    Returns None if it does not, if `files` has the limit, or if the command has the limit and there
    is no --drain-timeout.
    drain_limit_s: the --drain-timeout; 0: no limit.
    files: the contents of the server's configuration files, which may set the limit.
    """
    name = known(command)
    if name is None:
        return None
    option, limit_s = KNOWN[name].limit_option, KNOWN[name].limit_s
    words, file = list(command), any(map(_CONFIGURED.match, command))
    if name == "gunicorn":
        words = [*variables.get("GUNICORN_CMD_ARGS", "").split(), *words]
    if name == "uvicorn" and "UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN" in variables:
        words = [option, variables["UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN"], *words]
    chosen = _value(words, option)
    if chosen.isascii() and chosen.isdecimal():
        limit_s, file = float(chosen), False
    if name == "puma":
        own = [f"WEB_CONCURRENCY={variables.get('WEB_CONCURRENCY', '')}", *_pairs(command)]
        if any(map(_CLUSTERED.match, own)):
            option, limit_s = "worker_shutdown_timeout", _CLUSTER_LIMIT_S
    if limit_s is None or 0 < drain_limit_s <= limit_s or (chosen and not drain_limit_s):
        return None
    name_in_file = option.removeprefix("--").replace("-", "_")
    if option and not chosen and name_in_file in files.replace("-", "_"):
        return None
    after = f"{in_units(limit_s)} after a reload" if limit_s else "at a reload"
    by = option and f" ({option}{' or its file' if file else ''})"
    ours = f", before --drain-timeout ({in_units(drain_limit_s)})" if drain_limit_s else ""
    how = f"; raise {option if ours else 'it'} if you serve streams" if option else ""
    return f"{name} cuts connections still open {after}{by}{ours}{how}"


def _value(words: Sequence[str], option: str) -> str:
    """Return the last value of an option in `words`; "" if the option is missing."""
    found = ""
    for word, following in _neighbours(words):
        if option and word == option:
            found = following
        elif option and word.startswith(f"{option}="):
            found = word[len(option) + 1 :]
    return found


def _neighbours(words: Sequence[str]) -> Iterable[tuple[str, str]]:
    return zip(words, [*words[1:], ""], strict=True)


def _pairs(words: Sequence[str]) -> Iterable[str]:
    """Return each word, and each word together with the next word."""
    return (text for word, after in _neighbours(words) for text in (word, f"{word} {after}"))


def advice(
    program: Program,
    *,
    said: str = "",
    unseen: bool = False,
    listens: Callable[[], str | None] | None = None,
    ignores_socket: bool = False,
    proved_ready: bool = False,
) -> str:
    """Return advice about a program that takes no connection; "" if there is no advice.

    said: the program's last words.
    unseen: whether SocketProtector cannot read the program's output.
    listens: returns the address of a listener that the program has bound itself, or None.  Passed
    only for a running program.
    ignores_socket: whether the program seems to accept no connection from our socket: a client
    waits there, or a probe or check has failed.
    proved_ready: whether a worker has become ready by something other than a timer.  Then only an
    address in use is a possible cause.
    """
    if proved_ready and not _TAKEN.search(said):
        return ""
    name = known(program.argv)
    if program.mode.workers_accept and (ignores_socket or _TAKEN.search(said)):
        example = f"{name} takes it over, started as in: {line(name)} ({_PAGE})" if name else ""
        address = listens() if listens is not None else None
        where = f"it listens on its own socket at {address}" if address else ""
        return "; ".join(filter(None, (where, TAKES, example)))
    if not program.mode.needs_library:
        return ""
    if name is not None:
        start = f"start it as in: {line(name)} (--check shows your command; {_PAGE})"
        return f"{name} binds its own port; {start}"
    if _TAKEN.search(said):
        return f"it binds its own address, which is in use; {WANTS}"
    if _NO_LISTENER.search(said):
        return WANTS
    if _REFUSED.search(said):
        return _ORIGINAL
    if unseen:
        return f"if its output says that its address is in use: {WANTS}; {_ORIGINAL}"
    if listens is None:
        return ""
    if address := listens():
        return f"it listens on its own socket at {address}; {WANTS}"
    return WANTS if program.ready == "notify" else ""  # another --ready was chosen for this program


def detached(program: Program) -> str:
    """Return advice about a worker that exited at once and left a process behind."""
    advice = "does it detach? make it stay in the foreground"
    return f"{advice}; {STDIN}" if program.mode.needs_library else advice


def hint(
    program: Program, *, has_ready: bool, taken_from: bool, advice: Callable[[], str]
) -> str | None:
    """Return advice for the case that no worker takes waiting clients; None without advice.

    has_ready: whether a worker is ready.
    taken_from: whether workers have taken a connection before, so the server uses our socket.
    """
    if not has_ready:
        return "no worker is ready: check `status` and `crashes`"
    if taken_from and program.mode.pooled:
        return "programs are busy or stuck: check `connections`; then raise `workers` and reload"
    if taken_from:
        more = "`replace` stuck workers" if program.watchdog_s else "set --watchdog"
        return f"workers are busy or stuck: check `status`; then `scale +1`, or {more}"
    return advice() or (WANTS if program.mode.needs_library else None)
