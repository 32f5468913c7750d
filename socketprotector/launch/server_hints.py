"""Reports options that a well-known server lacks, with a corrected command line.

Only the terminal shows the complete line.  The log and the status omit arguments that may be secret
(docs/security.md).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

from ..model import known_servers, server_conflicts
from ..model.handoff_modes import LISTENER, HandoffMode
from ..model.settings import Settings
from . import options, preflight, user_access
from .listen_spec import Listen

#: Words that need no quotes in a shell, {fd:NAME} among them.
_PLAIN = re.compile(r"(?:[\w@%+=:,./-]|\{fd:\w+\})+", re.ASCII)
#: Words that may contain a secret: NAME=VALUE, as in --env and env(1), or the command of a check.
_SECRET = re.compile(r"(?s)((?:--env=)?[A-Za-z_]\w*=|(?:--[a-z-]+=)?check:).+")
_LEFT_OUT = "..."
_NAMED = re.compile(r"\{fd:(\w+)\}")
#: Options that --handoff listener refuses, or that an unmodified server does not support.  If the
#: command line has one, no corrected line is shown.
_REFUSED = {
    f"--{each.key}" for each in options.OPTIONS if each.key in {*LISTENER.refuses, "retire-after"}
}
#: Files that gunicorn and puma read by default.
_DEFAULT_FILES = ("gunicorn.conf.py", "config/puma.rb")
#: How much of a file to read.  This is enough, because imports are at the top.
_READ_BYTES = 1 << 16


def of(settings: Settings, listens: Sequence[Listen], *, typed: bool) -> Iterator[str]:
    """Yield what is wrong with a well-known server's options, and how to start it.

    typed: the line is for the terminal, and has all words; otherwise possible secrets are omitted.
    """
    name = known_servers.known(settings.command)
    if name is None:
        return
    try:
        environment = preflight.environment_of(settings)
    except (OSError, ValueError):
        return
    after_s = settings.ready_after_s if settings.ready == "after" else None
    files = _files(settings, environment)
    if settings.mode.workers_accept:
        yield from server_conflicts.of(
            name,
            _words(settings, environment),
            environment,
            after_s=after_s,
            stop_first=settings.policy.stop_first,
            tcp6=any(each.address.startswith("tcp:[") for each in settings.listeners),
            files=files,
        )
    paths = {each.text for each in listens if each.path is not None}
    found = known_servers.lacks(
        settings.command,
        (f"{variable}={value}" for variable, value in environment.items()),
        mode=settings.mode,
        settles=settings.policy.settle_s > 0,
        after_s=after_s,
        drain_signal=signal.Signals(settings.drain_signal).name.removeprefix("SIG"),
        unix=bool(paths),
        passed=paths <= {each.text for each in settings.listeners if each.foreign},
        files=files,
    )
    if found is None or (settings.mode.needs_library and _names_library(settings, environment)):
        return
    own = line(settings.origin.words, listens, settings.mode, whole=typed)
    if own is not None:
        more = "" if typed or _LEFT_OUT not in own else " (--check shows it whole)"
        how = f"start it as: {own}{more}"
    elif typed:
        how = known_servers.to_add(name)
    else:
        how = f"start it as in: {known_servers.line(name)}"
    yield f"{found}; {how}"


def drain_limits(settings: Settings) -> Iterator[str]:
    """Yield a warning if a known server cuts open connections before --drain-timeout does."""
    if settings.mode.workers_accept:
        with suppress(OSError, ValueError):
            environment = preflight.environment_of(settings)
            found = known_servers.drain_limit(
                settings.command,
                environment,
                drain_limit_s=settings.policy.drain_limit_s,
                files=_files(settings, environment),
            )
            if found is not None:
                yield found


def uses_library(settings: Settings) -> bool:
    """Return True if the command, or a file that it names, mentions the client library."""
    try:
        return _names_library(settings, preflight.environment_of(settings))
    except (OSError, ValueError):
        return False  # check_env_file() refuses an unreadable file


def _names_library(settings: Settings, environment: Mapping[str, str]) -> bool:
    """Return True if the command, or a file that it or gunicorn reads, names the client library."""
    words = _words(settings, environment)
    return known_servers.OURS in "".join((*words, _files(settings, environment)))


def _words(settings: Settings, environment: Mapping[str, str]) -> Sequence[str]:
    return (*settings.command[1:], *environment.get("GUNICORN_CMD_ARGS", "").split())


def _files(settings: Settings, environment: Mapping[str, str]) -> str:
    """Return what the workers' user can read of the files that a server reads at its start."""
    return user_access.as_worker(settings, partial(_read_files, settings, environment))


def _read_files(settings: Settings, environment: Mapping[str, str]) -> str:
    """Return the beginnings of the files that the command names or a server reads by default."""
    words, found = _words(settings, environment), []
    named = [word.rpartition("=")[2].removeprefix("-c").removeprefix("file:") for word in words]
    for name in (*named, *_DEFAULT_FILES):
        path = os.path.join(settings.directory, name)
        try:
            # Check before open(), which would wake the writer of a FIFO, or start a device.
            if not stat.S_ISREG(os.stat(path).st_mode):
                continue
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                found.append(os.read(fd, _READ_BYTES).decode("utf-8", "replace"))
            finally:
                os.close(fd)
        except (OSError, ValueError):
            continue
    return "\n".join(found)


def line(
    words: Sequence[str], listens: Sequence[Listen], mode: HandoffMode, *, whole: bool = True
) -> str | None:
    """Return the line with all options that the server needs; None if we cannot be sure of it.

    words: the typed words.  listens: the addresses.  mode: the handoff mode of the typed line.
    whole: include words that may be secret.
    """
    ours, command = options.split(words)
    name = known_servers.known(command)
    server = known_servers.KNOWN[name] if name else None
    texts = {each.text for each in listens}
    places = [place for place, word in enumerate(ours) if word in texts]
    if server is None or server.drops is None or len(places) != len(listens):
        return None
    if _REFUSED.intersection(word.partition("=")[0] for word in ours):
        return None
    adds = server.adds
    named = _NAMED.search(adds)
    if named is not None:
        if len(listens) != 1 or listens[0].passed is not None:
            return None
        if listens[0].called:
            adds = adds.replace(named[0], f"{{fd:{listens[0].called}}}")
        else:
            ours[places[0]] = f"{named[1]}={ours[places[0]]}"
    addresses = {ours[place] for place in places}
    wanted = server.options.split()
    ours, ours_removed = _without(ours, {"--handoff", "--ready", "--settle"}, {"--check"})
    if "--settle" in ours_removed:
        wanted = [*_without(wanted, {"--settle"})[0], "--settle", ours_removed["--settle"]]
    if mode.workers_accept and "--ready" in ours_removed and "--ready" not in wanted:
        wanted += ["--ready", ours_removed["--ready"]]
    at = known_servers.program_index(command) + 1
    rest, dropped = _without(command[at:], server.drops, server.flags)
    workers = dropped.get("--workers") or dropped.get("-w") or ""
    if workers.isdecimal() and "--workers" not in " ".join(ours):
        wanted += ["--workers", workers]
    ours, before = [*wanted, *ours], command[:at]
    if not whole:
        ours, before = ([*_masked(each, addresses)] for each in (ours, before))
        rest = [_LEFT_OUT] * bool(rest)
    head = ["SocketProtector", "--handoff", LISTENER.name, *ours, "--"]
    return " ".join(map(_quoted, [*head, *before, *adds.split(), *rest]))


def _masked(words: Sequence[str], addresses: Collection[str]) -> Iterator[str]:
    """Yield words without possible secrets: values of variables, and commands of checks."""
    for word in words:
        secret = None if word in addresses else _SECRET.fullmatch(word)
        yield f"{secret[1]}{_LEFT_OUT}" if secret else word


def _without(
    words: Sequence[str], valued: Collection[str], flags: Collection[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Remove options in any of their forms: `--name VALUE`, `--name=VALUE`, `-n VALUE`, `-nVALUE`.

    Returns the remaining words, and the values of the removed options.
    """
    remaining: list[str] = []
    values: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        head, equals, value = word.partition("=")
        if not word.startswith("--"):
            head, equals, value = word[:2], word[2:], word[2:]
        if head in valued:
            values[head] = value if equals else next(rest, "")
        elif word not in flags:
            remaining.append(word)
    return remaining, values


def _quoted(word: str) -> str:
    return word if _PLAIN.fullmatch(word) else shlex.quote(word)
